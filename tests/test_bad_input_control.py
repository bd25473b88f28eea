"""A user who gets everything about policies that act wrong: each mistake is told once, and nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from guerdon.cli import main
from guerdon.control.networks import DeterministicActor, initialise
from guerdon.control.policy import ControlPolicy
from guerdon.control.spaces import Spec

SMALL = ["--hidden", "4", "--eval-episodes", "1"]
BC = ["train", "bc", *SMALL, "--max-updates", "2"]
DQN = ["train", "dqn", *SMALL, "--max-samples", "20", "--learning-starts", "4"]
COLLECT = ["collect", "--env", "CartPole-v1", "--episodes", "1", "--out", "collected"]
SEEN = {
    "Graph-v0": spaces.Graph(spaces.Box(-1, 1, (2,)), spaces.Discrete(3)),
    "Words-v0": spaces.Text(10),
    "Sequence-v0": spaces.Sequence(spaces.Box(-1, 1, (2,))),
}


class Odd(gymnasium.Env):
    def __init__(self, seen: spaces.Space, taken: spaces.Space | None = None) -> None:
        self.observation_space = seen
        self.action_space = taken or spaces.Discrete(2)


@pytest.fixture(scope="module", autouse=True)
def odd_environments():
    vector = spaces.Box(-1, 1, (2,), np.float32)
    given = {name: {"seen": seen} for name, seen in SEEN.items()} | {
        "Many-v0": {"seen": vector, "taken": spaces.MultiDiscrete([2, 3])},
        "Boundless-v0": {"seen": vector, "taken": spaces.Box(-np.inf, np.inf, (1,), np.float32)},
    }
    for name, kwargs in given.items():
        gymnasium.register(f"Odd{name}", entry_point=Odd, kwargs=kwargs)
    yield
    for name in given:
        del gymnasium.registry[f"Odd{name}"]


def arrays(**other: np.ndarray | None) -> dict[str, np.ndarray]:
    rng, rows = np.random.default_rng(0), 60
    given = {
        "observations": rng.normal(size=(rows, 4)).astype(np.float32),
        "actions": rng.integers(0, 2, rows),
        "rewards": np.ones(rows, np.float32),
        "next_observations": rng.normal(size=(rows, 4)).astype(np.float32),
        "terminals": np.arange(rows) % 10 == 9,
        "timeouts": np.zeros(rows, bool),
        **other,
    }
    return {name: array for name, array in given.items() if array is not None}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with good data, where every command runs."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"COLUMNS": "100", "MINARI_DATASETS_PATH": str(tmp_path / "minari")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MINARI_REMOTE", "nowhere://at-all")
    np.savez("good.npz", **arrays())
    return tmp_path


@pytest.fixture
def told(capsys, here: Path) -> Callable[..., str]:
    """The one message of a command that is refused, and so leaves nothing behind."""

    def run(*argv: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
        code = main(argv)
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        assert err.startswith("guerdon: ") and err.count("guerdon: ") == 1 and err.count("\n") == 1
        assert {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()} == before
        assert not Path("run").exists()
        return err.removeprefix("guerdon: ")

    return run


# Environments


@pytest.mark.parametrize(
    ("id", "meant"), [("CartPol-v1", "CartPole-v1"), ("CartPole-v9", "CartPole-v1"), ("Pendulun-v1", "Pendulum-v1")]
)
def test_an_unknown_environment(told, id, meant):
    commands = (DQN, ["compare", "dqn"], ["evaluate", "random"], ["collect", "--out", "collected"])
    for command in (*commands, [*BC, "--data", "good.npz"]):
        said = told(*command, "--env", id)
        assert id in said and meant in said.replace(id, "")


@pytest.mark.parametrize("name", SEEN)
def test_observations_that_no_network_fits(told, name):
    for command in (DQN, ["compare", "dqn"], ["collect", "--out", "collected"], ["evaluate", "random"]):
        said = told(*command, "--env", f"Odd{name}")
        assert said.startswith(f"Odd{name}: no network fits the observations {SEEN[name]}. Those of Box, ")
        assert said.endswith("wrap the environment.\n")


def test_actions_that_no_policy_fits(told):
    assert "OddMany-v0: no policy fits the actions MultiDiscrete([2 3])" in told(*DQN, "--env", "OddMany-v0")
    assert "OddBoundless-v0: the actions Box" in told("train", "sac", "--env", "OddBoundless-v0")


def test_methods_for_other_actions(told):
    said = told(*DQN, "--env", "Pendulum-v1")
    assert said.startswith("dqn acts with discrete actions, and those of Pendulum-v1 are continuous. Methods for")
    assert "sac" in said and "dqn" not in said.partition("Methods for")[2]
    assert "td3-bc acts with continuous actions, and those of good.npz are discrete" in told(
        "train", "td3-bc", *SMALL, "--data", "good.npz"
    )
    # A comparison tells it before any trial is started.
    assert "sac acts with continuous actions" in told("compare", "dqn", "sac", "--env", "CartPole-v1")
    assert not Path("comparison").exists()


# Data


DATA = {
    "nan": (
        {"rewards": np.where(np.arange(60) == 23, np.nan, 1.0)},
        "'rewards' is nan at row 23 (episode 2, step 3), and 1 of 60 rows of it are not finite",
    ),
    "infinite": (
        {"observations": np.where(np.arange(240).reshape(60, 4) == 42, np.inf, 0.0)},
        "'observations'[2] is inf at row 10 (episode 1, step 0)",
    ),
    "truncated": ({"timeouts": None, "next_observations": None}, "a missing truncated field"),
    "dones": ({"terminals": None, "timeouts": None, "dones": np.ones(60, bool)}, "'dones' does not say whether"),
    "lengths": ({"rewards": np.ones(59)}, "arrays of different numbers of rows"),
    "negative": ({"actions": np.full(60, -1)}, "'actions' is -1 at row 0"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_learned_from(told, name):
    changed, message = DATA[name]
    np.savez("bad.npz", **arrays(**changed))
    for command in (BC, ["compare", "bc"]):
        assert told(*command, "--data", "bad.npz", "--env", "CartPole-v1").startswith("bad.npz: ")
    assert message in told(*BC, "--data", "bad.npz")
    if name not in ("nan", "infinite"):  # which inspect is there to find
        assert message in told("inspect", "bad.npz")


def test_inspect_finds_what_is_not_finite(capsys):
    np.savez("bad.npz", **arrays(**DATA["nan"][0]))
    assert main(["inspect", "bad.npz", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "row 23 (episode 2, step 3)" in out
    assert json.loads(out)["methods"] == ["bc", "iql", "riql"]


def test_a_file_that_is_not_there_or_not_whole(told, here):
    assert "goods.npz: no such file. Did you mean 'good.npz'?" in told(*BC, "--data", "goods.npz")
    whole = (here / "good.npz").read_bytes()
    (here / "torn.npz").write_bytes(whole[: len(whole) // 2])
    assert told(*BC, "--data", "torn.npz").startswith("torn.npz: ")
    assert told(*BC, "--data", "minari:none/such-v0").startswith("minari:none/such-v0: not in the local Minari")


def test_data_of_another_environment(told):
    said = "observation (4,) in the data and (2,) there"
    for command in (BC, ["compare", "bc"]):
        assert said in told(*command, "--data", "good.npz", "--env", "MountainCar-v0")
    np.savez("three.npz", **arrays(actions=np.arange(60) % 3))
    said = told(*BC, "--data", "three.npz", "--env", "CartPole-v1")
    assert "action 2 in the data and 2 actions there" in said
    assert "discrete True in the data and False there" in told(*BC, "--data", "good.npz", "--env", "Pendulum-v1")


def test_the_wrong_source(told):
    assert told(*BC[:-2], "--env", "CartPole-v1").startswith("bc learns from logged transitions: give data")
    assert told(*DQN[:-4], "--data", "good.npz").startswith("dqn learns in an environment: give env instead of data")
    assert told("train", "bc").startswith("nothing to learn from is given: give data (transitions), or env")
    assert "dqn learns in an environment" in told("compare", "bc", "dqn", "--data", "good.npz", "--env", "CartPole-v1")
    assert "give --env" in told("compare", "bc", "--data", "good.npz")


@pytest.mark.parametrize(
    ("corruption", "message"),
    [
        ("rewrad:0.3", "nothing called 'rewrad' can be corrupted. Did you mean 'reward'?"),
        ("reward:1.5", "rate is 1.5: it must be at least 0 and at most 1"),
        ("reward:0.3:0", "range is 0.0"),
        ("reward:much", "is not of the form ELEMENT[:RATE[:RANGE]][:adversarial]"),
        ("reward:0.3:1:adversrial", "Did you mean 'adversarial'?"),
        ("action:0.3:1:adversarial", "follows gradients over actions, and these are discrete"),
    ],
)
def test_bad_corruptions(told, corruption, message):
    for command in (BC, ["compare", "bc"]):
        assert message in told(*command, "--data", "good.npz", "--env", "CartPole-v1", "--corrupt", corruption)
    assert "corrupt damages data, and none is given" in told(*DQN, "--env", "CartPole-v1", "--corrupt", corruption)


# Budgets, comparisons, policies


def test_budgets_in_the_wrong_unit(told):
    said = "with data the budget is counted in updates"
    assert said in told(*BC[:-2], "--data", "good.npz", "--max-samples", "10")
    assert said in told("compare", "bc", "--data", "good.npz", "--env", "CartPole-v1", "--budget-samples", "10")
    said = "without data the budget is counted in environment steps"
    assert said in told(*DQN, "--env", "CartPole-v1", "--max-updates", "10")
    assert said in told("compare", "dqn", "--env", "CartPole-v1", "--budget-updates", "10")
    said = told(*DQN[:-1], "20", "--env", "CartPole-v1")
    assert said.startswith("learning_starts is 20, and the run ends after 20 steps: nothing would be learned")
    assert "seeds is 0" in told(*BC, "--data", "good.npz", "--seeds", "0")


def test_unlike_policies_cannot_be_compared(told):
    said = told("compare", "bc", "dpo", "--data", "good.npz")
    assert "bc a control policy and dpo a language policy" in said and "only methods for one kind" in said


def test_collect(told, here):
    said = "collect: there is no policy 'rnadom': it is random, a run directory, or python:module.function."
    assert told(*COLLECT, "--policy", "rnadom").strip() == said
    assert "noise is 2.0" in told(*COLLECT, "--noise", "2")
    assert "episodes is 0" in told("collect", "--env", "CartPole-v1", "--episodes", "0", "--out", "collected")
    assert "minari:collected" in told(*COLLECT[:-1], "minari:collected")  # without a version
    (here / "run-of-pendulum").mkdir()
    pendulum().save(here / "run-of-pendulum")
    assert "is for Pendulum-v1, not for this one" in told(*COLLECT, "--policy", "run-of-pendulum")


def pendulum() -> ControlPolicy:
    spec = Spec((3,), False, False, 1, (-2.0,), (2.0,))
    actor = DeterministicActor(1, spec, (4,))
    initialise(actor, [0], "torch", name="actor")
    return ControlPolicy(actor, spec, None, "Pendulum-v1", [0])


def test_a_policy_judged_where_it_cannot_act(told, here, capsys):
    pendulum().save(here / "policy")
    said = told("evaluate", "policy", "--env", "CartPole-v1")
    assert said.startswith("the policy does not fit CartPole-v1: it was trained with observations of shape (3,), and")
    assert "nothing holds no control policy" in told("evaluate", "nothing", "--env", "CartPole-v1")
    assert main(["train", "bc", *SMALL, "--max-updates", "1", "--data", "good.npz", "--out", "trained"]) == 0
    capsys.readouterr()
    assert "does not fit Pendulum-v1" in told("evaluate", "trained", "--env", "Pendulum-v1")
    assert "nothing says which environment the policy is judged in: give --env." in told("evaluate", "trained")
