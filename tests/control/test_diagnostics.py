"""What `guerdon inspect` says of trajectories: numbers worked out by hand, and a finding for each suspicion."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from guerdon.control.corruption import Corruption, corrupt
from guerdon.control.diagnostics import coverage, inspect_transitions, render
from guerdon.control.spaces import Spec
from guerdon.control.transitions import Chained, Transitions


def transitions(lengths: tuple[int, ...] = (50, 40, 60, 30, 45), discrete: bool = False, seed: int = 0) -> Transitions:
    """Random walks in three dimensions that are truncated, but for the first, which is terminated."""
    rng = np.random.default_rng(seed)
    walks = [rng.normal(size=(n + 1, 3)).cumsum(axis=0).astype(np.float32) for n in lengths]
    count = sum(lengths)
    ends = np.zeros(count, bool)
    ends[np.cumsum(lengths) - 1] = True
    first = np.arange(count) < lengths[0]
    actions = rng.integers(3, size=count) if discrete else rng.uniform(-1, 1, (count, 2)).astype(np.float32)
    return Transitions(
        np.concatenate([walk[:-1] for walk in walks]),
        actions,
        rng.normal(size=count).astype(np.float32),
        np.concatenate([walk[1:] for walk in walks]),
        ends & first,
        ends & ~first,
        np.repeat(np.arange(len(lengths)), lengths),
        Spec((3,), False, discrete, 3 if discrete else 2, *(((), ()) if discrete else ((-1.0,) * 2, (1.0,) * 2))),
        "walks",
        "Walk-v0",
    )


def findings(data: Transitions) -> dict[str, dict]:
    return {finding["what"]: finding for finding in inspect_transitions(data)["findings"]}


def printed(report: dict) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(report))
    return console.export_text()


def test_a_report():
    data = transitions()
    data.rewards[:50] = 0
    report = inspect_transitions(data)
    assert json.loads(json.dumps(report)) == json.loads(json.dumps(report, default=list))
    assert (report["transitions"], report["episodes"], report["env"]) == (225, 5, "Walk-v0")
    assert report["ends"] == {"terminated": 1, "truncated": 4, "open": 0}
    assert report["lengths"] == {"mean": 45, "min": 30, "5%": 32, "median": 45, "95%": 58, "max": 60}
    returns = [part.sum() for part in np.split(data.rewards.astype(float), np.cumsum([50, 40, 60, 30]))]
    assert report["returns"]["mean"] == pytest.approx(np.mean(returns), abs=1e-5)
    assert report["returns"]["median"] == pytest.approx(np.median(returns), abs=1e-5)
    assert report["rewards"]["zero"] == pytest.approx(50 / 225)
    np.testing.assert_allclose(report["actions"]["low"], data.actions.min(axis=0))
    np.testing.assert_allclose(report["actions"]["std"], data.actions.std(axis=0), rtol=1e-5)
    assert report["findings"] == []
    order = np.argsort(returns)
    parts = report["mixture"]
    assert [part["episodes"] for part in parts] == [2, 1, 1, 1]
    assert parts[0]["return"] == pytest.approx(np.mean(np.array(returns)[order[:2]]), abs=1e-5)
    assert parts[3]["steps"] == [50, 40, 60, 30, 45][order[3 + 1]]
    text = printed(report)
    for words in ("Walk-v0", "3 numbers", "2 continuous", "225 in 5 episodes", "4 truncated", "Nothing odd was found."):
        assert words in text


def test_discrete_actions():
    data = transitions(discrete=True)
    data.actions[data.actions == 1] = 2
    report = inspect_transitions(data)
    assert report["actions"]["shares"] == pytest.approx((np.bincount(data.actions, minlength=3) / 225).tolist())
    never = {f["what"]: f for f in report["findings"]}["actions that are never taken"]
    assert (never["count"], never["share"], never["examples"]) == (1, 1 / 3, ["action 1"])
    share = np.mean(data.actions == 0)
    entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert np.mean([part["spread"] for part in report["mixture"]]) == pytest.approx(entropy, abs=0.03)
    assert "one of 3" in printed(report)


def test_coverage_of_known_shapes():
    rng = np.random.default_rng(0)

    def reach(observations: np.ndarray) -> dict[str, float]:
        rows = len(observations)
        spec = Spec(observations.shape[1:], False, True, 2, (), ())
        flags = np.zeros(rows, bool)
        data = Transitions(observations, flags.astype(int), flags, observations, flags, flags, flags.astype(int), spec)
        return coverage(data)

    ball = reach(rng.normal(size=(3000, 6)))
    assert ball["dimensions"] == 6 and ball["effective_rank"] == pytest.approx(6, abs=0.05)
    line = reach(rng.uniform(size=(3000, 1)) * np.arange(1, 6))
    assert line["effective_rank"] == pytest.approx(1, abs=1e-6) and line["nearest"] < 0.01
    square = reach(rng.uniform(size=(3000, 2)))
    assert square["occupied"] > 0.5 and square["effective_rank"] == pytest.approx(2, abs=0.01)
    two_spots = reach(np.repeat([[0.0, 1.0], [1.0, 0.0]], 500, axis=0))
    assert two_spots["occupied"] == 2 / 20 and two_spots["nearest"] < 1e-6
    assert ball["nearest"] > 0.2 > square["nearest"]
    still = reach(np.ones((10, 4)))
    assert still == {"dimensions": 0, "effective_rank": 0.0, "occupied": 0.0, "nearest": 0.0}
    one_row = reach(np.ones((1, 4)))
    assert one_row == still


def test_not_finite_rows_are_counted_and_kept_out():
    data = transitions()
    data.observations[7, 1] = np.nan
    data.next_observations[6, 1] = np.nan
    data.rewards[100:103] = np.inf
    report = inspect_transitions(data)
    errors = [(f["what"], f["count"], f["examples"][0]) for f in report["findings"] if f["level"] == "error"]
    assert errors == [
        ("rows with 'observations' that are not finite", 1, "row 7 (episode 0, step 7)"),
        ("rows with 'rewards' that are not finite", 3, "row 100 (episode 2, step 10)"),
        ("rows with 'next_observations' that are not finite", 1, "row 6 (episode 0, step 6)"),
    ]
    assert len(report["findings"]) == 3 and np.isfinite(report["returns"]["mean"])
    assert report["ends"] == {"terminated": 1, "truncated": 4, "open": 0}
    data.rewards[:] = np.nan
    text = printed(inspect_transitions(data))
    assert "rows with 'rewards' that are not finite (100.0%)" in text


def test_nan_in_a_file(tmp_path: Path):
    data = transitions()
    columns = {n: getattr(data, n) for n in ("observations", "actions", "rewards", "next_observations")}
    columns["observations"] = np.where(np.arange(225)[:, None] == 9, np.nan, columns["observations"])
    np.savez(tmp_path / "a.npz", terminals=data.terminated, timeouts=data.truncated, **columns)
    found = inspect_transitions(str(tmp_path / "a.npz"))["findings"]
    assert [(f["level"], f["count"]) for f in found] == [("error", 1)]


def test_broken_chains():
    data = transitions()
    dirty, masks = corrupt(data, [Corruption.parse("dynamics:0.2")], seed=0)
    last = np.isin(np.arange(225), np.cumsum([50, 40, 60, 30, 45]) - 1)
    found = findings(dirty)["rows whose next observation is not the following observation"]
    assert found["count"] == (masks["next_observations"] & ~last).sum() and found["level"] == "warning"
    swapped = data.subset(np.array([1, 0, *range(2, 225)]))
    assert findings(swapped)["rows whose next observation is not the following observation"]["count"] == 2


def test_repeated_rows_and_episodes():
    data = transitions()
    rows = np.r_[np.arange(225), np.arange(90, 150), np.arange(3)]
    twice = replace(data.subset(rows), episode=np.r_[data.episode, np.full(60, 5), np.full(3, 6)])
    found = findings(twice)
    whole = found["episodes that repeat an earlier episode row for row"]
    assert (whole["count"], whole["examples"], whole["level"]) == (1, ["episode 5"], "warning")
    again = found["rows that repeat an earlier row"]
    assert again["count"] == 63 and again["examples"][0] == "row 225 (episode 5, step 0)"
    assert found["episodes that end neither terminated nor truncated"]["examples"] == ["episode 6"]


def test_time_limits_stored_as_terminal_states():
    data = transitions((20, 50, 50, 50))
    ends = data.terminated | data.truncated
    none = np.zeros(170, bool)
    found = findings(replace(data, terminated=ends, truncated=none))
    suspect = found["episodes, the longest of them, that end terminated after exactly 50 steps"]
    assert suspect["count"] == 3 and suspect["level"] == "warning" and "time limit" in suspect["advice"]
    constant = transitions((30, 30, 30))
    ends = constant.terminated | constant.truncated
    found = findings(replace(constant, terminated=ends, truncated=none[:90]))
    assert found["episodes, all of them, that end terminated after exactly 30 steps"]["share"] == 1
    # One longest episode is no time limit, and neither is one that was truncated there.
    assert not any("exactly" in what for what in findings(transitions((20, 50, 49, 48))))
    assert not any("exactly" in what for what in findings(data))


def test_ends_that_are_odd():
    data = transitions()
    ends, none = data.terminated | data.truncated, np.zeros(225, bool)
    never = findings(replace(data, terminated=none, truncated=ends))
    assert never["episodes, all of them, that are truncated; nothing terminates"]["level"] == "info"
    always = findings(replace(data, terminated=ends, truncated=none))
    assert always["episodes, all of them, that end terminated; none was truncated"]["count"] == 5
    both = findings(replace(data, terminated=ends, truncated=ends))
    assert both["episodes that end both terminated and truncated"]["count"] == 5
    inside = ends | (np.arange(225) == 5)
    assert (
        findings(replace(data, terminated=inside))["rows that are terminated, and whose episode goes on"]["count"] == 1
    )
    going_on = findings(replace(data, truncated=inside))["rows that are truncated, and whose episode goes on"]
    assert going_on["examples"] == ["row 5 (episode 0, step 5)"]


def test_outliers_and_constants():
    data = transitions()
    data.rewards[17] = 500
    found = findings(data)
    assert found["rows with 'rewards' further than 10 robust deviations out"]["examples"] == [
        "row 17 (episode 0, step 17)"
    ]
    for array in (data.observations, data.next_observations):
        array[:, 1] = 4
    data.rewards[:] = -1
    found = findings(data)
    assert found["dimensions of the observations that never change"]["examples"] == ["dimension 1: 4"]
    assert found["rows, all of them, with a reward of -1"]["level"] == "warning"


def test_actions_beyond_and_at_their_bounds():
    data = transitions()
    data.actions[:30, 0] = 1.5
    found = findings(data)
    assert found["rows with actions outside their bounds"]["count"] == 30
    data.actions[:] = np.where(data.actions > 0, 1, -0.995)
    data.actions[:10] = 0
    report = inspect_transitions(data)
    assert report["actions"]["saturated"] == pytest.approx([215 / 225] * 2)
    found = {f["what"]: f for f in report["findings"]}
    assert found["rows whose action is at a bound in every dimension"]["count"] == 215
    unbounded = replace(data, spec=replace(data.spec, low=(-np.inf,) * 2, high=(np.inf,) * 2))
    assert inspect_transitions(unbounded)["actions"]["saturated"] == [0, 0]


def test_images():
    frames = np.random.default_rng(0).integers(0, 256, (31, 3, 8, 8), np.uint8)
    base = transitions(lengths=(10, 20), discrete=True)
    ends = np.isin(np.arange(30), [9, 29])
    following = Chained(frames[:30], ends, frames[[10, 30]])
    spec = replace(base.spec, observation=(3, 8, 8), image=True)
    data = replace(base, observations=frames[:30], next_observations=following, spec=spec)
    report = inspect_transitions(data)
    assert report["coverage"]["dimensions"] == 192 and report["findings"] == []
    assert "3 x 8 x 8 images" in printed(report)
    swapped = replace(data, next_observations=np.asarray(following)[::-1])
    assert findings(swapped)["rows whose next observation is not the following observation"]["count"] >= 27


def test_notes_and_markup_are_printed_as_they_stand():
    data = replace(transitions(), source="[red]x[/red]", notes=["[bold]left out[/bold]"])
    text = printed(inspect_transitions(data))
    assert "[red]x[/red]" in text and "[bold]left out[/bold]" in text


def test_time_grows_with_the_rows():
    def seconds(episodes: int) -> float:
        data = transitions((100,) * episodes)
        started = time.process_time()
        inspect_transitions(data)
        return time.process_time() - started

    seconds(10)
    assert seconds(1600) < 16 * seconds(400)
