"""Claims run for real: swapped arms, processes, going on, and what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from guerdon.claims import Above, get_claim, running
from guerdon.claims.running import reproduce
from guerdon.claims.showing import plot, tables
from guerdon.errors import ConfigError

GRID = replace(
    get_claim(1),
    arms={label: get_claim(1).arms[label] for label in ("riql", "iql")},
    settings={"dynamics": {"corruption": "dynamics", "n": 20}},
    criteria=(Above("riql", "iql", 0.2),),
    seeds=8,
    together=4,
)
SMALL = replace(
    get_claim(62),
    settings={"many-answers": {"right": "many", "vocabulary": 6, "rounds": 3, "lrs": [0.05]}},
    quick={},
    together=1,
)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch) -> Path:
    """In the place of the library's results."""
    directory = tmp_path / "results"
    directory.mkdir()
    monkeypatch.setattr(running, "RESULTS", directory)
    return directory


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> tuple[Path, dict]:
    """The quick version of a part of claim 01, with all its seeds."""
    out = tmp_path_factory.mktemp("grid")
    return out, reproduce(GRID, out=out, quick=True, seeds=8)


def seed_scores(result: dict) -> list[dict[str, float]]:
    return [row["seeds"] for row in result["rows"]]


def test_the_claim_holds_and_with_its_arms_swapped_it_does_not(grid, tmp_path):
    _, result = grid
    assert result["verdict"] == "holds"
    swapped = replace(GRID, arms={"riql": GRID.arms["iql"], "iql": GRID.arms["riql"]})
    broken = reproduce(swapped, out=tmp_path, quick=True, seeds=8)
    assert broken["verdict"] == "does not hold"
    assert broken["sentences"][0] == "The claim does not hold here."
    assert seed_scores(broken) == seed_scores(result)[::-1]


def test_two_processes_give_the_numbers_of_one(tmp_path):
    alone = reproduce(SMALL, out=tmp_path / "1", quick=True, seeds=2)
    together = reproduce(SMALL, out=tmp_path / "2", quick=True, seeds=2, jobs=2)
    assert seed_scores(together) == seed_scores(alone)
    assert all(0.3 < score < 0.9 for scores in seed_scores(alone) for score in scores.values())
    assert together["criteria"] == alone["criteria"]


def test_ray_gives_the_numbers_of_one_process(tmp_path):
    pytest.importorskip("ray")
    alone = reproduce(SMALL, out=tmp_path / "1", quick=True, seeds=2)
    assert seed_scores(reproduce(SMALL, out=tmp_path / "2", quick=True, seeds=2, ray=True)) == seed_scores(alone)


def test_seeds_do_not_depend_on_those_that_are_tried_with_them(grid, tmp_path):
    _, result = grid
    apart = reproduce(replace(GRID, together=1), out=tmp_path, quick=True, seeds=3)
    for each, among in zip(seed_scores(apart), seed_scores(result), strict=True):
        assert each == pytest.approx({seed: among[seed] for seed in each}, abs=1e-6)


def test_the_same_command_goes_on_with_what_is_there(tmp_path):
    lines: list[str] = []
    first = reproduce(SMALL, out=tmp_path, quick=True, seeds=2, say=lines.append)
    assert len(lines) == 6 and lines[0].startswith("62 many-answers nft, seeds 0-0: ")
    (tmp_path / "62-quick/many-answers/rft/seeds-1-1.json").unlink()
    lines.clear()
    again = reproduce(SMALL, out=tmp_path, quick=True, seeds=3, say=lines.append)
    assert sorted(line.partition(":")[0] for line in lines) == [
        "62 many-answers dr-grpo, seeds 2-2",
        "62 many-answers nft, seeds 2-2",
        "62 many-answers rft, seeds 1-1",
        "62 many-answers rft, seeds 2-2",
    ]
    assert [{k: v for k, v in row.items() if k != "2"} for row in seed_scores(again)] == seed_scores(first)
    assert [list(row) for row in seed_scores(again)] == [["0", "1", "2"]] * 3


def test_trials_made_with_other_settings_are_not_taken(tmp_path):
    reproduce(SMALL, out=tmp_path, quick=True, seeds=2)
    with pytest.raises(ConfigError, match=r"seeds-0-0.json was made with other settings"):
        reproduce(replace(SMALL, quick={"rounds": 4}), out=tmp_path, quick=True, seeds=2)


def test_only_the_full_version_with_all_its_seeds_is_kept_in_the_library(grid, results, tmp_path):
    out, result = grid
    assert "quick version" in result["sentences"][-1]
    assert json.loads((out / "01-quick/result.json").read_text()) == json.loads(json.dumps(result))
    reproduce(GRID, out=tmp_path, seeds=2)
    assert list(results.iterdir()) == []
    full = reproduce(replace(GRID, seeds=2), out=tmp_path)
    assert json.loads((results / "01.json").read_text()) == json.loads(json.dumps(full))
    assert full["environment"]["guerdon"] and full["environment"]["cores"] >= 1 and full["seconds"] > 0
    assert "quick version" not in full["sentences"][-1]


@pytest.mark.parametrize(
    ("options", "said"), [({"seeds": 1}, "at least 2"), ({"jobs": 0}, "jobs has to be at least 1")]
)
def test_what_cannot_be_meant_is_refused(options, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        reproduce(GRID, out=tmp_path, quick=True, **options)


def test_a_result_is_shown(grid):
    from rich.console import Console

    _, result = grid
    console = Console(width=160)
    with console.capture() as capture:
        console.print(*tables(result), sep="\n")
    text = capture.get()
    assert "riql is above iql by more than 0.2" in text and "holds" in text and "over 8 seeds" in text
    hostile = {**result, "rows": [{**row, "arm": "<script>"} for row in result["rows"]]}
    image = ElementTree.fromstring(plot(hostile))
    space = "{http://www.w3.org/2000/svg}"
    assert [t.text for t in image.iter(f"{space}text")].count("<script>") == 2
    assert len(list(image.iter(f"{space}circle"))) == 2
    assert sum(path.get("class", "").startswith("seed") for path in image.iter(f"{space}path")) == 16
