"""Control runs: what they save comes back to the last bit, and what they report is what happened."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import guerdon
from guerdon.control.environments import Environments
from guerdon.control.policy import ControlPolicy
from guerdon.control.replay import Batch
from guerdon.control.transitions import Transitions
from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.methods.base import check_options, get_method
from guerdon.methods.offline.bc import BC
from guerdon.methods.online.dqn import DQN
from guerdon.training.config import ControlTraining
from guerdon.training.control import (
    ControlRun,
    Episodes,
    Means,
    check_material,
    load_state,
    material,
    save_state,
)
from guerdon.training.distributed import Distribution
from guerdon.training.rundir import RunDir
from training import control_chaos
from training.control_chaos import train, write_data

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def noise(tmp_path: Path) -> str:
    write_data(tmp_path / "pendulum.npz")
    return str(tmp_path / "pendulum.npz")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """An uninterrupted run of each kind."""
    directory = tmp_path_factory.mktemp("whole")
    write_data(directory / "pendulum.npz")
    return {kind: train(kind, directory / kind).path for kind in control_chaos.KINDS}


def rows(path: Path, seed: int | None = None) -> list[dict[str, str]]:
    """Rows without `time/`, as text so that NaN equals NaN."""
    found = RunDir.open(path).metrics(seed)
    return [{k: repr(v) for k, v in row.items() if not k.startswith("time/")} for row in found]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "policy.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def prepared(name: str, directory: Path, training: dict, **options) -> tuple[object, ControlRun]:
    method, config = get_method(name)(**options), ControlTraining(**training)
    check_options(method, config)
    run = ControlRun(method, config, Distribution(), directory)
    method.setup(run)
    return method, run


# What is reported


def test_means_are_over_the_updates_that_told_a_metric():
    means = Means()
    means.add({"loss/q": torch.tensor([1.0, 10.0]), "value/mean": torch.tensor([3.0, math.nan])})
    means.add({"loss/q": torch.tensor([2.0, 30.0], requires_grad=True)})
    means.add({"loss/q": torch.tensor([6.0, 20.0])})
    found = means.take()
    assert found["loss/q"] == [3.0, 20.0]
    assert found["value/mean"][0] == 3.0 and math.isnan(found["value/mean"][1])
    assert means.take() == {}
    means.add({"loss/q": torch.tensor([5, 7])})
    assert means.take() == {"loss/q": [5.0, 7.0]}


def test_episodes_are_those_since_they_were_last_asked_for():
    episodes = Episodes(2)
    episodes.add([(1, 0, 5.0, 10), (1, 2, 7.0, 30)])
    again = Episodes(2)
    again.load_state_dict(episodes.state_dict())
    for each in (episodes, again):
        found = each.take()
        assert found["episode/count"] == [0.0, 2.0]
        assert math.isnan(found["episode/return"][0]) and found["episode/return"][1] == 6.0
        assert math.isnan(found["episode/length"][0]) and found["episode/length"][1] == 20.0
        assert each.take()["episode/count"] == [0.0, 0.0]


def test_rows_hold_a_number_for_each_seed(whole):
    run = RunDir.open(whole["online"])
    steps = [row["step"] for row in run.metrics()]
    marks = {0, 240} | {mark for every in (35, 40, 120) for mark in range(every, 241, every)}
    assert steps == sorted(marks)
    assert [row["step"] for row in run.metrics() if "eval/score" in row] == [0, 120, 240]
    last = [run.metrics(seed)[-1] for seed in (0, 1)]
    mean = run.metrics()[-1]
    assert mean["loss/q"] == pytest.approx((last[0]["loss/q"] + last[1]["loss/q"]) / 2)
    assert last[0]["loss/q"] != last[1]["loss/q"]
    assert mean["progress/samples"] == 240 and mean["progress/done"] == 1.0 and mean["time/steps_per_second"] > 0
    assert all("loss/q" not in row for row in run.metrics() if row["step"] <= 50)  # nothing was learned yet
    # All steps but those of the episodes under way at the end are in some row.
    for seed in (0, 1):
        ended = [row for row in run.metrics(seed) if row.get("episode/count")]
        taken = sum(row["episode/count"] * row["episode/length"] for row in ended)
        assert 150 < taken <= 240 and taken == pytest.approx(round(taken))
        assert all(row["episode/return"] == row["episode/length"] for row in ended)  # CartPole pays 1 for each step


def test_snapshots_are_the_policies_on_the_way(whole):
    run = RunDir.open(whole["online"])
    snapshots = sorted((run.path / "snapshots").iterdir())
    assert [path.name for path in snapshots] == ["step-00000120", "step-00000240"]
    assert same_weights(snapshots[1], run.path / "policy") and not same_weights(snapshots[0], run.path / "policy")
    assert ControlPolicy.load(snapshots[0]).seeds == [3, 4]


def test_a_budget_is_met_exactly_unless_copies_step_together(tmp_path):
    options = {"env": "CartPole-v1", "max_samples": 50, "log_every": 20, "eval_episodes": 1, "hidden": (4,)}
    run = guerdon.train("ppo-control", **options, copies=4, rollout=4, batch_size=8, out=str(tmp_path / "run"))
    assert [row["step"] for row in run.metrics()] == [20, 40, 52]  # the multiples of 4 from each mark on
    assert run.metrics()[-1]["progress/samples"] == 52


def test_stretches_end_at_every_mark(noise, tmp_path):
    training = {"data": noise, "log_every": 10, "checkpoint_every": 14, "snapshot_every": 25}
    _, run = prepared("bc", tmp_path, training)
    stops = []
    for stop in run.stretches(40):
        assert run.cursor.done == stop / 40
        stops.append(stop)
        run.cursor.step = stop
    assert stops == [10, 14, 20, 25, 28, 30, 40]


# States


def test_nested_state_comes_back(tmp_path):
    tree = {
        "module": {"0.weight": torch.randn(2, 3, dtype=torch.bfloat16), "empty": torch.zeros(0, 4)},
        "arrays": [np.arange(6).reshape(2, 3).T, np.array([True, False]), np.float32(0.1)],
        "plain": {"none": None, "nan": math.nan, "text": "tensor", "pair": (1, 2.5)},
        "big": 2**63 + 1,
    }
    save_state(tree, tmp_path)
    found = load_state(tmp_path)
    assert torch.equal(found["module"]["0.weight"], tree["module"]["0.weight"])
    assert found["module"]["empty"].shape == (0, 4)
    assert found["arrays"][0].tolist() == tree["arrays"][0].tolist()
    assert found["arrays"][1].dtype == torch.bool and found["arrays"][2] == float(np.float32(0.1))
    assert found["plain"]["none"] is None and math.isnan(found["plain"]["nan"])
    assert found["plain"]["text"] == "tensor" and found["plain"]["pair"] == [1, 2.5] and found["big"] == 2**63 + 1


@pytest.mark.parametrize("kind", list(control_chaos.KINDS))
def test_killed_at_random_moments_it_ends_in_the_same_bits(tmp_path, whole, kind):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(control_chaos.__file__)), kind, str(tmp_path / "killed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed"
    assert rows(whole[kind]) == rows(killed) and rows(whole[kind], 1) == rows(killed, 1)
    assert same_weights(whole[kind] / "policy", killed / "policy")
    for snapshot in (whole[kind] / "snapshots").iterdir():
        assert same_weights(snapshot, killed / "snapshots" / snapshot.name)
    assert (whole[kind] / "evaluation.json").read_text() == (killed / "evaluation.json").read_text()


class _Death(BaseException):
    pass


def dead(monkeypatch, path: Path) -> None:
    """A DQN run that died after its checkpoint at step 120."""
    real = DQN.observe

    def dying(self, run, *args):
        if run.cursor.step == 130:
            raise _Death
        return real(self, run, *args)

    with monkeypatch.context() as patch, pytest.raises(_Death):
        patch.setattr(DQN, "observe", dying)
        train("online", path)


@pytest.mark.parametrize("forgotten", ["streams", "envs", "q", "target", "optimizer", "replay", None])
def test_every_part_of_a_checkpoint_matters(tmp_path, whole, monkeypatch, forgotten):
    dead(monkeypatch, tmp_path / "run")
    assert RunDir.open(tmp_path / "run").latest_checkpoint().name == "step-00000120"
    real = ControlRun.restore

    def forgetful(self, directory):
        parts = dict(self.parts)
        if forgotten:
            del self.parts[forgotten]
        real(self, directory)
        self.parts = parts
        if forgotten == "envs":
            self.envs.reset()

    monkeypatch.setattr(ControlRun, "restore", forgetful)
    train("online", tmp_path / "run")
    same = same_weights(whole["online"] / "policy", tmp_path / "run" / "policy")
    assert same == (forgotten is None)
    assert (rows(whole["online"]) == rows(tmp_path / "run")) == (forgotten is None)


def test_environments_that_cannot_be_restored_begin_anew_and_say_so_once(tmp_path, monkeypatch):
    dead(monkeypatch, tmp_path / "run")
    real, notes, cuts = Environments.load_state_dict, [], []

    def elsewhere(self, state):
        self.notes.append("policies do not see the text 'mission'")  # as where it was made
        real(self, {**state, "obs": state["obs"] + 1})

    def noted(self, directory, restore=ControlRun.restore):
        self.notes.append("policies do not see the text 'mission'")
        restore(self, directory)
        notes.extend(self.notes)

    replay = DQN.interrupt
    monkeypatch.setattr(Environments, "load_state_dict", elsewhere)
    monkeypatch.setattr(ControlRun, "restore", noted)
    monkeypatch.setattr(DQN, "interrupt", lambda self: (cuts.append(len(cuts)), replay(self)))
    run = train("online", tmp_path / "run")
    assert run.status["state"] == "done" and run.metrics()[-1]["step"] == 240
    assert len(notes) == 2 and "2 of 2 copies began a new one" in notes[1]
    assert cuts == [0]


def test_a_loss_that_is_not_finite_saves_the_batch(noise, tmp_path, monkeypatch):
    real = BC.update

    def spoiled(self, batch):
        metrics = real(self, batch)
        return {"loss/policy": metrics["loss/policy"] + torch.tensor([0.0, math.nan])}

    monkeypatch.setattr(BC, "update", spoiled)
    options = {"data": noise, "seeds": 2, "batch_size": 4, "hidden": (4,), "log_every": 5, "max_updates": 20}
    with pytest.raises(GuerdonError, match=r"step 5 of .*: loss/policy is nan\. The batch is saved in .*step-00000005"):
        guerdon.train("bc", **options, out=str(tmp_path / "run"))
    saved = load_state(tmp_path / "run" / "failed" / "step-00000005-rank-0")
    assert saved["obs"].shape == (2, 4, 3) and saved["terminated"].dtype == torch.bool
    assert {"obs", "action", "reward", "next_obs", "terminated", "truncated"} <= set(saved) <= set(vars_of(Batch))
    assert RunDir.open(tmp_path / "run").status["state"] == "failed"


def vars_of(kind: type) -> list[str]:
    return list(kind.__dataclass_fields__)


# Material


def test_material_of_data(noise):
    data, masks, env, notes = material(ControlTraining(data=noise, env="Pendulum-v1", corrupt=("reward:0.5", "obs:0")))
    assert env == data.env == "Pendulum-v1" and data.spec.low == (-2.0,)
    clean = np.load(noise)
    assert np.array_equal(data.rewards != clean["rewards"], masks["rewards"])
    assert np.array_equal(data.observations, clean["observations"]) and not masks["observations"].any()
    hit = int(masks["rewards"].sum())
    assert 60 < hit < 140
    assert notes[-2:] == [f"rewards: {hit} of 200 rows damaged", "observations: 0 of 200 rows damaged"]


def test_material_without_an_environment_says_so(noise):
    data, _, env, notes = material(ControlTraining(data=noise))
    assert env is None and data.env is None
    assert notes[-1].endswith("nothing is evaluated without --env.")
    with pytest.raises(ConfigError, match=r"does not say where its policies can be judged: give --env"):
        check_material(ControlTraining(data=noise), [BC()])


def test_material_of_an_environment_is_its_name():
    assert material(ControlTraining(env="CartPole-v1")) == (None, {}, "CartPole-v1", [])
    check_material(ControlTraining(env="CartPole-v1"), [DQN()])
    with pytest.raises(ConfigError, match=r"dqn acts with discrete actions, and those of Pendulum-v1 are continuous"):
        check_material(ControlTraining(env="Pendulum-v1"), [DQN()])
    with pytest.raises(ConfigError, match="there is no environment 'CartPol-v1'"):
        check_material(ControlTraining(env="CartPol-v1"), [DQN()])


def test_data_of_another_environment_is_refused(noise):
    with pytest.raises(DataError, match=r"observation \(3,\) in the data and \(4,\) there"):
        material(ControlTraining(data=noise, env="CartPole-v1"))


def test_control_trains_in_one_process(noise, tmp_path):
    with pytest.raises(ConfigError, match="in one process, all seeds at once"):
        ControlRun(BC(), ControlTraining(data=noise), Distribution(rank=0, world=2), tmp_path)


# Runs


def test_a_seed_is_the_same_alone_and_beside_others(tmp_path, whole):
    train("online", tmp_path / "alone", seeds=1, seed=4)
    both, alone = weights(whole["online"] / "policy"), weights(tmp_path / "alone" / "policy")
    for name, values in alone.items():
        torch.testing.assert_close(both[name][1:], values, atol=1e-5, rtol=1e-4)
    names = ("episode/return", "eval/return")
    first, second = RunDir.open(whole["online"]).metrics(1), RunDir.open(tmp_path / "alone").metrics()
    assert [[repr(row.get(name)) for name in names] for row in first] == [
        [repr(row.get(name)) for name in names] for row in second
    ]


@pytest.mark.parametrize(
    ("env", "package", "shape"),
    [
        ("MiniGrid-Empty-5x5-v0", "minigrid", None),
        ("MinAtar/Breakout-v1", "minatar", (4, 10, 10)),
        ("ALE/Pong-v5", "ale_py", (4, 84, 84)),
    ],
)
def test_online_methods_run_on_grids_and_images(tmp_path, monkeypatch, env, package, shape):
    pytest.importorskip(package)
    training = {"env": env, "max_samples": 200, "log_every": 100, "seeds": 2}
    options = {"learning_starts": 120, "train_every": 16, "hidden": (16,), "batch_size": 4, "buffer_size": 100}
    method, run = prepared("dqn", tmp_path, training, **options)
    assert run.spec.image == (shape is not None) and shape in (None, run.spec.observation)
    early, late = list(method.learn(run))
    assert "loss/q" not in early and np.isfinite(late["loss/q"]).all()
    assert run.cursor.samples == 200
    assert run.policy.act(run.envs.obs).shape == (2, 1)
    assert ("policies do not see the text 'mission'" in " ".join(run.notes)) == (package == "minigrid")


def test_adversarial_damage_lowers_what_a_run_took_its_data_to_be_worth(noise, tmp_path):
    options = {"data": noise, "env": "Pendulum-v1", "hidden": (8,), "max_updates": 30, "eval_episodes": 1}
    attacked = guerdon.train("td3-bc", **options, out=str(tmp_path / "attacked")).path
    values, acts = ControlPolicy.load(attacked / "policy").attacked()

    def worth(data: Transitions) -> tuple[float, float]:
        seen, following, chosen = map(torch.as_tensor, (data.observations, data.next_observations, data.actions))
        with torch.no_grad():
            return float(values(seen, chosen).mean()), float(values(following, acts(following)).mean())

    damaged = [
        material(ControlTraining(data=noise, env="Pendulum-v1", corrupt=corrupt, corrupt_against=against))[0]
        for corrupt, against in (
            ((), None),
            (("obs:1", "dynamics:1"), None),
            (("obs:1:1:adversarial", "dynamics:1:1:adversarial"), str(attacked)),
        )
    ]
    clean, random, adversarial = map(worth, damaged)
    assert all(a < min(c, r) - 0.05 * abs(c) for a, c, r in zip(adversarial, clean, random, strict=True))
    with pytest.raises(ConfigError, match="has no critic"):
        imitated = guerdon.train("bc", **options, out=str(tmp_path / "bc")).path
        material(ControlTraining(data=noise, corrupt=("obs:1:1:adversarial",), corrupt_against=str(imitated)))
