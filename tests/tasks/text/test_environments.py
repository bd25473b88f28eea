"""Environments in words: the protocol of Gymnasium, exact snapshots, splits, and what each adapter says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from guerdon.errors import ConfigError, GuerdonError
from guerdon.tasks.text import ENVIRONMENTS, make_text
from guerdon.tasks.text.babyai import describe
from guerdon.tasks.text.base import TextEnv
from pages import ROOT, blocks

textworld = pytest.mark.skipif(importlib.util.find_spec("textworld") is None, reason="needs the package textworld")
QUESTIONS = "reasoning:chain_sum?max_terms=2&max_digits=1&train_size=9&test_size=4"
SPECS = [
    "keys:",
    "keys:?depth=4&actions=3",
    "bandit:bernoulli?steps=6",
    "bandit:gaussian?steps=6",
    "bandit:contextual?steps=6",
    "babyai:GoToLocal?limit=12",
    "babyai:UnlockPickup?limit=12",
    "babyai:Dynamic-Obstacles-5x5?limit=12",  # things that move by chance
    QUESTIONS,
    pytest.param("textworld:house?limit=6&games=1", marks=textworld),
]
pytestmark = pytest.mark.filterwarnings("ignore:Game .* is not fully supported")  # by jericho, which TextWorld wraps
GREETING = """
import gymnasium
from gymnasium.spaces import Text

class Greeting(gymnasium.Env):
    observation_space, action_space = Text(99), Text(99)
    instruction = "Greet back."

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.word = self.np_random.choice(["hello", "good day", "ahoy"])
        return self.word, {"actions": ["hello", "good day", "ahoy"]}

    def step(self, action):
        right = action == self.word
        return "thanks" if right else "pardon?", float(right), right, False, {"success": right}

def polite():
    return Greeting()

class Whim(Greeting):
    whims = iter(range(10**6))

    def step(self, action):
        return f"whim {next(self.whims)}", 0.0, False, False, {}

def whimsical():
    return Whim()

def short(after=2):
    return gymnasium.wrappers.TimeLimit(Whim(), after)

def cartpole():
    return gymnasium.make("CartPole-v1")
"""


@pytest.fixture(scope="module", autouse=True)
def games(tmp_path_factory) -> Iterator[None]:
    """Games are compiled once for this module, and leave nothing behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUERDON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def acts(env: TextEnv, rng: np.random.Generator, steps: int) -> list[Any]:
    """What comes of random actions, some of which are none, up to the end of the episode."""
    found: list[Any] = []
    for _ in range(steps):
        known = env._actions()
        action = "dance on the table" if known is None or rng.random() < 0.1 else known[rng.integers(len(known))]
        found.append((action, env.step(action)))
        if any(found[-1][1][2:4]):
            break
    return found


@pytest.mark.parametrize("spec", SPECS)
def test_the_protocol_is_gymnasiums(spec: str):
    env = make_text(spec)
    check_env(env, skip_render_check=True)
    observation, info = env.reset(seed=3)
    assert observation in env.observation_space and observation == env.observation
    assert info["task"] in env.tasks("train") and env.name == spec
    json.dumps(info)
    with pytest.raises(gymnasium.error.ResetNeeded):
        acts(env, np.random.default_rng(0), 99)
        env.step("too late")


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_seed_gives_the_same_episode(spec: str):
    one, other = make_text(spec), make_text(spec)
    first = [one.reset(seed=5), acts(one, np.random.default_rng(0), 8)]
    assert first == [other.reset(seed=5), acts(other, np.random.default_rng(0), 8)]
    assert [one.reset() for _ in range(3)] == [other.reset() for _ in range(3)], "what follows a seed follows from it"


@pytest.mark.parametrize("spec", SPECS)
def test_a_snapshot_brings_an_episode_back_exactly(spec: str):
    env = make_text(spec)
    env.reset(seed=2)
    before = [(env.snapshot(), env.reset(seed=2), 0)]
    for done in (1, 2, 4):
        env.reset(seed=2)
        if not any(any(step[2:4]) for _, step in acts(env, np.random.default_rng(1), done)):
            seen = env.observation, env._info()
            before.append((env.snapshot(), seen, env.steps))
    runs = []
    for snapshot, seen, done in before * 2:  # each of them twice: what is restored is not the snapshot's own
        assert env.restore(snapshot) == seen and env.steps == done
        runs.append(acts(env, np.random.default_rng(9), 8))
    assert runs[: len(before)] == runs[len(before) :]
    elsewhere = make_text(spec)
    elsewhere.restore(before[-1][0])
    assert acts(elsewhere, np.random.default_rng(9), 8) == runs[-1], "another environment of the spec goes on as well"


def test_an_episode_is_played_again_where_it_cannot_be_copied():
    for spec in ("babyai:Dynamic-Obstacles-5x5", "bandit:gaussian"):
        env = make_text(spec)
        env.reset(seed=4)
        acts(env, np.random.default_rng(0), 3)
        copied = env.snapshot()
        replayed = dataclasses.replace(copied, state=None)
        after = []
        for snapshot in (copied, replayed):
            env.restore(snapshot)
            after.append(acts(env, np.random.default_rng(1), 5))
        assert after[0] == after[1]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch) -> str:
    """A module of the user's, of another name for each test: modules are imported once."""
    name = "mine_" + re.sub(r"\W", "_", tmp_path.name)
    (tmp_path / f"{name}.py").write_text(GREETING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_an_environment_of_the_user(mine: str):
    env = make_text(f"python:{mine}.polite")
    word, info = env.reset(seed=0)
    assert info["actions"] == ["hello", "good day", "ahoy"] and env.instruction == "Greet back."
    assert len({env.reset(options={"task": task})[0] for task in env.tasks("test")[:20]}) == 3
    env.reset(seed=0)
    snapshot = env.snapshot()
    assert env.step("what?")[0] == "pardon?"
    env.restore(snapshot)
    assert env.step(word)[:4] == ("thanks", 1.0, True, False) and env._info()["success"]


def test_a_replay_that_goes_elsewhere_is_refused(mine: str):
    env = make_text(f"python:{mine}.whimsical")
    env.reset(seed=0)
    env.step("hello")
    with pytest.raises(GuerdonError, match=r"after action 1, 'hello', came \('whim 1'.*before it was \('whim 0'"):
        env.restore(env.snapshot())


def test_a_limit_of_the_users_own_truncates(mine: str):
    env = make_text(f"python:{mine}.short?after=2")
    env.reset(seed=0)
    assert [env.step("hello")[2:4] for _ in range(2)] == [(False, False), (False, True)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "bandits:bernoulli",
            "no environment in words 'bandits:bernoulli'. Did you mean 'bandit'? There are ",
        ),
        ("bandit:bernouli", "no bandit is called 'bernouli'. Did you mean 'bernoulli'?"),
        ("bandit:bernoulli?arm=3", "there is no option 'arm'. Did you mean 'arms'?"),
        ("bandit:bernoulli?arms=many", "'arms' has to be a whole number, not 'many'"),
        ("bandit:bernoulli?arms=11", "arms is 11: it must be at least 2 and at most 10"),
        ("bandit:bernoulli?steps=0", "the limit is 0 steps"),
        ("keys:two", "keys takes no name"),
        ("keys:?depth", "'depth' has to be param=value"),
        ("babyai:GoToLocl", "has no mission 'GoToLocl'. Did you mean 'GoToLocal'?"),
        ("reasoning:", "name a generator"),
        ("reasoning:chain_sums", "no generator 'chain_sums'. Did you mean 'chain_sum'?"),
        pytest.param("textworld:coins", "no game is called 'coins'. Did you mean 'coin'?", marks=textworld),
        pytest.param("textworld:coin?recipe=3", "there is no option 'recipe'", marks=textworld),
        ("python:nobody_has.this", "there is no module 'nobody_has'"),
    ],
)
def test_what_cannot_be_made(spec: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_text(spec)


@pytest.mark.parametrize(
    ("kind", "package", "extra"), [("textworld", "textworld", "textworld"), ("babyai", "minigrid", "text")]
)
def test_a_package_that_is_missing_is_named(kind: str, package: str, extra: str, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"guerdon.tasks.text.{kind}", raising=False)
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install 'guerdon\[{extra}\]'"):
        make_text(f"{kind}:coin")


def test_what_a_users_function_has_to_give(mine: str):
    with pytest.raises(ConfigError, match="where a TextEnv or a Gymnasium environment whose observations and actions"):
        make_text(f"python:{mine}.cartpole")


@textworld
def test_a_game_that_cannot_be_made_is_told():
    with pytest.raises(ConfigError, match=r"no game can be made with these options: Expected level to be within"):
        make_text("textworld:coin?level=301").reset(seed=0)


@pytest.mark.parametrize("spec", SPECS)
def test_no_task_is_on_two_sides(spec: str):
    env = make_text(spec)
    sides = [env.tasks(split) for split in ("train", "valid", "test")]  # type: ignore[arg-type]
    assert all(sides) and sum(map(len, sides)) == len(set().union(*sides))
    assert [env.split_of(side[0]) for side in sides] == ["train", "valid", "test"]
    sides[0].clear()
    assert env.tasks(), "the list that is given is not the environment's own"
    with pytest.raises(ConfigError, match=r"has no split 'tests'\. Did you mean 'test'"):
        env.tasks("tests")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no task 'nothing'"):
        env.reset(options={"task": "nothing"})


def test_questions_of_two_sides_differ():
    env = make_text(QUESTIONS)
    asked = {split: {env.reset(options={"task": task})[0] for task in env.tasks(split)} for split in ("train", "test")}
    assert len(asked["train"]) == 8 and len(asked["test"]) == 4 and not asked["train"] & asked["test"]


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "Obstacles" not in spec])
def test_the_expert_succeeds(spec: str):
    env = make_text(spec.replace("limit=", "limit=9") if "babyai" in spec else spec)
    for task in env.tasks("test")[:2]:
        _, info = env.reset(seed=0, options={"task": task})
        terminated = truncated = False
        while not (terminated or truncated):
            assert "success" not in info
            _, _, terminated, truncated, info = env.step(env.expert())
        assert terminated and not truncated and info["success"] and env.total > 0


def test_who_has_no_expert_says_so():
    env = make_text("babyai:Empty-5x5")
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="has no scripted policy"):
        env.expert()


def test_keys_reward_only_what_is_right_throughout():
    env = make_text("keys:")
    assert [len(env.tasks(split)) for split in ("train", "valid", "test")] == [40, 8, 16]  # type: ignore[arg-type]
    for presses, reward in (("252", 1.0), ("PRESS 2!", 0.0), ("255", 0.0), ("522", 0.0)):
        task = next(task for split in ("train", "valid", "test") for task in env.tasks(split) if task == "2-5")  # type: ignore[arg-type]
        env.reset(seed=0, options={"task": task})
        rewards = []
        for press in presses if presses.isdigit() else ["2", "5", presses]:
            *_, reward_, terminated, truncated, info = env.step(f"press {press}" if press.isdigit() else press)
            rewards.append(reward_)
        assert rewards == [0.0, 0.0, reward] and (terminated or truncated) and info["success"] == bool(reward)


def test_an_action_that_is_none_is_answered_and_costs_a_step():
    env = make_text("keys:")
    env.reset(seed=0)
    observation, reward, terminated, truncated, _ = env.step("open the door")
    assert observation.startswith("'open the door' is no action here. The actions are: press 0, press 1,")
    assert (reward, terminated, truncated, env.steps) == (0.0, False, False, 1)
    assert env.step(" Press 3 ")[0] == "You pressed 3. Press 3 of 3."


def pulled(spec: str, arm: str, times: int) -> np.ndarray:
    env = make_text(spec)
    rewards = []
    while len(rewards) < times:
        env.reset(seed=len(rewards), options={"task": "train-0"})
        over = False
        while not over:
            _, reward, over, _, _ = env.step(arm)
            rewards.append(reward)
    return np.array(rewards)


def test_machines_pay_as_they_are_said_to():
    spec = "bandit:bernoulli?steps=100&gap=0.4&arms=3"
    env = make_text(spec)
    env.reset(seed=0, options={"task": "train-0"})
    means = env.state["means"][0]
    assert sorted(means) == pytest.approx([0.3, 0.3, 0.7])
    for arm, mean in zip(env.arms, means, strict=True):
        paid = pulled(spec, arm, 1500)
        assert set(paid) == {0.0, 1.0} and paid.mean() == pytest.approx(mean, abs=4 * np.sqrt(0.21 / 1500))
    gaussian = "bandit:gaussian?steps=100"
    env = make_text(gaussian)
    env.reset(seed=0, options={"task": "train-0"})
    paid = pulled(gaussian, "green", 1500)
    assert paid.mean() == pytest.approx(env.state["means"][0][1], abs=4 / np.sqrt(1500))
    assert paid.std() == pytest.approx(1, abs=0.1)


def test_regret_is_what_the_best_arm_would_have_brought_more():
    env = make_text("bandit:contextual?steps=4")
    env.reset(seed=1)
    regret = 0.0
    for arm in ("blue", "red", "blue", "green"):
        means = env.state["means"][env.state["context"]]
        regret += means.max() - means[env.arms.index(arm)]
        *_, info = env.step(arm)
        assert info["regret"] == pytest.approx(regret)
    assert info["success"] == (means.argmax() == env.arms.index("green"))


def test_a_customer_is_announced_before_each_pull():
    env = make_text("bandit:contextual?steps=50&contexts=4")
    seen = [env.reset(seed=0)[0]]
    for _ in range(49):
        context = env.contexts[env.state["context"]]
        assert context in seen[-1].lower()
        seen.append(env.step(env.arms[0])[0])
    assert len({text.split(".")[-2] for text in seen[:-1]}) == 4


def test_what_is_seen_in_a_grid_is_told_from_where_one_stands():
    """A world of our own: the agent at (3, 5) faces north; x grows eastward, y southward."""
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Ball, Box, Door, Key, Wall

    env: Any = gymnasium.make("MiniGrid-Empty-8x8-v0").unwrapped
    env.reset(seed=0)
    env.grid, env.see_through_walls = Grid(8, 8), False
    env.grid.wall_rect(0, 0, 8, 8)
    env.agent_pos, env.agent_dir = (3, 5), 3
    env.grid.set(3, 3, Ball("red"))
    env.grid.set(1, 4, Key("blue"))
    env.grid.set(4, 5, Box("grey"))
    env.grid.set(5, 3, Door("yellow", is_locked=True))
    env.grid.set(3, 6, Ball("green"))  # behind
    assert describe(env) == (
        "You see a grey box 1 step to the right. You see a red ball 2 steps ahead. You see a blue key 1 step ahead and "
        "2 steps to the left. You see a locked yellow door 2 steps ahead and 2 steps to the right. "
        "There is a wall 5 steps ahead. There is a wall 3 steps to the left."
    )
    env.agent_dir, env.carrying = 1, Key("purple")  # south: left and right change sides
    assert describe(env) == (
        "You see a grey box 1 step to the left. You see a green ball 1 step ahead. There is a wall 2 steps ahead. "
        "There is a wall 3 steps to the right. You carry a purple key."
    )
    env.agent_dir, env.carrying = 3, None
    for x in range(1, 7):
        env.grid.set(x, 4, Wall())
    assert "ball" not in describe(env) and "There is a wall 1 step ahead." in describe(env)


def test_a_mission_is_rewarded_as_babyai_does():
    env = make_text("babyai:GoToObj")
    env.reset(seed=0)
    while not (over := any((step := env.step(env.expert()))[2:4])):
        assert step[1] == 0
    assert over and env.total == pytest.approx(1 - 0.9 * env.steps / env.state.env.max_steps)


def test_the_bot_is_told_of_steps_that_it_was_not_asked_about():
    env, rng, wins = make_text("babyai:GoToSeqS5R2"), np.random.default_rng(0), 0
    for seed in range(8):
        env.reset(seed=seed)
        over = False
        while not over:
            chance = env.steps and rng.random() < 0.2
            *_, terminated, truncated, info = env.step("turn right" if chance else env.expert())
            over = terminated or truncated
        wins += info["success"]
    assert wins == 8


def test_a_bot_that_gives_up_turns_and_no_level_prints(capfd):
    env = make_text("babyai:KeyInBox?limit=40")
    env.reset(seed=0)
    over = False
    while not over:
        action = env.expert()
        *_, terminated, over, _ = env.step(action)
        over = over or terminated
    assert action == "turn left" and capfd.readouterr().out == ""


@textworld
def test_games_are_made_once_and_held_out_games_differ(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    env = make_text("textworld:treasure?level=1")
    texts = {env.reset(options={"task": task})[0] for task in ("train-0", "test-0", "train-0")}
    made = sorted((tmp_path / "textworld").iterdir())
    assert len(made) == len(texts) == 2
    game = made[0] / "game.z8"
    stamp = game.stat().st_mtime_ns
    make_text("textworld:treasure?level=1&limit=9").reset(options={"task": "train-0"})
    assert sorted((tmp_path / "textworld").iterdir()) == made and game.stat().st_mtime_ns == stamp
    assert all("\n>" not in text and "$$" not in text for text in texts), "neither prompt nor banner"


LISTED = [spec for says in ENVIRONMENTS.values() for spec in re.findall(r"\b\w+:\w*", says.partition(": ")[2])]


@pytest.mark.parametrize("spec", [pytest.param(s, marks=[textworld] * s.startswith("textworld")) for s in LISTED])
def test_every_environment_that_is_listed_can_be_made(spec: str):
    assert make_text(spec).tasks("test")


def test_the_python_of_the_guide_works(capsys):
    page = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")
    (code,) = (block for block in blocks(page) if block.language == "python" and not block.title)
    names: dict[str, Any] = {}
    exec(code.text, names)
    assert "go " in capsys.readouterr().out and names["env"].steps == 0
