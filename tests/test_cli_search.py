"""Searching tasks in words, and judging who acts in them, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guerdon import cli

ENV = "text:keys:?depth=1&actions=3"


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert cli.main(argv) == code
    streams = capsys.readouterr()
    return streams.err if code else streams.out


def test_trees_and_what_can_be_learned_from_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "trees.jsonl")
    argv = ["collect", "--search", "mcts", "--env", ENV, "--out", out, "--trees", "5", "--iterations", "4"]
    shown = said(capsys, *argv, "--candidates", "9", "--chosen", "path")
    assert f"{out}: 5 trees, 100.0% of them solved" in shown
    assert f"{tmp_path / 'trees.step-preference.jsonl'}: 5 rows" in shown
    again = json.loads(said(capsys, *argv, "--candidates", "9", "--chosen", "path", "--json"))
    assert again["resumed"] == 5 and again["solved"] == 1.0
    found = json.loads(said(capsys, "inspect", str(tmp_path / "trees.step-preference.jsonl"), "--json"))
    assert "dpo" in found["methods"]


def test_who_acts_is_judged_by_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(said(capsys, "evaluate", "scripted", "--env", ENV, "--json"))["success"] == 1.0
    chance = json.loads(said(capsys, "evaluate", "random", "--env", ENV, "--eval-samples", "200", "--json"))
    assert abs(chance["success"] - 1 / 3) < 0.1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["collect", "--search", "mcts", "--env", "text:kees:", "--out", "x.jsonl"], "no environment in words 'kees:'"),
        (["collect", "--search", "mcts", "--env", ENV, "--out", "x.csv"], "trajectories are kept in a .jsonl file"),
        (["collect", "--search", "mcts", "--env", ENV, "--out", "x.jsonl", "--weight", "-1"], "weight is -1"),
        (
            ["collect", "--search", "mcts", "--env", ENV, "--out", "x.jsonl", "--iteration", "3"],
            "no flag '--iteration'",
        ),
        (["evaluate", "scripted", "--env", ENV, "--eval-choose", "lines"], "with env a reply is taken"),
    ],
)
def test_slips_are_told(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said(capsys, *argv, code=2)
