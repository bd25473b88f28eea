"""What README, docs and CONTRIBUTING say is so: methods, formats, every command as written, the worked example."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from guerdon import api
from guerdon.cli import main
from guerdon.feedback.readers import read_feedback
from guerdon.methods import base
from guerdon.methods.base import all_methods
from guerdon.plugins import VARIABLE, add_plugin

ROOT = Path(__file__).parent.parent
README, FEEDBACK = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/feedback.md"))
TINY = "tiny:layers=1,width=16,heads=2"
TASK = "'reasoning-gym:chain_sum?max_terms=2'"
# What keeps a command short, beside a small model.
SHORT = {
    "train grpo": "--rounds 1 --prompts-per-round 2 --group-size 2 --eval-items 2 --eval-max-new-tokens 4",
    "collect --task": "--prompts 2 --max-new-tokens 4",
    "train sac": "--max-samples 41000 --learning-starts 40990 --hidden 8 --eval-episodes 1",
    "collect --env": "--episodes 3",
}


def blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in fenced if kind == language]


def small(text: str) -> str:
    text = text.replace("--task ...", f"--task {TASK}").replace("--model ...", "--model smollm2-135m")
    return re.sub(r"Qwen/Qwen3-0.6B|smollm2-135m", TINY, text)


@pytest.fixture
def new_user(tmp_path: Path, monkeypatch) -> list[dict]:
    """In a directory with `pairs.jsonl`; the comparisons that are asked for, which here are not made."""
    rows = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    asked: list[dict] = []

    def compare(methods, *, out="comparison", **settings):
        asked.append({"methods": methods, **settings})
        raise NotAsked

    monkeypatch.setattr(api, "compare", compare)
    return asked


class NotAsked(Exception):
    """In the place of a comparison."""


def test_the_commands_of_the_readme_work_as_they_are_written(new_user):
    (recipe,) = blocks(README, "yaml")
    Path("recipe.yaml").write_text(small(recipe))
    lines = [line for block in blocks(README, "") for line in small(block).splitlines() if line.startswith("guerdon ")]
    done = []
    for line in lines:
        argv = shlex.split(line, comments=True)[1:]
        if argv == ["report", "comparison"]:
            continue  # which is not there
        argv += shlex.split(next((flags for start, flags in SHORT.items() if " ".join(argv).startswith(start)), ""))
        try:
            assert main(argv) == 0, line
        except NotAsked:
            assert argv[0] == "compare"
        done.append(argv[0])
    language = ["inspect", "look", "train", "evaluate", "compare", "train", "collect"]
    assert done == [*language, "train", "collect", "inspect", "compare", "train"]
    assert new_user[1]["methods"] == ["bc", "iql", "riql", "td3-bc"]
    assert (new_user[0]["methods"], new_user[0]["budget"]) == (["sft", "dpo", "dpo-norm"], {"updates": 200})
    assert json.loads(Path("faster/config.json").read_text())["options"]["lr"] == 2e-6


def test_the_python_of_the_readme_works_as_it_is_written(new_user):
    (code,) = blocks(README, "python")
    with pytest.raises(NotAsked):
        exec(small(code), {})
    assert json.loads(Path("loose/status.json").read_text()) == {"state": "done"}
    assert new_user[0]["methods"] == ["sft", "dpo"]


def test_the_first_page_of_the_documentation_has_the_commands_of_the_readme():
    (block,) = blocks((ROOT / "docs/index.md").read_text(encoding="utf-8"), "")
    first = [line.partition(" #")[0].rstrip() for line in blocks(README, "")[1].splitlines()]
    assert block.splitlines() == first


@pytest.mark.parametrize("name", re.findall(r"^\| ([a-z ]+) \| .* \| `\{", FEEDBACK, re.MULTILINE))
def test_the_examples_of_feedback_have_the_type_that_is_said(name, tmp_path):
    kinds = {
        "language modelling": "language_modeling",
        "prompt and completion": "prompt_completion",
        "preference": "preference",
        "unpaired preference": "unpaired_preference",
        "ratings": "scored",
        "steps of one answer": "stepwise_supervision",
        "prompts": "prompt_only",
    }
    (row,) = re.findall(rf"^\| {name} \| .* \| `(\{{.*\}})` \|$", FEEDBACK, re.MULTILINE)
    (tmp_path / "file.jsonl").write_text(row)
    assert read_feedback(str(tmp_path / "file.jsonl")).kind == kinds.pop(name)


def test_readme_lists_every_method():
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \|", README, re.MULTILINE)
    built_in = {name: cls for name, cls in all_methods().items() if cls.__module__.startswith("guerdon.")}
    assert dict(rows) == {name: cls.learns_from for name, cls in built_in.items()}


@pytest.fixture
def example(tmp_path: Path) -> Path:
    (block,) = blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "python")
    assert block.count("\n") < 80
    path = tmp_path / "rwr.py"
    path.write_text(block)
    return path


def test_the_worked_example_weighs_as_it_says(example: Path, monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))  # other tests are not to meet it
    monkeypatch.setenv(VARIABLE, "")
    add_plugin(str(example))
    assert base.get_method("rwr")(beta=0.5).options()["beta"] == 0.5
    weights = sys.modules["guerdon_plugin_rwr"].weights
    scores = np.array([1.0, 0.0, -1.0])
    e = np.e
    np.testing.assert_allclose(weights(scores, 1.0), 3 * np.array([e, 1, 1 / e]) / (e + 1 + 1 / e), rtol=1e-6)
    np.testing.assert_allclose(weights(scores, 1e-3), [3, 0, 0])


@pytest.mark.slow
def test_the_worked_example_trains(example: Path, tmp_path: Path):
    rows = [{"prompt": f"{i % 5}?", "completions": [" yes", " no"], "scores": [1, 0]} for i in range(40)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = "train rwr --plugin rwr.py --model tiny:layers=1,width=32,heads=2 --data rated.jsonl --beta 0.2 --lr 1e-2"
    done = subprocess.run(
        [sys.executable, "-m", "guerdon", *command.split(), "--batch-size", "8", "--epochs", "8", "--holdout", "0.2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/total"] for row in metrics if "loss/total" in row]
    assert losses[-1] < 0.3 * losses[0]
    assert metrics[-1]["eval/preference/accuracy"] == 1.0
