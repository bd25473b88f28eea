"""Files of prompts as tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guerdon.errors import DataError
from guerdon.tasks import load_task


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1, "pattern": "^[0-9]+$"} for i in range(60)]
    return write(tmp_path / "sums.jsonl", [*rows, *rows[:20]])


def prompts(records: list[Any]) -> list[str]:
    return [str(record.prompt) for record in records]


def test_a_prompt_is_on_one_side_with_all_its_rows_and_seeds_change_no_side(file: str) -> None:
    first, second = load_task(file, verifier="number", seed=0), load_task(file, verifier="number", seed=1)
    assert not set(prompts(first.train)) & set(prompts(first.test))
    assert len(first.train) + len(first.test) == 80 and len(set(prompts(first.test))) == 6
    assert prompts(first.test) == prompts(second.test) and prompts(first.train) == prompts(second.train)
    assert first.digest == second.digest and first.binary and first.notes == []


def test_sizes_that_are_asked_for(file: str) -> None:
    first = load_task(file, verifier="number", train_size=10, test_size=15)
    second = load_task(file, verifier="number", train_size=10, test_size=15, seed=1)
    assert len(first.train) == len(second.train) == 10 and prompts(first.train) != prompts(second.train)
    assert len(first.test) >= 10 and prompts(first.test) == prompts(second.test)
    assert first.digest != second.digest
    everything = load_task(file, verifier="number", train_size=500)
    assert everything.notes == [f"{len(everything.train)} training prompts, not the 500 asked for."]


def test_scores_and_finished_flags(file: str) -> None:
    task = load_task(file, verifier={"number": 1.0, "regex": 0.5})
    record = next(r for r in task.train if r.columns["answer"] == 8)
    scores = task.score(record, ["8", "it is 8", "9"], finished=[True, False, True])
    assert {name: values.tolist() for name, values in scores.items()} == {
        "reward": [1.5, 1, 0.5],
        "number": [1, 1, 0],
        "regex": [1, 0, 1],
        "finished": [1, 0, 1],
    }
    assert "finished" not in task.score(record, ["8"])


def test_the_digest_follows_items_and_rewards(file: str, tmp_path: Path) -> None:
    task = load_task(file, verifier="number")
    assert load_task(file, verifier="exact").digest != task.digest
    assert load_task(file, verifier={"number": 2.0}).digest != task.digest
    Path(file).write_text(Path(file).read_text().replace('"answer": 3,', '"answer": 4,'))
    assert load_task(file, verifier="number").digest != task.digest


def test_only_the_prompts_of_other_feedback_are_used(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "answer": "a"} for i in range(20)]
    task = load_task(write(tmp_path / "pairs.jsonl", rows), verifier="exact")
    assert all(record.completions == [] and record.scores is None for record in task.train + task.test)
    assert task.notes == [f"{tmp_path / 'pairs.jsonl'} holds preference; only its prompts are used."]
    assert task.score(task.train[0], ["a"])["reward"].tolist() == [1]


def test_rows_that_cannot_be_judged_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "some.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b"}])
    with pytest.raises(DataError, match=r"some\.jsonl:2: the verifier 'exact' needs a column 'answer'"):
        load_task(file, verifier="exact")
    file = write(tmp_path / "texts.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="holds language_modeling, which has no prompts"):
        load_task(file, verifier="exact")
