"""`guerdon claims` and `guerdon reproduce`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guerdon.claims import all_claims, running
from guerdon.cli import main


def test_claims_as_a_table_and_as_json(capsys, monkeypatch, tmp_path):
    assert main(["claims", "--json"]) == 0
    listed = {claim["paper"]: claim for claim in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(all_claims())
    assert listed[1]["result"]["verdict"] == "holds" and listed[1]["result"]["seeds"] == 32
    assert {"says": "riql is above iql by more than 0.2", "where": "reward"} in listed[1]["criteria"]
    monkeypatch.setattr(running, "RESULTS", tmp_path)
    assert main(["claims"]) == 0
    assert capsys.readouterr().out.count("never run") == len(listed)


def test_reproduce_tells_what_it_does_and_what_came_of_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["reproduce", "01", "--quick", "--seeds", "2", "--out", "here"]
    assert main([*argv, "--json"]) == 0
    said = capsys.readouterr()
    (result,) = json.loads(said.out)
    assert len(said.err.splitlines()) == 16 and said.err.startswith("01 dynamics riql, seeds 0-1: ")
    assert result == json.loads(Path("here/01-quick/result.json").read_text())
    assert main(argv) == 0
    said = capsys.readouterr()
    assert said.err == ""  # nothing was left to do
    assert result["sentences"][0] in said.out and "worst-state" in said.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["reproduce"], "name at least one paper"),
        (["reproduce", "1", "999"], "no claim of a paper '999'"),
        (["reproduce", "1", "--seeds", "1"], "at least 2"),
        (["reproduce", "1", "--quik"], "Did you mean '--quick'?"),
    ],
)
def test_slips_are_answered_before_anything_runs(argv, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
