from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import guerdon
from guerdon.errors import ConfigError, GuerdonError
from guerdon.training.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", "dpo", {"beta": 0.1}, {"model": "m", "log_to": ("wandb",)})


def put(text: str):
    return lambda directory: (directory / "weights").write_text(text)


def test_config_and_environment(run, monkeypatch):
    assert RunDir.open(run.path).config == {
        "guerdon": guerdon.__version__,
        "method": "dpo",
        "options": {"beta": 0.1},
        "training": {"model": "m", "log_to": ["wandb"]},
    }
    facts = run.environment
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["python"] == sys.version.split()[0]
    assert facts["cores"] >= 1 and facts["cpu"] and len(facts["id"]) == 16
    written = (run.path / "environment.json").read_text()
    assert os.environ["PATH"] not in written


def test_a_second_run_does_not_overwrite_the_first(run, tmp_path):
    with pytest.raises(ConfigError, match=f"already holds a run: go on with it by `guerdon resume {run.path}`.*--out"):
        RunDir.create(run.path, "dpo", {}, {})
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunDir.create(tmp_path / "file", "dpo", {}, {})
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        RunDir.create(tmp_path, "dpo", {}, {})
    assert (tmp_path / "file").read_text() == "x"


def test_a_run_killed_while_it_was_created_can_be_created_again(run):
    (run.path / "config.json").rename(run.path / ".config.json")
    assert RunDir.create(run.path, "sft", {}, {}).config["method"] == "sft"


def test_open_says_what_is_wrong(run, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        RunDir.open(tmp_path / "nothing")
    (run.path / "config.json").write_text('{"method": ')
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        _ = RunDir.open(run.path).config


def test_numbers_come_back_exactly_and_other_values_too(run):
    given = {"a/float": 0.1 + 0.2, "a/int": 3, "a/nan": float("nan"), "a/inf": float("inf"), "a/minus": -float("inf")}
    run.append(1, given)
    line = json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)  # strict JSON
    assert (line["a/nan"], line["a/inf"], line["a/minus"]) == ("NaN", "Infinity", "-Infinity")
    assert [{k: repr(v) for k, v in row.items()} for row in run.metrics()] == [
        {k: repr(v) for k, v in {"step": 1, **given}.items()}
    ]


def test_each_line_is_on_disk_when_append_returns(run):
    for step in range(3):
        run.append(step, {"loss/total": float(step)})
        assert len((run.path / "metrics.jsonl").read_text().splitlines()) == step + 1


def test_the_same_step_again_joins_its_row(run):
    run.append(1, {"loss/total": 1.0})
    run.append(2, {"loss/total": 2.0})
    run.append(2, {"eval/score": 5.0})
    run.append(2, {"eval/score": 6.0})
    run.append(3, {"loss/total": 3.0})
    expected = [
        {"step": 1, "loss/total": 1.0},
        {"step": 2, "loss/total": 2.0, "eval/score": 6.0},
        {"step": 3, "loss/total": 3.0},
    ]
    assert run.metrics() == expected
    reopened = RunDir.open(run.path)
    reopened.append(3, {"eval/score": 7.0})
    assert reopened.metrics() == [*expected[:2], {**expected[2], "eval/score": 7.0}]


def test_truncate_removes_later_rows_and_a_torn_line(run):
    for step in range(1, 6):
        run.append(step, {"loss/total": step / 7})
    file = run.path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step": 6, "loss/to')
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5]
    run.truncate_to(5)
    assert file.read_bytes() == whole
    run.truncate_to(3)
    run.append(4, {"loss/total": 4 / 7})
    run.append(5, {"loss/total": 5 / 7})
    assert file.read_bytes() == whole
    run.truncate_to(-1)
    assert file.read_bytes() == b""


def test_status(run):
    assert run.status == {"state": "created"}
    run.set_status("running")
    assert run.status == {"state": "killed"}  # nobody holds it
    with run.locked():
        assert RunDir.open(run.path).status == {"state": "running"}
        with pytest.raises(ConfigError, match="in use by another process"), RunDir.open(run.path).locked():
            pass
    run.set_status("failed", error="why")
    assert run.status == {"state": "failed", "error": "why"}


def test_checkpoints_are_pruned_to_the_latest(run):
    assert run.latest_checkpoint() is None
    for step in (9, 10, 100):
        run.save_checkpoint(step, put(str(step)), keep=2)
    assert [c.name for c in run.checkpoints()] == ["step-00000010", "step-00000100"]
    assert (run.latest_checkpoint() / "weights").read_text() == "100"
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step-00000010", "step-00000100"]


def test_a_half_written_checkpoint_is_never_seen_and_later_removed(run):
    run.save_checkpoint(1, put("one"), keep=2)

    def dies(directory: Path) -> None:
        put("half")(directory)
        assert run.latest_checkpoint().name == "step-00000001"
        raise RuntimeError("why")

    with pytest.raises(RuntimeError, match="why"):
        run.save_checkpoint(2, dies, keep=2)
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-00000001"]
    left = run.path / "checkpoints" / ".step-00000002"  # as a kill -9 leaves it
    left.mkdir()
    put("half")(left)
    assert run.latest_checkpoint().name == "step-00000001"
    run.save_checkpoint(3, put("three"), keep=2)
    assert not left.exists()


def full(directory: Path) -> None:
    (directory / "weights").write_bytes(bytes(3_000_000))
    with open("/dev/full", "wb") as file:
        file.write(bytes(100_000))


def test_a_full_disk_leaves_the_checkpoint_before(run):
    run.save_checkpoint(1, put("one"), keep=1)
    with pytest.raises(GuerdonError) as told:
        run.save_checkpoint(2, full, keep=1)
    assert "step-00000002 needs at least 3.0 MB, and " in str(told.value)
    assert "The last whole checkpoint is step-00000001" in str(told.value)
    assert f"`guerdon resume {run.path}`" in str(told.value)
    assert (run.latest_checkpoint() / "weights").read_text() == "one"
    assert len(list((run.path / "checkpoints").iterdir())) == 1


def test_a_full_disk_while_metrics_are_written(run):
    run.append(1, {"loss/total": 1.0})
    (run.path / "metrics.jsonl").unlink()
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    run = RunDir.open(run.path)
    run._last = (1, 0, {})  # /dev/full can be read without end
    with pytest.raises(GuerdonError, match=r"the disk is full: .*metrics\.jsonl could not be written.*guerdon resume"):
        run.append(2, {"loss/total": 1.0})


@pytest.fixture
def small_disk(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_when_safetensors_writes(small_disk):
    run = RunDir.create(small_disk / "run", "dpo", {}, {})
    run.save_checkpoint(1, lambda d: save_file({"w": torch.zeros(100_000)}, d / "w.safetensors"), keep=2)
    with pytest.raises(GuerdonError, match=r"the disk is full: .*needs at least 0\.4 MB, and 0\.\d MB are free"):
        run.save_checkpoint(2, lambda d: save_file({"w": torch.zeros(300_000)}, d / "w.safetensors"), keep=2)
    assert [c.name for c in run.checkpoints()] == ["step-00000001"]
    run.save_checkpoint(2, lambda d: save_file({"w": torch.zeros(100_000)}, d / "w.safetensors"), keep=2)


def test_no_torch_is_imported():
    code = "import sys, guerdon.training.rundir; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(guerdon.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_a_row_with_numbers_for_each_seed(run):
    nan = float("nan")
    given = {
        "a/each": [1.0, 4.0],
        "a/some": [nan, 3.0, 5.0],
        "a/none": [nan, nan],
        "a/inf": [float("inf"), 2.0],
        "b": 7,
    }
    run.append(10, given)
    line = json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)  # strict JSON
    assert line["a/each"] == [1.0, 4.0] and line["a/some"] == ["NaN", 3.0, 5.0] and line["a/inf"] == ["Infinity", 2.0]
    (mean,), (first,), (second,) = run.metrics(), run.metrics(0), run.metrics(seed=1)
    assert repr(mean) == repr({"step": 10, "a/each": 2.5, "a/some": 4.0, "a/none": nan, "a/inf": float("inf"), "b": 7})
    assert repr(first) == repr({"step": 10, "a/each": 1.0, "a/some": nan, "a/none": nan, "a/inf": float("inf"), "b": 7})
    assert repr(second) == repr({"step": 10, "a/each": 4.0, "a/some": 3.0, "a/none": nan, "a/inf": 2.0, "b": 7})
    run.append(10, {"eval/score": [5.0, 6.0]})  # joins the row, whose lists stay what they were
    run.truncate_to(10)
    assert repr(RunDir.open(run.path).metrics(1)) == repr([{**second, "eval/score": 6.0}])
