"""Adding a method as the guide says: its file, outside the package, is listed, trains, resumes and is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from guerdon.cli import main
from guerdon.evaluation.compare import load_comparison
from guerdon.methods import base
from guerdon.plugins import VARIABLE
from guerdon.training.progress import Terminal
from pages import ROOT, Block, blocks, commands, run, words

PAGE = (ROOT / "docs/adding-a-method.md").read_text(encoding="utf-8")


@pytest.fixture
def guide(new_user, monkeypatch) -> list[Block]:
    """The blocks of the guide, in a directory with its file and with rated answers."""
    monkeypatch.setattr(base, "_REGISTRY", base.all_methods())  # other tests are not to meet it
    monkeypatch.setenv(VARIABLE, "")
    found = blocks(PAGE)
    (code,) = (block for block in found if block.title)
    assert code.text.count("\n") < 80
    Path(code.title).write_text(code.text, encoding="utf-8")
    rows = [{"prompt": f"{i % 5}?", "completions": [" yes", " no"], "scores": [1, 0]} for i in range(40)]
    Path("rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield found
    sys.modules.pop("guerdon_plugin_rwr", None)


class Interrupted(Terminal):
    """A terminal at which somebody presses Ctrl-C during the sixth update."""

    def update(self, step, done, metrics):
        super().update(step, done, metrics)
        if step == 6:
            raise KeyboardInterrupt


def test_the_method_of_the_guide_is_listed_trains_resumes_and_is_compared(guide, monkeypatch, capsys):
    listed, train, resume, compare = (command for block in guide for command in commands(block))
    assert run(listed) == 0
    said = capsys.readouterr().out
    assert "L = -sum_i w_i log pi(y_i | x)" in said and "score that makes an answer weigh e times as much" in said

    train = [*words(train), *["--batch-size", "4", "--epochs", "1", "--lr", "1e-2", "--holdout", "0.2"]]
    whole = [word if word != "weighted" else "whole" for word in train]
    assert main(whole) == 0
    with monkeypatch.context() as patched:
        patched.setattr("guerdon.training.progress.Terminal", Interrupted)
        assert main(train) == 130
    assert json.loads(Path("weighted/status.json").read_text())["state"] != "done"
    assert not Path("weighted/policy").exists()
    assert run(resume) == 0
    ours, theirs = (load_file(f"{name}/policy/model.safetensors") for name in ("whole", "weighted"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    losses = [json.loads(line)["loss/total"] for line in Path("weighted/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 8 and losses[-1] < losses[0]

    assert run(compare) == 0
    # The processes that a comparison starts know it, too.
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    alone = [sys.executable, "-m", "guerdon", "methods", "rwr"]
    assert subprocess.run(alone, env=environment, capture_output=True, text=True).stdout == said
    assert {row.label for row in load_comparison("with-rwr").methods} == {"sft", "dpo", "rwr"}
    assert "rwr" in capsys.readouterr().out


def test_the_method_of_the_guide_weighs_as_it_says(guide):
    assert main(["methods", "rwr", "--plugin", "rwr.py"]) == 0
    assert base.get_method("rwr")(beta=0.5).options()["beta"] == 0.5
    weights = sys.modules["guerdon_plugin_rwr"].weights
    scores = np.array([1.0, 0.0, -1.0])
    e = np.e
    np.testing.assert_allclose(weights(scores, 1.0), 3 * np.array([e, 1, 1 / e]) / (e + 1 + 1 / e), rtol=1e-6)
    np.testing.assert_allclose(weights(scores, 1e-3), [3, 0, 0])


def test_the_method_of_the_guide_learns_what_is_rated_highest(guide):
    train = "train rwr --plugin rwr.py --model tiny:layers=1,width=32,heads=2 --data rated.jsonl --beta 0.2 --lr 1e-2"
    assert main([*train.split(), "--batch-size", "8", "--epochs", "8", "--holdout", "0.2"]) == 0
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/total"] for row in metrics if "loss/total" in row]
    assert losses[-1] < 0.3 * losses[0]
    assert metrics[-1]["eval/preference/accuracy"] == 1.0


def test_options_of_the_method_of_the_guide_are_checked(guide, capsys):
    argv = ["train", "rwr", "--plugin", "rwr.py", "--model", "tiny:", "--data", "rated.jsonl", "--beta", "0"]
    assert main(argv) == 2
    assert capsys.readouterr().err == "guerdon: beta is 0.0: it must be above 0.\n"
