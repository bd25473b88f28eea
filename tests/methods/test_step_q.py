"""Step-level Q-value models: pairs from trees, scores of actions, agents that are guided by them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from guerdon.errors import ConfigError, DataError
from guerdon.feedback.readers import read_feedback
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Sampling
from guerdon.language.templates import render_all
from guerdon.methods.planning.mcts import MCTS, Node
from guerdon.methods.planning.step_q import (
    QGuidedAgent,
    QModel,
    Voting,
    best_end,
    shortened,
    step_pairs,
    trajectory_pair,
)
from guerdon.methods.planning.trees import Trees, collect_trees
from guerdon.tasks.text import make_text
from guerdon.tasks.text.agent import Turn
from guerdon.tasks.text.collect import language_agent

TINY = "tiny:layers=1,width=32,heads=2,context=512"
MESSAGES = [
    {"role": "user", "content": "Press a key. You see two."},
    {"role": "assistant", "content": "press 1"},
    {"role": "user", "content": "Nothing happens."},
    {"role": "assistant", "content": "press 2"},
    {"role": "user", "content": "A click."},
]


def node(action: str, value: float, *children: Node, reward: float = 0.0, over: bool = False) -> Node:
    made = Node(action, f"after {action}", reward, over=over, visits=1, value=value, children=list(children))
    for child in children:
        child.parent = made
    return made


def tree() -> Node:
    """The best end lies below "a", but "b" has the greater value."""
    won, lost = node("won", 1.0, reward=1.0, over=True), node("lost", 0.0, over=True)
    return node(
        "", 0.4, node("a", 0.5, lost, won), node("b", 0.6), node("c", -0.2, node("bad", 0, reward=-1.0, over=True))
    )


def names(pairs) -> list[tuple[str, str, str]]:
    return [(pair.node.action, pair.chosen.action, pair.rejected.action) for pair in pairs]


def test_pairs_are_steps_on_the_best_way_with_the_best_and_the_worst_alternative():
    assert names(step_pairs(tree())) == [("", "b", "c"), ("a", "won", "lost")]
    assert names(step_pairs(tree(), chosen="path")) == [("", "a", "c"), ("a", "won", "lost")]
    assert [pair.gap for pair in step_pairs(tree(), chosen="path")] == pytest.approx([0.7, 1.0])
    assert names(step_pairs(tree(), min_gap=0.8)) == [("a", "won", "lost")]


def test_equal_values_make_no_pair():
    assert step_pairs(node("", 1.0, node("a", 1.0, reward=1.0, over=True), node("b", 1.0, reward=1.0, over=True))) == []


def test_a_tree_without_success_makes_no_pair():
    assert names(step_pairs(tree(), goal=1.5)) == [] and best_end(tree(), 1.5) is None
    assert trajectory_pair(tree(), 1.5) is None
    assert trajectory_pair(node("", 1.0, node("a", 1.0, reward=1.0, over=True))) is None


def test_episodes_are_compared_whole():
    best, worst = trajectory_pair(tree())
    assert [each.action for each in best.path] == ["", "a", "won"]
    assert [each.action for each in worst.path] == ["", "c", "bad"]


# Q


@pytest.fixture(scope="module")
def policies() -> tuple[Policy, Policy]:
    return Policy.load(TINY, seed=0), Policy.load(TINY, seed=1)


@pytest.fixture
def q(policies) -> QModel:
    return QModel(policies[0], policies[1].annotate, beta=0.5)


def log_prob(policy: Policy, messages, action: str) -> np.ndarray:
    """Log-probs of an action's tokens and its end, by transformers' own forward of the whole conversation."""
    tokenizer = policy.tokenizer
    before = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(before + action + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt").input_ids
    start = len(tokenizer(before, add_special_tokens=False).input_ids)
    model = policy.model.model
    model.set_attn_implementation("eager")
    try:
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    finally:
        model.set_attn_implementation("guerdon")
    return logps[start - 1 :].detach().numpy()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_scores_are_log_ratios_of_the_action_alone(policies, reduction):
    model = QModel(policies[0], policies[1].annotate, beta=0.5, reduction=reduction)
    candidates = ["press 3", "look around", "press 3 now"]
    found = model.score(MESSAGES, candidates)
    for value, action in zip(found, candidates, strict=True):
        ratio = log_prob(policies[0], MESSAGES, action) - log_prob(policies[1], MESSAGES, action)
        assert len(ratio) == len(action) + 1  # characters, and the end of the turn
        assert value == pytest.approx(0.5 * getattr(ratio, reduction)(), abs=1e-4)


def test_many_are_scored_as_each_alone(q):
    asked = [(MESSAGES, ["press 1", "press 2"]), (MESSAGES[:3], ["wait"]), (MESSAGES[:1], ["a", "b", "press 1"])]
    together = q.score_all(asked)
    assert [len(values) for values in together] == [2, 1, 3]
    for values, (messages, candidates) in zip(together, asked, strict=True):
        np.testing.assert_allclose(values, q.score(messages, candidates), atol=1e-5)


def test_a_long_history_loses_its_oldest_turns_and_an_action_nothing(policies):
    tokenizer, candidates = policies[0].tokenizer, ["press 3", "press 3 twice"]
    whole = (
        len(tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]) + len(candidates[1]) + 1
    )
    assert shortened(MESSAGES, candidates, tokenizer, whole) == MESSAGES
    assert shortened(MESSAGES, candidates, tokenizer, whole - 1) == [MESSAGES[0], *MESSAGES[3:]]
    alone = len(tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)["input_ids"]) + 14
    assert shortened(MESSAGES, candidates, tokenizer, alone) == MESSAGES[:1]
    with pytest.raises(DataError, match=f"an action takes {alone} tokens with its instruction, and max_length is"):
        shortened(MESSAGES, candidates, tokenizer, alone - 1)
    short = QModel(policies[0], policies[1].annotate, max_length=whole - 1)
    np.testing.assert_allclose(
        short.score(MESSAGES, candidates),
        QModel(policies[0], policies[1].annotate).score([MESSAGES[0], *MESSAGES[3:]], candidates),
        atol=1e-6,
    )


# Agents


class Says:
    """Proposes the same replies each time, and keeps what it was asked."""

    name = identity = "says"

    def __init__(self, replies: Sequence[str]) -> None:
        self.replies, self.asked = replies, []

    def propose(self, turns: Sequence[Turn], n: int = 1) -> list[list[str]]:
        self.asked.append(n)
        return [list(self.replies[:n]) for _ in turns]


@pytest.fixture
def turn() -> Turn:
    env = make_text("keys:")
    env.reset(seed=0)
    return Turn(MESSAGES, env, ["press 1", "press 2", "press 3"], seed=5)


def test_the_reply_of_greatest_q_is_taken_and_alike_ones_are_scored_once(q, turn, monkeypatch):
    replies = ["press 1", "press 2", "PRESS 1", "press 3", "press  2"]
    scored = []
    score_all = q.score_all
    monkeypatch.setattr(q, "score_all", lambda asked: scored.extend(c for _, c in asked) or score_all(asked))
    ((taken,),) = QGuidedAgent(Says(replies), q, candidates=5).propose([turn])
    assert scored == [["press 1", "press 2", "press 3"]]
    assert taken == ["press 1", "press 2", "press 3"][int(np.argmax(q.score(MESSAGES, scored[0])))]
    ((first, second),) = QGuidedAgent(Says(replies), q).propose([turn], 2)
    assert first == taken and second in replies and second != first


def test_where_the_policy_is_its_start_or_there_is_one_candidate_it_is_the_agent_itself(policies, turn):
    agent = language_agent(policies[0], "tiny", Sampling(max_new_tokens=6))
    turns = [turn, Turn(MESSAGES[:3], turn.env, turn.actions, seed=6)]
    alone = agent.propose(turns)
    assert all(reply.strip() for (reply,) in alone)
    same = QModel(policies[1], policies[1].annotate)
    assert QGuidedAgent(agent, same, candidates=4).propose(turns) == alone
    assert QGuidedAgent(agent, QModel(policies[0], policies[1].annotate), candidates=1).propose(turns) == alone


def test_a_vote_counts_actions_and_takes_the_first_of_equals(turn):
    inner = Says(["press 2", "Action: press 3", "press 3.", "press 1"])
    assert Voting(inner, candidates=4).propose([turn]) == [["Action: press 3"]]
    assert Voting(inner, candidates=2).propose([turn], 3) == [["Action: press 3"] * 3] and inner.asked == [4, 3]
    assert Voting(Says(["press 2", "press 1"]), candidates=2).propose([turn]) == [["press 2"]]


# Trees of tasks in words


def collected(out: Path, trees: int = 12, **how):
    search = MCTS(**{"iterations": 12, "candidates": 3, "max_depth": 2, **how})
    return collect_trees(
        "keys:?depth=2&actions=3",
        policy="random",
        out=out,
        trees=trees,
        how=search,
        sampling=Sampling(),
        max_length=512,
    )


def test_trees_make_feedback_that_learns_the_step_alone(tmp_path, policies):
    summary = collected(tmp_path / "trees.jsonl")
    files = {file.rpartition("trees.")[2]: rows for file, rows in summary["feedback"].items()}
    assert set(files) == {"step-preference.jsonl", "preference.jsonl", "sft.jsonl"}
    assert summary["trees"] == 12 and summary["solved"] == files["sft.jsonl"] / 12 > 0
    tokenizer = policies[0].tokenizer

    def learned(kind: str) -> list[list[str]]:
        feedback = read_feedback(str(tmp_path / f"trees.{kind}.jsonl"))
        assert "preferences" in feedback.says() or kind == "sft"
        groups, _ = render_all(feedback.records, tokenizer, max_length=2000)
        return [[tokenizer.decode(s.tokens[s.learn]) for s in group.segments[1:]] for group in groups]

    steps, episodes = learned("step-preference"), learned("preference")
    assert all(text.startswith("press ") and text.count("press") == 1 for pair in steps for text in pair)
    assert all(text.count("press") == 2 and "You" not in text for pair in episodes for text in pair)
    rows = [json.loads(line) for line in (tmp_path / "trees.step-preference.jsonl").open()]
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert {row["step"] for row in rows} == {0, 1}
    for row in rows:
        right = row["task"].split("-")[row["step"]]
        if row["step"] == 1:
            assert row["prompt"][1]["role"] == "assistant" and row["chosen"][0]["content"] == f"press {right}"


def test_a_killed_collection_goes_on_and_gives_the_same_trees(tmp_path):
    collected(tmp_path / "whole.jsonl")
    collected(tmp_path / "part.jsonl", trees=5)
    with (tmp_path / "part.jsonl").open("ab") as file:
        file.write(b'{"env": "keys:?dep')  # what a kill may leave
    again = collected(tmp_path / "part.jsonl")
    assert again["resumed"] == 5

    def of(name: str) -> dict:
        return {tree.index: tree.row() for tree in Trees(tmp_path / name)}

    assert of("part.jsonl") == of("whole.jsonl") and len(of("whole.jsonl")) == 12
    kinds = ("step-preference", "preference", "sft")
    assert all(
        (tmp_path / f"part.{k}.jsonl").read_bytes() == (tmp_path / f"whole.{k}.jsonl").read_bytes() for k in kinds
    )
    with pytest.raises(DataError, match="holds trees that were searched otherwise"):
        collected(tmp_path / "part.jsonl", weight=2.0)


def test_only_a_finished_run_with_beta_is_a_q_model(tmp_path):
    with pytest.raises(ConfigError):
        QModel.load(tmp_path)
