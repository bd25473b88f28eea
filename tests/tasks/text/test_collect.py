"""Collecting in environments in words, from the command line and from Python; going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guerdon import api
from guerdon.cli import main
from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.tasks.text.trajectories import Store

TINY = "tiny:layers=1,width=16,heads=2,context=1000"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def collect(out: str, **how):
    return api.collect_trajectories("text:keys:", out=out, **{"policy": ["random", "scripted"], "episodes": 12} | how)


class Killed(Exception):
    pass


@pytest.mark.parametrize("policy", [["random", "scripted"], [TINY]])
def test_a_killed_collection_goes_on_as_if_nothing_had_happened(policy: list[str]):
    def killer(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    how = {"policy": policy, "noise": 0.2, "n": 2, "max_new_tokens": 4}
    whole = collect("whole.jsonl", **how)
    with pytest.raises(Killed):
        collect("killed.jsonl", **how, progress=killer)
    with Path("killed.jsonl").open("ab") as file:
        file.write(b'{"prompt": [{"ro')
    told = []
    resumed = collect("killed.jsonl", **how, progress=lambda done, total: told.append((done, total)))
    assert Path("killed.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert resumed == whole | {"resumed": 5} and told[0] == (5, 12) and told[-1] == (12, 12)


def test_the_same_command_adds_nothing_and_another_adds_to_the_store():
    first = collect("store.jsonl")
    assert collect("store.jsonl") == first | {"resumed": 12}
    more = collect("store.jsonl", episodes=14)
    assert (more["episodes"], more["resumed"], more["others"]) == (14, 12, 0)
    other = collect("store.jsonl", seed=1, episodes=3)
    assert (other["episodes"], other["resumed"], other["others"]) == (3, 0, 14)
    assert [t.index for t in Store("store.jsonl")] == [*range(14), 0, 1, 2]
    assert len({t.collection for t in Store("store.jsonl")}) == 2


def test_what_is_returned_is_what_the_store_holds():
    summary = collect("store.jsonl", feedback=["sft", "scored"])
    kept = list(Store("store.jsonl"))
    scripted = [t for t in kept if t.policy == "scripted"]
    assert len(kept) == summary["episodes"] == 12 and len(scripted) == 6
    assert summary["policies"]["scripted"] == {"steps": 18, "return": 1.0, "success": 1.0, "admissible": 1.0}
    assert summary["steps"] == sum(len(t.steps) for t in kept)
    assert summary["success"] == sum(t.success for t in kept) / 12
    assert summary["feedback"] == {"store.sft.jsonl": sum(t.success for t in kept), "store.scored.jsonl": 6}
    assert api.read_feedback("store.scored.jsonl").records[0].scores == [t.total for t in kept[:2]]


AGENTS = """
class Stubborn:
    name = identity = "stubborn"

    def propose(self, turns, n=1):
        return [["press 0"] * n for _ in turns]
"""


def test_an_agent_of_the_user(here: Path, monkeypatch):
    (here / "my_agents.py").write_text(AGENTS)
    monkeypatch.syspath_prepend(here)
    summary = collect("store.jsonl", policy=["python:my_agents.Stubborn"], episodes=3)
    assert list(summary["policies"]) == ["stubborn"]
    assert {step.action for t in Store("store.jsonl") for step in t.steps} == {"press 0"}


def test_what_is_no_agent_is_told():
    with pytest.raises(ConfigError, match=r"python:pathlib\.Path gives PosixPath, which has no 'identity'"):
        collect("store.jsonl", policy=["python:pathlib.Path"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"feedback": ["preferences"]}, "make no feedback 'preferences'. Did you mean 'preference'?"),
        ({"noise": 1.5}, "noise is 1.5"),
        ({"episodes": 0}, "episodes is 0"),
        ({"n": 0}, "n is 0"),
        ({"split": "tests"}, "has no split 'tests'"),
        ({"out": "store.csv"}, "kept in a .jsonl file"),
        ({"policy": ["python:nobody_has.this"]}, "no module 'nobody_has'"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_collected(how: dict, message: str):
    with pytest.raises(ConfigError) as raised:
        collect(**{"out": "store.jsonl", **how})
    assert message in str(raised.value) and not Path("store.jsonl").exists()


def test_feedback_that_the_episodes_do_not_hold_is_told():
    with pytest.raises(DataError, match=r"make no preference feedback: no task has two with different returns"):
        collect("store.jsonl", policy=["scripted"], feedback=["preference"])
    assert len(list(Store("store.jsonl"))) == 12, "the episodes are there"


def test_what_ends_a_collection_is_told_with_what_there_is():
    collect("store.jsonl", policy=["scripted"], episodes=2)
    with pytest.raises(GuerdonError, match=r"that it can read.* What was collected is kept in store\.jsonl"):
        collect("store.jsonl", policy=[TINY.replace("1000", "100")])
    assert len(list(Store("store.jsonl"))) == 2


def test_the_command_line(capsys):
    command = ["collect", "--env", "text:keys:?depth=2&actions=3", "--out", "store.jsonl", "--episodes", "8"]
    policies = ["--policy", "random", "scripted", "--feedback", "preference", "step-preference"]
    assert main([*command, *policies]) == 0
    written = capsys.readouterr()
    assert "scripted: success 100.0%, mean return 1" in written.out and "store.jsonl: 8 episodes\n" in written.out
    assert "store.preference.jsonl: " in written.out and written.err.endswith("8 of 8 episodes\n")
    assert main([*command, *policies, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["resumed"] == 8 and summary["policies"]["scripted"]["success"] == 1.0
    for file, rows in summary["feedback"].items():
        assert len(api.read_feedback(file)) == rows
    assert main(["collect", "--env=text:key:", "--out", "store.jsonl"]) == 2
    assert "Did you mean 'keys'?" in capsys.readouterr().err
