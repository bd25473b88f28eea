"""What README and CONTRIBUTING say is so: the methods they list, and the worked example that they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from guerdon.methods import base
from guerdon.methods.base import all_methods
from guerdon.plugins import VARIABLE, add_plugin

ROOT = Path(__file__).parent.parent


def test_readme_lists_every_method():
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    built_in = {name: cls for name, cls in all_methods().items() if cls.__module__.startswith("guerdon.")}
    assert dict(rows) == {name: cls.learns_from for name, cls in built_in.items()}


@pytest.fixture
def example(tmp_path: Path) -> Path:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
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
