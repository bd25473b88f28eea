"""Language runs: exact under micro-batches, processes, kill -9 and resume; invariants that stop a wrong run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from guerdon.errors import DataError, InvariantError
from guerdon.methods.base import LanguageMethod, get_method
from guerdon.runs import resume, start
from guerdon.training.config import LanguageTraining
from guerdon.training.language import LanguageRun
from guerdon.training.rundir import RunDir

MODEL = "tiny:layers=2,width=32"
TASK = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
SHORT = {"rounds": 4, "prompts_per_round": 4, "group_size": 4, "max_new_tokens": 8, "lr": 1e-3, "batch_size": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    path = tmp_path / "preferences.jsonl"
    rows = [
        {"prompt": f"{a} plus {b} is ", "chosen": f"{a + b}", "rejected": f"{a * b + 1} or so"}
        for a in range(6)
        for b in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def method(name: str, **options: Any) -> LanguageMethod:
    return get_method(name)(**options)  # type: ignore[return-value]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.path / "policy" / "model.safetensors")


def rows(run: RunDir) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in run.metrics()]


def offline(out: Path, data: Path, **options: Any) -> LanguageTraining:
    return LanguageTraining(model=MODEL, data=str(data), out=str(out), checkpoint_every=2, eval_items=8, **options)


def online(out: Path, **options: Any) -> LanguageTraining:
    return LanguageTraining(model=MODEL, task=TASK, out=str(out), checkpoint_every=2, eval_items=8, **options)


def assert_close(a: RunDir, b: RunDir, tolerance: float) -> None:
    for name, weight in weights(a).items():
        torch.testing.assert_close(weight, weights(b)[name], atol=tolerance, rtol=0, msg=name)
    for ours, theirs in zip(rows(a), rows(b), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["sft", "dpo", "reward-model"])
def test_micro_batches_never_change_an_offline_run(name: str, tmp_path: Path, preferences: Path) -> None:
    options = {"batch_size": 8, "epochs": 1, "lr": 1e-3}
    whole = start(method(name, **options), offline(tmp_path / "whole", preferences))
    cut = start(method(name, **options), offline(tmp_path / "cut", preferences, max_tokens=40))
    assert_close(whole, cut, 1e-5)
    assert len(rows(whole)) == 4 and rows(whole)[-1]["loss/total"] < rows(whole)[0]["loss/total"]


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_micro_batches_never_change_an_online_run(name: str, tmp_path: Path) -> None:
    whole = start(method(name, **SHORT), online(tmp_path / "whole"))
    cut = start(method(name, **SHORT), online(tmp_path / "cut", max_tokens=30))
    assert_close(whole, cut, 1e-5)


def test_what_the_sampler_said_beside_the_policy_of_the_round(tmp_path: Path) -> None:
    weighed = start(method("grpo", **SHORT, sampler_cap=2.0), online(tmp_path / "weighed"))
    first = weighed.metrics()[0]
    assert 0 < first["policy/sampler_error"] < 1e-4 and first["policy/ratio_error"] < 1e-6
    plain = weights(start(method("grpo", **SHORT), online(tmp_path / "plain")))
    for name, weight in weights(weighed).items():
        torch.testing.assert_close(weight, plain[name], atol=1e-4, rtol=0)


def test_gradient_checkpointing_never_changes_a_run(tmp_path: Path, preferences: Path) -> None:
    plain = start(method("dpo", batch_size=8, lr=1e-3), offline(tmp_path / "plain", preferences))
    again = start(
        method("dpo", batch_size=8, lr=1e-3), offline(tmp_path / "again", preferences, gradient_checkpointing=True)
    )
    assert_close(plain, again, 1e-6)


def launch(training: LanguageTraining, name: str, options: dict[str, Any], *before: str) -> list[str]:
    code = (
        "import sys, json; from guerdon.methods.base import get_method; from guerdon.runs import start, resume; "
        "from guerdon.training.config import LanguageTraining; from guerdon.training.rundir import RunDir; import os; "
        "name, options, training = json.loads(sys.argv[1]); config = LanguageTraining(**training); "
        "resume(config.out) if os.path.exists(config.out + '/config.json') and 'WORLD_SIZE' not in os.environ "
        "else start(get_method(name)(**options), config)"
    )
    return [sys.executable, *before, "-c", code, json.dumps([name, options, vars(training)])]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_kill_and_resume_is_bit_identical(name: str, tmp_path: Path, preferences: Path) -> None:
    options = {"batch_size": 2, "lr": 1e-3} if name == "dpo" else SHORT

    def config(out: str) -> LanguageTraining:
        return offline(tmp_path / out, preferences) if name == "dpo" else online(tmp_path / out)

    whole = start(method(name, **options), config("whole"))
    last = whole.metrics()[-1]["step"]
    killed = config("killed")
    for kill_at in (3, last - 2):
        process = subprocess.Popen(launch(killed, name, options), stderr=subprocess.PIPE)
        metrics = Path(killed.out) / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait()
    assert RunDir.open(killed.out).status["state"] in ("killed", "done")
    resumed = resume(killed.out)
    assert resumed.status["state"] == "done"
    ours, theirs = weights(whole), weights(resumed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert rows(whole) == rows(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_two_processes_equal_one(name: str, tmp_path: Path, preferences: Path) -> None:
    options = {"batch_size": 5, "lr": 1e-3} if name == "dpo" else SHORT

    def config(out: str) -> LanguageTraining:
        return offline(tmp_path / out, preferences) if name == "dpo" else online(tmp_path / out)

    one = start(method(name, **options), config("one"))
    script = tmp_path / "trial.py"
    script.write_text(launch(config("two"), name, options)[2])
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)),
        launch(config("two"), name, options)[-1],
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(one, RunDir.open(tmp_path / "two"), 2e-5)


def test_reference_log_probs_are_computed_once_and_belong_to_model_and_data(tmp_path: Path, preferences: Path) -> None:
    files = lambda: sorted((tmp_path / "cache" / "logps").glob("*"))  # noqa: E731
    first = start(method("dpo", batch_size=16), offline(tmp_path / "a", preferences))
    (made,) = files()
    before = made.stat().st_mtime_ns
    second = start(method("dpo", batch_size=16), offline(tmp_path / "b", preferences))
    assert files() == [made] and made.stat().st_mtime_ns == before
    assert rows(first) == rows(second)
    start(method("dpo", batch_size=16), offline(tmp_path / "c", preferences, seed=1))  # another tiny model
    assert len(files()) == 2


def test_a_loss_that_does_not_start_where_it_must_stops_the_run(
    tmp_path: Path, preferences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LanguageRun.reference_logps

    def stale(self: LanguageRun, groups: Any) -> None:
        real(self, groups)
        for i, group in enumerate(groups):
            for s in group.segments:
                if "ref_logps" in s.values:
                    s.values["ref_logps"] = s.values["ref_logps"] * (1.5 if i % 2 else 0.5)

    monkeypatch.setattr(LanguageRun, "reference_logps", stale)
    with pytest.raises(InvariantError, match=r"first loss .* must be 0\.6931"):
        start(method("dpo", batch_size=32), offline(tmp_path / "run", preferences))


def test_a_method_that_cannot_learn_from_the_feedback_names_those_that_can(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n" for i in range(9)))
    with pytest.raises(DataError, match=r"dpo learns from preferences.*sft"):
        start(method("dpo"), offline(tmp_path / "run", path))


def test_lora_trains_the_adapter_alone(tmp_path: Path, preferences: Path) -> None:
    run = start(method("dpo", batch_size=8, lr=1e-2), offline(tmp_path / "run", preferences, lora_rank=2))
    adapter = load_file(run.path / "policy" / "adapter_model.safetensors")
    assert adapter and all("lora" in name for name in adapter)
    assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)
    assert rows(run)[0]["loss/total"] == pytest.approx(0.6931, abs=1e-4)
    assert rows(run)[-1]["preference/accuracy"] > 0.6


def test_bf16_learns_in_steps_that_bf16_cannot_hold(tmp_path: Path, preferences: Path) -> None:
    """Updates of 1e-5 are below the resolution of most bf16 weights and add up in the fp32 masters."""
    options = {"batch_size": 8, "lr": 1e-5, "epochs": 12}
    run = start(method("dpo", **options), offline(tmp_path / "run", preferences, precision="bf16"))
    losses = [row["loss/total"] for row in rows(run)]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] - 1e-3
    assert all(weight.dtype == torch.bfloat16 for weight in weights(run).values())
