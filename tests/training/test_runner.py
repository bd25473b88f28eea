from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from guerdon.errors import ConfigError, GuerdonError
from guerdon.training.config import LanguageTraining, Training
from guerdon.training.progress import Silent
from guerdon.training.rundir import RunDir
from guerdon.training.runner import Stopped, rng_state, set_rng_state
from training import chaos, problem
from training.problem import Fit, Problem, train

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
METHOD = Fit()


def rows(path: Path) -> list[dict[str, str]]:
    """Rows without `time/`, as text so that NaN equals NaN."""
    kept = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in RunDir.open(path).metrics()]
    return [{k: repr(v) for k, v in row.items()} for row in kept]


def policy(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "policy" / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    assert rows(a) == rows(b)
    first, second = policy(a), policy(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns_and_leaves_one_row_per_step(tmp_path):
    run = train(tmp_path / "run", Fit(rounds=40), {"eval_every": 50}, dtype=torch.float32)
    found = RunDir.open(tmp_path / "run")
    metrics = found.metrics()
    assert [row["step"] for row in metrics] == list(range(201))
    assert metrics[0].keys() == {"step", "eval/score", "time/evaluation"}
    assert [row["step"] for row in metrics if "eval/score" in row] == [0, 50, 100, 150, 200]
    assert metrics[-1]["eval/score"] > 0.5 * metrics[0]["eval/score"]  # minus a squared error
    assert metrics[-1]["progress/samples"] == run.cursor.samples == 40 * 16
    assert metrics[-1]["progress/tokens"] == 200 * 8
    assert metrics[-1]["time/tokens_per_second"] == pytest.approx(8 / metrics[-1]["time/step"])
    assert metrics[1]["loss/total"] > 0 and np.isnan(metrics[1]["policy/odd"])
    assert found.status == {"state": "done"}
    assert not found.checkpoints()  # only a run that is not done needs them
    assert all(torch.equal(v, run.model.state_dict()[k]) for k, v in policy(tmp_path / "run").items())


def test_killed_at_random_moments_it_ends_in_the_same_bits(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(chaos.__file__)), str(tmp_path / "killed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    train(tmp_path / "whole", chaos.METHOD, chaos.OPTIONS)
    assert_same(tmp_path / "whole", tmp_path / "killed")


class _Death(BaseException):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("when", ["update", "evaluate", "save", "between evaluation and end", "export"])
def test_death_at_any_place_changes_nothing(tmp_path, monkeypatch, when, dtype):
    options = {"checkpoint_every": 5, "eval_every": 4}
    train(tmp_path / "whole", METHOD, options, dtype)
    name, at = {"between evaluation and end": ("save", 30)}.get(when, (when, 30 if when == "export" else 12))
    if when == "save":
        at = 15
    real = getattr(Problem, name)

    def dying(self, *args):
        if self.cursor.step == at:
            if when == "save":
                (args[0] / "half").write_bytes(b"half")
            raise _Death
        return real(self, *args)

    monkeypatch.setattr(Problem, name, dying)
    with pytest.raises(_Death):
        train(tmp_path / "dead", METHOD, options, dtype)
    assert RunDir.open(tmp_path / "dead").status["state"] == "failed"
    monkeypatch.setattr(Problem, name, real)
    train(tmp_path / "dead", METHOD, options, dtype)
    assert_same(tmp_path / "whole", tmp_path / "dead")


def test_random_states_are_part_of_a_checkpoint(tmp_path, monkeypatch):
    # The guard of the tests above: without the random states, a resumed run ends elsewhere.
    options = {"checkpoint_every": 5}
    train(tmp_path / "whole", METHOD, options)
    with pytest.raises(GuerdonError):
        train(tmp_path / "run", Fit(spoil_at=13), options)
    monkeypatch.setattr("guerdon.training.runner.set_rng_state", lambda state: None)
    train(tmp_path / "run", METHOD, options)
    assert rows(tmp_path / "run") != rows(tmp_path / "whole")


def test_evaluation_never_changes_what_is_learned(tmp_path):
    train(tmp_path / "often", METHOD, {"eval_every": 1})
    train(tmp_path / "once", METHOD, {})
    assert torch.equal(policy(tmp_path / "often")["0.weight"], policy(tmp_path / "once")["0.weight"])
    assert [row["step"] for row in RunDir.open(tmp_path / "once").metrics() if "eval/score" in row] == [30]


class _Interrupting(Fit):
    def learn(self, run):
        for metrics in super().learn(run):
            if run.cursor.step + 1 == 7:
                os.kill(os.getpid(), signal.SIGINT)
            yield metrics


def test_an_interrupt_finishes_the_step_and_leaves_a_checkpoint(tmp_path):
    train(tmp_path / "whole", METHOD, {})
    with pytest.raises(Stopped, match=r"stopped at step 7\. `guerdon resume"):
        train(tmp_path / "run", _Interrupting(), {})
    found = RunDir.open(tmp_path / "run")
    assert found.status == {"state": "stopped"}
    assert found.latest_checkpoint().name == "step-00000007"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(tmp_path / "run", METHOD, {})
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_second_interrupt_stops_within_the_step(tmp_path, monkeypatch):
    real = Problem.update

    def interrupted(self, *args):
        if self.cursor.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(Problem, "update", interrupted)
    with pytest.raises(Stopped, match="within a step"):
        train(tmp_path / "run", METHOD, {"checkpoint_every": 5})
    found = RunDir.open(tmp_path / "run")
    assert found.status == {"state": "stopped"}
    assert found.latest_checkpoint().name == "step-00000005"


def test_a_loss_that_is_not_finite_saves_the_batch(tmp_path):
    with pytest.raises(GuerdonError, match=r"step 13 of .*the loss is nan\. The batch is saved in .*rank-0") as told:
        train(tmp_path / "run", Fit(spoil_at=13), {"checkpoint_every": 5})
    found = RunDir.open(tmp_path / "run")
    saved = load_file(found.path / "failed" / "step-00000013-rank-0" / "batch.safetensors")["batch"]
    assert saved.shape == (8, 8) and saved.isnan().sum() == 1
    assert found.status == {"state": "failed", "error": f"GuerdonError: {told.value}"}
    assert found.metrics()[-1]["step"] == 12


@pytest.mark.parametrize(
    ("training", "mend"),
    [
        (Training, "Start again with a smaller --batch-size"),
        (lambda **how: LanguageTraining(model="m", **how), r"Lower max_tokens \(now 4096\) in .*config"),
    ],
)
def test_too_little_memory(tmp_path, monkeypatch, training, mend):
    monkeypatch.setattr(problem, "Training", training)
    with pytest.raises(GuerdonError, match=rf"step 4 of .*can't allocate memory.*\. {mend}"):
        train(tmp_path / "run", Fit(hungry_at=4), {"checkpoint_every": 2})
    assert RunDir.open(tmp_path / "run").latest_checkpoint().name == "step-00000002"


def test_budgets(tmp_path):
    assert train(tmp_path / "updates", METHOD, {"max_updates": 13}).cursor.step == 13
    assert RunDir.open(tmp_path / "updates").metrics()[-1]["progress/done"] == 1
    # What was sampled is learned from to its end: two rounds of 16 samples, five updates each.
    run = train(tmp_path / "samples", METHOD, {"max_samples": 20})
    assert (run.cursor.samples, run.cursor.step) == (32, 10)
    last = RunDir.open(tmp_path / "samples").metrics()[-1]
    assert last["step"] == 10 and "eval/score" in last


def test_early_stop_after_evaluations_without_a_better_one(tmp_path, monkeypatch):
    scores = {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 3.0, 10: 9.0}
    monkeypatch.setattr(Problem, "evaluate", lambda self: {"eval/score": scores[self.cursor.step]})
    options = {"eval_every": 2, "patience": 3, "checkpoint_every": 1}
    assert train(tmp_path / "run", METHOD, options).cursor.step == 8
    # The best one so far is remembered by the metrics of the run: a resume in between stops at the same place.
    with pytest.raises(GuerdonError):
        train(tmp_path / "resumed", Fit(spoil_at=6), options)
    assert train(tmp_path / "resumed", METHOD, options).cursor.step == 8
    assert rows(tmp_path / "run") == rows(tmp_path / "resumed")


def test_a_run_that_is_done_is_left_alone(tmp_path):
    train(tmp_path / "run", METHOD, {})
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train(tmp_path / "run", Fit(spoil_at=1), {})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_two_processes_cannot_train_one_run(tmp_path):
    train(tmp_path / "run", METHOD, {})
    with RunDir.open(tmp_path / "run").locked(), pytest.raises(ConfigError, match="in use by another process"):
        train(tmp_path / "run", METHOD, {})


def test_full_disk_at_a_checkpoint_keeps_the_one_before(tmp_path, monkeypatch):
    options = {"checkpoint_every": 5}
    train(tmp_path / "whole", METHOD, options)
    real = Problem.save

    def full(self, directory):
        real(self, directory)
        if self.cursor.step == 10:
            with open("/dev/full", "wb") as file:
                file.write(b"x" * 100_000)

    monkeypatch.setattr(Problem, "save", full)
    with pytest.raises(GuerdonError, match=r"the disk is full: .*step-00000010 needs at least .*step-00000005.*resume"):
        train(tmp_path / "run", METHOD, options)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    assert RunDir.open(tmp_path / "run").status["state"] == "failed"
    monkeypatch.setattr(Problem, "save", real)
    train(tmp_path / "run", METHOD, options)
    assert_same(tmp_path / "whole", tmp_path / "run")


class _Leaping(Fit):
    """Moves the cursor itself, seven steps at a time, and yields a number for each of two seeds."""

    def learn(self, run):
        for metrics in super().learn(run):
            run.cursor.step += 7
            odd = float("nan") if run.cursor.step == 21 else 0.5
            yield {"loss/total": [float(metrics["loss/total"]), 1.0], "policy/odd": [odd, 2.5]}


def test_steps_that_a_method_takes_at_once(tmp_path):
    options = {"checkpoint_every": 10, "eval_every": 20, "snapshot_every": 15, "keep_checkpoints": 0}
    found: list[list[str]] = []

    class Watched(_Leaping):
        def learn(self, run):
            for metrics in super().learn(run):
                yield metrics
                found.append([path.name[-2:] for path in RunDir.open(tmp_path / "run").checkpoints()])

    train(tmp_path / "run", Watched(rounds=1, updates=6), options)
    run = RunDir.open(tmp_path / "run")
    assert [row["step"] for row in run.metrics()] == [0, 7, 14, 21, 28, 35, 42]
    assert [row["step"] for row in run.metrics() if "eval/score" in row] == [0, 21, 42]
    assert [path.name for path in sorted((run.path / "snapshots").iterdir())] == ["step-00000021", "step-00000035"]
    assert found[-2] == ["14", "21", "35"]  # the first step at or after 10, 20, 30
    each = {row["step"]: row for row in run.metrics(0)}
    mean = {row["step"]: row for row in run.metrics()}
    assert np.isnan(each[21]["policy/odd"]) and mean[21]["policy/odd"] == 2.5 and mean[28]["policy/odd"] == 1.5
    assert mean[42]["loss/total"] == pytest.approx((each[42]["loss/total"] + 1) / 2)


def test_one_seed_that_is_not_finite_stops_the_run(tmp_path):
    class Broken(_Leaping):
        def learn(self, run):
            for metrics in super().learn(run):
                yield {**metrics, "loss/q": [1.0, float("inf") if run.cursor.step == 14 else 1.0]}

    with pytest.raises(GuerdonError, match=r"step 14 of .*: loss/q is inf\. The batch is saved"):
        train(tmp_path / "run", Broken(), {})
    assert RunDir.open(tmp_path / "run").metrics()[-1]["step"] == 7


def test_snapshots_are_left_by_a_resumed_run_too(tmp_path):
    options = {"checkpoint_every": 5, "snapshot_every": 6}
    train(tmp_path / "whole", METHOD, options)
    with pytest.raises(GuerdonError):
        train(tmp_path / "run", Fit(spoil_at=14), options)
    assert [path.name for path in sorted((tmp_path / "run" / "snapshots").iterdir())] == [
        "step-00000006",
        "step-00000012",
    ]
    train(tmp_path / "run", METHOD, options)
    names = [f"step-{step:08d}" for step in (6, 12, 18, 24, 30)]
    for path in (tmp_path / "whole", tmp_path / "run"):
        assert sorted(p.name for p in (path / "snapshots").iterdir()) == names
    for name in names:
        first, second = (
            load_file(tmp_path / run / "snapshots" / name / "model.safetensors") for run in ("whole", "run")
        )
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert all(torch.equal(value, policy(tmp_path / "run")[key]) for key, value in first.items())  # of the last step


def test_notes_are_shown_once_when_it_begins(tmp_path, monkeypatch):
    class Noting(Silent):
        def __init__(self):
            self.said = []

        def begin(self, step, done):
            self.said.append(("begin", step))

        def note(self, text):
            self.said.append(text)

    progress = Noting()
    monkeypatch.setattr(Problem, "notes", ["the data is odd"])
    train(tmp_path / "run", METHOD, {"max_updates": 2}, progress=progress)
    assert progress.said == [("begin", 0), "the data is odd"]


def test_random_states_come_back():
    state = rng_state()
    drawn = (torch.rand(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)])
    set_rng_state(json.loads(json.dumps(state)))
    assert drawn == (torch.rand(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)])
