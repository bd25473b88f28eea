"""Agents: what is read out of replies, what conversations look like, and episodes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest

from guerdon.errors import ConfigError, DataError
from guerdon.language.forward import GroupModel
from guerdon.language.sampling import make_sampler
from guerdon.language.sampling.base import Completion, Sampling
from guerdon.language.templates import stop_ids
from guerdon.tasks.text import agent as module
from guerdon.tasks.text import make_text
from guerdon.tasks.text.agent import (
    NOTHING,
    PLAIN,
    THOUGHTS,
    Episode,
    LanguageAgent,
    Random,
    Scripted,
    Turn,
    parse_action,
    play,
)


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ("go north", "go north"),
        ("  Go North.\n", "Go North."),
        ("Thought: the door is north.\nAction: go north", "go north"),
        ("thought 1: hm\nACTION 1 : go north\nObservation 1: You are in a hall.\nAction 2: go south", "go north"),
        ("**Action:** `go north`", "go north"),
        ("Thought: I think\nand think\n\nAction:\ngo north", "go north"),
        ("Thought: I will not act", ""),
        ("go north\nObservation: a hall", "go north"),
        ("Action: say 'hi'\nto her\nThought: done", "say 'hi\nto her"),
        ("the reaction: none", "the reaction: none"),
        ("", ""),
    ],
)
def test_an_action_is_read_out_of_a_reply(reply: str, action: str):
    assert parse_action(reply) == action


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ('"PRESS 3."', "press 3"),
        ("Let me see.\nPress 3", "press 3"),
        ("Thought: press 1 was wrong\nAction: press  3\npress 2", "press 3"),
        ("I press 3", "I press 3"),
        ("jump\nrun", "jump"),
        ("", ""),
        ("Action:", ""),
    ],
)
def test_a_known_action_is_found_whatever_its_dress(reply: str, action: str):
    assert parse_action(reply, ["press 1", "press 2", "press 3"]) == action


class Said:
    """Says what it is told to, to each episode in turn; remembers what it was asked."""

    def __init__(self, *replies: str, name: str = "said") -> None:
        self.name = self.identity = name
        self.replies, self.asked = replies, []

    def propose(self, turns: Sequence[Turn], n: int = 1) -> list[list[str]]:
        self.asked += turns
        return [[self.replies[(len(turn.messages) - 1) // 2 % len(self.replies)]] * n for turn in turns]


def keys() -> Any:
    return make_text("keys:")


def test_a_conversation_alternates_and_begins_with_the_instruction():
    for thoughts, how in ((False, PLAIN), (True, THOUGHTS)):
        agent = Said("Thought: first\nAction: press 1", "press 2", "")
        (trajectory,) = play(keys, [agent], [0], thoughts=thoughts)
        first, *rest = agent.asked[-1].messages
        assert first["role"] == "user" and first["content"].startswith("You open a door with two keys.")
        assert f"{how}\n\nThe keys are" in first["content"]
        assert [(message["role"], message["content"]) for message in rest] == [
            ("assistant", "Thought: first\nAction: press 1"),
            ("user", "You pressed 1. Press 2 of 3."),
            ("assistant", "press 2"),
            ("user", "You pressed 2. Press 3 of 3."),
        ]
        assert [turn.messages for turn in agent.asked] == [trajectory.messages(i) for i in range(3)]
        assert [step.action for step in trajectory.steps] == ["press 1", "press 2", ""]
        assert [step.admissible for step in trajectory.steps] == [True, True, False]
        assert trajectory.truncated and not trajectory.success


def test_silence_is_written_and_not_learned():
    (trajectory,) = play(keys, [Said(" \n")], [0])
    assert {(step.said, step.learn, step.action) for step in trajectory.steps} == {(NOTHING, False, "")}


def test_agents_take_turns_and_meet_the_same_tasks():
    agents = [Said("press 1", name="a"), Said("press 2", name="b")]
    found = list(play(keys, agents, range(12), n=3))
    assert [t.index for t in found] == list(range(12)) and [t.policy for t in found] == ["a", "b"] * 6
    assert len({(t.task, t.seed) for t in found[:6]}) == len({(t.task, t.seed) for t in found[6:]}) == 1
    assert found[0].task != found[6].task and found[0].seed != found[6].seed
    assert {t.split for t in found} == {"train"} and {t.env for t in found} == {"keys:"}
    again = list(play(keys, [Said("press 1")], range(16 + 2), split="test"))
    assert {t.task for t in again[:16]} == set(keys().tasks("test")), "all tasks come before one comes again"
    assert again[16].task == again[0].task and again[16].seed != again[0].seed


def test_an_episode_does_not_depend_on_what_is_played_beside_it(monkeypatch):
    def bandits() -> Any:
        return make_text("bandit:bernoulli?steps=5")

    agents = [Random(), Scripted()]
    whole = list(play(bandits, agents, range(20), n=2, noise=0.3, seed=4))
    assert list(play(bandits, agents, range(0, 20, 3), n=2, noise=0.3, seed=4)) == whole[::3]
    monkeypatch.setattr(module, "AT_ONCE", 3)
    assert list(play(bandits, agents, range(20), n=2, noise=0.3, seed=4)) == whole
    assert list(play(bandits, agents, range(20), n=2, noise=0.3, seed=5)) != whole


def test_only_as_many_environments_are_made_as_play_at_once(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 4)
    made = count()

    def make() -> Any:
        next(made)
        return keys()

    assert len(list(play(make, [Random()], range(11)))) == 11 and next(made) == 4


def test_noise_speaks_in_the_agents_place_and_is_not_learned():
    found = list(play(keys, [Scripted()], range(100), noise=0.25))
    steps = [step for t in found for step in t.steps]
    foreign = [step for step in steps if not step.learn]
    assert all(step.speaker == ("scripted" if step.learn else "noise") for step in steps)
    assert len(foreign) / len(steps) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 300) ** 0.5)
    assert all(t.success for t in found if all(step.learn for step in t.steps))
    assert not any(step.learn for t in play(keys, [Scripted()], range(2), noise=1.0) for step in t.steps)


def test_random_actions_are_each_as_likely():
    env = keys()
    turns = [Turn([], env, ["a", "b", "c", "d"], seed) for seed in range(2000)]
    chosen = [replies[0] for replies in Random().propose(turns)]
    assert all(chosen.count(action) / 2000 == pytest.approx(0.25, abs=4 * (0.1875 / 2000) ** 0.5) for action in "abcd")
    assert len(set(Random().propose(turns[:1], 30)[0])) == 4
    with pytest.raises(ConfigError, match="does not say which actions there are"):
        Random().propose([Turn([], env, None, 0)])
    assert Turn([], env, None, 0, thoughts=True).reply("press 1") == "Action: press 1"


class Echo:
    """A sampler that remembers the prompts."""

    def __init__(self) -> None:
        self.prompts: list[Sequence[int]] = []

    def sample(self, prompts, seeds, sampling):
        self.prompts += prompts
        return [[Completion([], [], True, "press 3") for _ in each] for each in seeds]  # type: ignore[arg-type]

    def sync(self, model: Any) -> None: ...


def test_a_long_conversation_loses_its_oldest_turns_and_it_is_counted(tiny):
    _, tokenizer = tiny
    episode = Episode.begin(keys(), "3-3", seed=0)
    first = len(tokenizer.apply_chat_template([episode.messages[0]], add_generation_prompt=True).input_ids)
    for _ in range(2):
        episode.take("press 3", "me")
    turn = episode.turn(0)
    for room, kept in ((10_000, "all"), (first + 60, "last"), (first + 10, "first"), (first - 1, "none")):
        echo = Echo()
        agent = LanguageAgent("tiny", echo, tokenizer, Sampling(max_new_tokens=8), context=room + 8)
        if kept == "none":
            with pytest.raises(DataError, match=rf"has {first} tokens, with a reply of 8 more than the {room + 8}"):
                agent.propose([turn])
            continue
        agent.propose([turn])
        text = tokenizer.decode(echo.prompts[0])
        assert text.startswith("<s><|user|>You open a door") and text.endswith("<|assistant|>")
        assert text.count("<|assistant|>press 3") == {"all": 2, "last": 1, "first": 0}[kept]
        assert ("Press 3 of 3" in text) == (kept != "first") and len(echo.prompts[0]) <= room
        assert agent.shortened == (kept != "all")


def test_a_language_policy_acts(tiny):
    model, tokenizer = tiny
    sampler = make_sampler("local", GroupModel(model), tokenizer, stop_ids(tokenizer))

    def agent() -> LanguageAgent:
        return LanguageAgent("tiny", sampler, tokenizer, Sampling(max_new_tokens=5))

    found = list(play(lambda: make_text("keys:?depth=2"), [agent()], range(4), n=2))
    assert all(len(step.said) <= 5 or step.said == NOTHING for t in found for step in t.steps)
    assert len({step.said for t in found for step in t.steps}) > 4, "each reply has its own chance"
    assert list(play(lambda: make_text("keys:?depth=2"), [agent()], range(4), n=2)) == found
    turn = Episode.begin(keys(), "3-3", seed=0).turn(seed=5)
    three = agent().propose([turn], 3)[0]
    assert len(set(three)) == 3 and agent().propose([turn], 3)[0] == three
