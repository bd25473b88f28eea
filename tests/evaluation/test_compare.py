"""Comparisons with real processes: small scripts that keep run directories as `guerdon train` does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from guerdon.errors import ConfigError
from guerdon.evaluation.compare import as_dict, compare, load_comparison, tables
from guerdon.evaluation.trials import Progress, Trial, guerdon_command, locked

TRAINING = {"model": "tiny:", "task": "sums"}
STRONG = {"name": "toy", "label": "strong", "options": {"skill": 0.8}}
WEAK = {"name": "rival", "label": "weak", "options": {"skill": 0.3}}


def stages(out: Path, label: str, seed: int) -> list[str]:
    said = (out / "trials" / label / f"seed-{seed}.stages").read_text().splitlines()
    return [line.split()[0] for line in said]


def test_the_better_method_is_named_and_the_numbers_are_kept(tmp_path, launch):
    lines: list[str] = []
    found = compare(
        [WEAK, STRONG], training=TRAINING, seeds=2, budget={"updates": 6}, out=tmp_path, jobs=2, launch=launch,
        command="guerdon compare ...", say=lines.append,
    )  # fmt: skip
    assert [row.label for row in found.rows] == ["base", "strong", "weak"]
    assert found.verdict[0].startswith("strong is best: pass@1 0.")
    assert "over 2 seeds and 120 held-out items, ahead of weak by 0." in found.verdict[0]
    assert found.verdict[1].startswith("strong and weak improve on the untrained start (0.")
    assert len(found.verdict) == 2
    strong = found.rows[1]
    assert strong.scores.shape == (2, 120)
    assert strong.metrics["pass@1"].value == pytest.approx(strong.scores.mean())
    assert strong.cost["tokens"] == 30_000 and strong.cost["samples"] == 384
    assert strong.cost["memory"] > 10e6 and 0 < strong.cost["cpu"] < 60 and strong.cost["wall"] > 0
    assert stages(tmp_path, "strong", 0) == ["train", "evaluate"]
    assert stages(tmp_path, "base", 0) == ["evaluate"]
    assert "strong seed 1: train" in lines and "base: evaluate" in lines

    data = json.loads(json.dumps(as_dict(found)))
    assert data["rows"][1]["seed_scores"] == pytest.approx(strong.scores.mean(1).tolist())
    best = next(pair for pair in data["pairs"] if (pair["better"], pair["worse"]) == ("strong", "weak"))
    assert best["distinguishable"] and best["probability_of_improvement"]["value"] == 1

    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(*tables(found), sep="\n")
    text = capture.get()
    assert "untrained start" in text and "30,000" in text and "behind the best" in text


def test_a_finished_comparison_runs_nothing_again_and_takes_more_seeds(tmp_path, launch):
    arguments = {"training": TRAINING, "budget": {"updates": 4}, "out": tmp_path, "launch": launch}
    compare([STRONG], seeds=1, **arguments)
    once = (tmp_path / "trials/strong/seed-0.json").read_text()
    found = compare([STRONG, WEAK], seeds=2, **arguments)
    assert (tmp_path / "trials/strong/seed-0.json").read_text() == once
    assert stages(tmp_path, "strong", 0) == ["train", "evaluate"]
    assert found.rows[1].seeds == [0, 1]
    assert found.looks == [{"seeds": 1, "methods": ["strong"]}]
    assert any("enlarged after an earlier look (seeds then: 1)" in line for line in found.verdict)


def test_other_settings_are_refused_and_named(tmp_path, launch):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    training = {"model": "tiny:", "data": str(data)}
    out = tmp_path / "out"
    compare([STRONG], training=training, seeds=1, budget={"updates": 4}, out=out, launch=launch)
    with pytest.raises(ConfigError, match=r"budget\.updates was 4 and is 5 now"):
        compare([STRONG], training=training, seeds=1, budget={"updates": 5}, out=out, launch=launch)
    changed = {**STRONG, "options": {"skill": 0.7}}
    with pytest.raises(ConfigError, match=r"methods\.strong\.options\.skill was 0\.8 and is 0\.7 now"):
        compare([changed], training=training, seeds=1, budget={"updates": 4}, out=out, launch=launch)
    with pytest.raises(ConfigError, match=r"methods\.strong\.name was 'toy' and is None now"):
        compare([WEAK], training=training, seeds=1, budget={"updates": 4}, out=out, launch=launch)
    data.write_text('{"prompt": "a", "completion": "c"}\n')
    with pytest.raises(ConfigError, match="data_sha256"):
        compare([STRONG], training=training, seeds=1, budget={"updates": 4}, out=out, launch=launch)


@pytest.mark.parametrize("crash", ["train", "evaluate"])
def test_a_failed_trial_is_shown_and_tried_again(tmp_path, launch, crash):
    broken = {"name": "toy", "label": "broken", "options": {"crash": crash, "skill": 0.9}}
    arguments = {"training": TRAINING, "seeds": 2, "budget": {"updates": 4}, "out": tmp_path, "launch": launch}
    found = compare([broken, WEAK], **arguments)
    row = next(row for row in found.rows if row.label == "broken")
    assert row.seeds == [0] and list(row.failed) == [1]
    assert row.failed[1].startswith(f"{crash}: exit status 1")
    assert ("no memory left" if crash == "train" else "the judge is ill") in row.failed[1]
    assert any("1 of 2 trials of broken failed" in line for line in found.verdict)
    assert found.verdict[0].startswith("One seed of broken is no result about the method")
    assert as_dict(found)["rows"][1]["failed"]["1"].endswith(row.failed[1].splitlines()[-1])
    compare([broken, WEAK], **arguments)
    again = Progress.of(tmp_path / "trials/broken/seed-1")
    assert again.stages == (["train", "resume"] if crash == "train" else ["train", "evaluate", "evaluate"])


def test_everything_failed(tmp_path):
    def launch(trial: Trial, stage: str) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('nothing works')"]

    found = compare([STRONG], training=TRAINING, seeds=1, budget={}, out=tmp_path, launch=launch)
    assert found.verdict[0] == "No method has a finished trial: nothing can be said yet."
    assert found.rows[1].failed[0] == "train: exit status 1\nnothing works"
    tables(found)
    as_dict(found)


def test_one_seed_is_no_result(tmp_path, launch):
    found = compare([STRONG, WEAK], training=TRAINING, seeds=1, budget={"updates": 4}, out=tmp_path, launch=launch)
    assert found.verdict[0].startswith("One seed per method is no result about the method")


def test_what_cannot_be_told_apart_says_what_would_be_needed(tmp_path, launch):
    twin = {"name": "toy", "label": "strong-twin", "options": {"skill": 0.79}}
    found = compare([STRONG, twin], training=TRAINING, seeds=2, budget={}, out=tmp_path, jobs=2, launch=launch)
    assert "cannot be told apart from" in found.verdict[0]
    assert "if the true difference is the one seen" in found.verdict[1] or "no feasible number" in found.verdict[1]
    assert any("No common budget was set" in line for line in found.verdict)


def test_cores_are_shared_between_jobs(tmp_path, launch, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    compare([STRONG], training=TRAINING, seeds=1, budget={"updates": 2}, out=tmp_path, jobs=4, launch=launch)
    assert "train OMP=2" in (tmp_path / "trials/strong/seed-0.stages").read_text()


def test_devices_are_shared_between_jobs(monkeypatch):
    from guerdon.evaluation.trials import _share

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert [_share(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["4,6", "5"]
    assert [_share(slot, 4)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["4", "5", "6", "4"]
    assert "CUDA_VISIBLE_DEVICES" not in _share(0, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" not in _share(0, 2)


def test_ctrl_c_stops_the_trials_and_the_same_call_goes_on(tmp_path):
    here = Path(__file__).parent
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(here)!r})
        import conftest
        conftest.register_toys()
        from guerdon.evaluation.compare import compare
        slow = {{"name": "toy", "label": "slow", "options": {{"pause": 0.2}}}}
        try:
            found = compare([slow], training={TRAINING!r}, seeds=2, budget={{"updates": 12}},
                            out={str(tmp_path / "out")!r}, jobs=2, launch=conftest.toy_launch)
            print(found.verdict[0])
        except KeyboardInterrupt as error:
            print(error)
            sys.exit(130)
        """)
    )
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    metrics = out / "trials/slow/seed-0/metrics.jsonl"
    deadline = time.time() + 30
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.time() < deadline:
        time.sleep(0.05)
    with pytest.raises(ConfigError, match="a comparison is at work here"), locked(out):
        pass
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=30)
    assert first.returncode == 130
    assert "of 3 trials finished. The same command goes on from here" in said
    partial = load_comparison(out)
    assert any("not finished" in line for line in partial.verdict)
    rows = metrics.read_text().count("\n")
    assert 2 < rows < 12
    time.sleep(0.5)
    assert metrics.read_text().count("\n") == rows, "the trial still runs"
    with locked(out):
        pass
    again = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout.startswith("slow reaches pass@1"), again.stderr
    progress = Progress.of(out / "trials/slow/seed-0")
    assert progress.stages == ["train", "resume", "evaluate"]
    assert metrics.read_text().count("\n") == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["toi"]}, "no method is called 'toi'"),
        ({"methods": []}, "name at least one method"),
        ({"methods": [{"name": "toy", "options": {"skil": 1.0}}]}, "no option 'skil'. Did you mean 'skill'"),
        ({"methods": ["toy", "toy"]}, "two rows would be called 'toy'"),
        ({"methods": [{"name": "toy", "label": "Base"}]}, "two rows would be called 'Base'"),
        ({"seeds": 0}, "seeds has to be at least 1"),
        ({"jobs": 0}, "jobs has to be at least 1"),
        ({"budget": {"hours": 1}}, "no budget is counted in 'hours'"),
        ({"budget": {"updates": 0}}, "at least 1 of updates"),
        ({"training": {"model": "tiny:", "task": "t", "seed": 3}}, "'seed' is set for each trial"),
        ({"training": {"model": "tiny:"}}, "nothing to learn from"),
        ({"training": {"task": "t"}}, "'model' is missing"),
    ],
)
def test_mistakes_are_named_before_anything_starts(tmp_path, launch, change, message):
    arguments = {"methods": ["toy"], "training": TRAINING, "seeds": 1, "budget": {"updates": 1}, "launch": launch}
    with pytest.raises(ConfigError, match=message):
        compare(**{**arguments, "out": tmp_path / "out", **change})
    assert not (tmp_path / "out").exists()


def test_no_comparison(tmp_path):
    with pytest.raises(ConfigError, match="holds no comparison"):
        load_comparison(tmp_path)


def test_commands():
    training = {
        "model": "m",
        "data": None,
        "task": "t",
        "skip_bad": True,
        "log_to": ["wandb"],
        "stop": [],
        "seed": 1,
        "out": "o/1",
    }
    trial = Trial("dpo", "dpo", {"beta": 0.1}, training)
    flags = ["--task", "t", "--skip-bad", "--log-to", "wandb", "--stop", "--seed", "1", "--out", "o/1"]
    assert guerdon_command(trial, "train")[3:] == ["train", "dpo", "--model", "m", *flags, "--beta", "0.1"]
    assert guerdon_command(trial, "resume")[3:] == ["resume", "o/1"]
    assert guerdon_command(trial, "evaluate")[3:] == ["evaluate", "o/1"]
    start = Trial("base", None, {}, training, training["model"])
    assert guerdon_command(start, "evaluate")[3:] == ["evaluate", "m", *flags]
