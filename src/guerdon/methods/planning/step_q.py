"""Step-level Q-value models for agents (Zhai et al. 2024, arXiv 2409.09345).

Searched trees say which of the actions that were tried in one place was the better one. DPO on these pairs, each a
single step after a common history, gives a policy whose log-ratio to its start is read as a value,

    Q(u, a) = beta [log pi(a | u) - log pi_ref(a | u)],

and whoever acts, executes of some actions that it would take the one of greatest Q. The loss is DPO's own: the pairs
are preferences like others, for `guerdon train dpo`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.feedback.records import Message, Record, texts
from guerdon.fields import build
from guerdon.language.groups import Group
from guerdon.language.templates import render, render_all
from guerdon.methods.planning.mcts import Node, distinct
from guerdon.tasks.text.agent import Agent, Turn, parse_action
from guerdon.training.config import LanguageTraining
from guerdon.training.rundir import RunDir

if TYPE_CHECKING:
    from guerdon.language.policy import Policy

Chosen = Literal["argmax", "path"]
Reduction = Literal["sum", "mean"]


class StepPair(NamedTuple):
    """Two children of `node`: what was done there is the history that both actions share."""

    node: Node
    chosen: Node
    rejected: Node

    @property
    def gap(self) -> float:
        """By how much the value of the chosen one is greater."""
        return self.chosen.value - self.rejected.value


def best_end(root: Node, goal: float = 1.0) -> Node | None:
    """The end of greatest return in a tree, the first of them; None where that is no success."""
    best = max((node for node in root.walk() if node.over), key=lambda end: end.reward, default=None)
    return best if best is not None and best.reward >= goal else None


def step_pairs(root: Node, *, chosen: Chosen = "argmax", min_gap: float = 0.0, goal: float = 1.0) -> list[StepPair]:
    """A pair for each step on the way to the best end, where its alternatives differ; none of a tree without success.

    Args:
        chosen: the child of greatest value (as released), or the one on the way ("path", as the paper draws it). The
            rejected one is the child of least value. Children that were never visited have the value 0.
        min_gap: pairs whose values differ by no more are left out.
    """
    end = best_end(root, goal)
    path = end.path if end is not None else []
    pairs = []
    for node, on_way in pairwise(path):
        better = on_way if chosen == "path" else max(node.children, key=lambda child: child.value)
        pair = StepPair(node, better, min(node.children, key=lambda child: child.value))
        if pair.gap > min_gap:
            pairs.append(pair)
    return pairs


def trajectory_pair(root: Node, goal: float = 1.0) -> tuple[Node, Node] | None:
    """The best end and the first of the worst ones: a pair of whole episodes, as in ETO (arXiv 2403.02502)."""
    best = best_end(root, goal)
    worst = min((node for node in root.walk() if node.over), key=lambda end: end.reward, default=None)
    return None if best is None or worst is None or worst.reward == best.reward else (best, worst)


def q_values(
    logps: Sequence[np.ndarray], ref_logps: Sequence[np.ndarray], beta: float = 0.1, reduction: Reduction = "sum"
) -> np.ndarray:
    """beta (log pi - log pi_ref) of n actions from the log-probs of their tokens: (n,).

    The sum over tokens is what the loss compares. The mean, as released, may rank a long action that is likelier at
    every token below a short one.
    """
    ratios = [p - q for p, q in zip(logps, ref_logps, strict=True)]
    return beta * np.array([ratio.sum() if reduction == "sum" else ratio.mean() for ratio in ratios])


class QModel:
    """A policy that has learned step preferences, read as a Q-value model.

    Args:
        policy: what was learned.
        start: sets the log-probs of what it was learned from in groups, under a name: `Policy.annotate` of the start.
        beta: of the loss, the unit of the values.
        reduction: over the tokens of an action; see `q_values`.
        max_length: tokens of a history with an action. Of a longer history the oldest turns are left out, see
            `shortened`; an action is never cut.
    """

    def __init__(
        self,
        policy: Policy,
        start: Callable[[Sequence[Group], str], None],
        beta: float = 0.1,
        reduction: Reduction = "sum",
        max_length: int = 2048,
    ) -> None:
        self.policy, self.start, self.beta, self.reduction = policy, start, beta, reduction
        self.max_length = max_length

    @classmethod
    def load(cls, run: str | Path, precision: str = "auto", reduction: Reduction = "sum") -> QModel:
        """What a run of `dpo` on step preferences has left.

        Raises:
            ConfigError: there is no run, or it is not finished, or of a method without `beta`.
        """
        from guerdon.language.policy import Policy
        from guerdon.training.language import material

        opened = RunDir.open(run)
        options, training = opened.config["options"], opened.config["training"]
        if "beta" not in options or not (opened.path / "policy").is_dir():
            raise ConfigError(f"{run} holds no Q-value model: give a finished run of dpo on step preferences.")
        seen: list[Record] = []
        if training["model"].startswith("tiny:"):  # whose tokenizer is built from what it will see
            _, train, held_out, _ = material(build(LanguageTraining, training, str(run)))
            seen = train + held_out
        start = Policy.load(training["model"], precision, seed=training["seed"], texts=list(texts(seen)))
        return cls(Policy.load(run, precision), start.annotate, options["beta"], reduction, options["max_length"])

    def score(self, messages: list[Message], candidates: Sequence[str]) -> np.ndarray:
        """Q of n candidates for the next turn after `messages`, which are computed once: (n,)."""
        return self.score_all([(messages, candidates)])[0]

    def score_all(self, asked: Sequence[tuple[list[Message], Sequence[str]]]) -> list[np.ndarray]:
        """`score` of many, in few forward passes.

        Raises:
            DataError: an action that does not fit into `max_length` even without a history.
        """
        tokenizer = self.policy.tokenizer
        records = [_record(shortened(m, c, tokenizer, self.max_length), c) for m, c in asked]
        groups, _ = render_all(records, tokenizer, max_length=self.max_length, overlong="refuse")
        self.policy.annotate(groups, "logps")
        self.start(groups, "ref_logps")
        both = [(_learned(group, "logps"), _learned(group, "ref_logps")) for group in groups]
        return [q_values(logps, ref_logps, self.beta, self.reduction) for logps, ref_logps in both]


def shortened(messages: list[Message], candidates: Sequence[str], tokenizer: Any, max_length: int) -> list[Message]:
    """The messages without their oldest turns, so many that every candidate fits behind them whole.

    What stands before the first reply, the instruction and the first observation, stays.

    Raises:
        DataError: even without any turns it is too long.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    while True:
        group = render(_record(messages, candidates), tokenizer, max_length=2**31)
        tokens = max(len(group.sequence(completion)[0]) for completion in range(len(group)))
        if tokens <= max_length:
            return messages
        if len(messages) <= first + 1:
            raise DataError(f"an action takes {tokens} tokens with its instruction, and max_length is {max_length}.")
        messages = [*messages[:first], *messages[first + 2 :]]


def _record(messages: list[Message], candidates: Sequence[str]) -> Record:
    return Record(messages, [[{"role": "assistant", "content": candidate}] for candidate in candidates])


def _learned(group: Group, name: str) -> list[np.ndarray]:
    """A value of each completion's tokens that are learned: those of the action, and of its end."""
    segments = [group.segments[leaf] for leaf in group.leaves]
    return [segment.values[name][segment.learn] for segment in segments]


class QGuidedAgent:
    """Takes of some replies of another agent the one of greatest Q; replies that are alike are scored once.

    Args:
        agent: whoever acts; its weights are not needed.
        q: the judge.
        candidates: replies to choose from. With one, or where all are worth the same, it is the other agent.
    """

    def __init__(self, agent: Agent, q: QModel, candidates: int = 5) -> None:
        self.agent, self.q, self.candidates = agent, q, candidates
        self.name, self.identity = f"{agent.name} guided by Q", [agent.identity, candidates]

    def propose(self, turns: Sequence[Turn], n: int = 1) -> list[list[str]]:
        drawn = [distinct(replies)[0] for replies in self.agent.propose(turns, max(n, self.candidates))]
        values = self.q.score_all([(turn.messages, replies) for turn, replies in zip(turns, drawn, strict=True)])
        ranked = [[replies[i] for i in np.argsort(-q, kind="stable")] for replies, q in zip(drawn, values, strict=True)]
        return [(replies * n)[:n] for replies in ranked]


class Voting:
    """Does what most of some replies of another agent would do: self-consistency, step by step.

    Args:
        agent: whoever acts.
        candidates: replies that vote; of equally many the one that was said first wins.
    """

    def __init__(self, agent: Agent, candidates: int = 5) -> None:
        self.agent, self.candidates = agent, candidates
        self.name, self.identity = f"{agent.name} by vote", [agent.identity, candidates]

    def propose(self, turns: Sequence[Turn], n: int = 1) -> list[list[str]]:
        said = self.agent.propose(turns, max(n, self.candidates))
        return [[_commonest(turn, replies)] * n for turn, replies in zip(turns, said, strict=True)]


def _commonest(turn: Turn, replies: Sequence[str]) -> str:
    actions = [parse_action(reply, turn.actions) for reply in replies]
    return replies[actions.index(Counter(actions).most_common(1)[0][0])]
