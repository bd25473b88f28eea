"""Collecting with a real sampler: what is written, and going on after a kill as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guerdon.errors import ConfigError, GuerdonError
from guerdon.feedback.readers import read_feedback
from guerdon.language.forward import GroupModel
from guerdon.language.sampling import make_sampler
from guerdon.language.sampling.base import Completion, Sampler, Sampling
from guerdon.language.templates import stop_ids
from guerdon.tasks import Task, load_task
from guerdon.tasks import collect as module
from guerdon.tasks.collect import collect

SPEC = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&train_size=12&test_size=3"
SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(SPEC, verifier={"correct": 1.0, r"format:.{3,}": 0.5})


@pytest.fixture
def sampler(tiny: tuple[Any, Any]) -> Sampler:
    model, tokenizer = tiny
    return make_sampler("local", GroupModel(model), tokenizer, stop_ids(tokenizer))


class Killed(Exception):
    pass


class DyingSampler:
    """The real sampler, which dies at its second call."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.calls = sampler, 0

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        self.calls += 1
        if self.calls == 2:
            raise Killed
        return self.sampler.sample(prompts, seeds, sampling)

    def sync(self, model: Any) -> None:
        self.sampler.sync(model)


def run(task: Task, sampler: Sampler, tokenizer: Any, out: Path, **changed: Any) -> dict[str, Any]:
    how: dict[str, Any] = {"n": 4, "prompts": 10, "sampling": SAMPLING, "seed": 3} | changed
    return collect(task, sampler, tokenizer, out=out, **how)


def test_rows_are_scored_feedback(task: Task, sampler: Sampler, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "samples.jsonl"
    seen: list[tuple[int, int]] = []
    summary = run(task, sampler, tiny[1], out, progress=lambda done, total: seen.append((done, total)))
    feedback = read_feedback(str(out))
    assert feedback.kind == "scored" and len(feedback.records) == 10
    for record, asked in zip(feedback.records, task.train, strict=False):
        assert record.prompt == asked.prompt and record.columns["answer"] == asked.columns["answer"]
        texts = [completion[0]["content"] for completion in record.completions]
        again = task.score(asked, texts)
        np.testing.assert_allclose(record.scores, again["reward"])
        np.testing.assert_allclose(record.columns["rewards"]["format"], again["format"])
        assert record.columns["finished"] == [bool(f) for f in record.columns["finished"]] and len(texts) == 4
    scores = [record.scores for record in feedback.records]
    assert summary["reward"] == pytest.approx(np.mean(scores)) and summary["components"]["format"] > 0
    assert summary["informative"] == pytest.approx(np.mean([len(set(s or [])) > 1 for s in scores]))
    assert (summary["prompts"], summary["completions"], summary["resumed"]) == (10, 40, 0)
    assert seen[0] == (0, 10) and seen[-1] == (10, 10)
    assert list(out.parent.iterdir()) == [out]


def test_a_killed_collection_goes_on_to_the_same_file(
    task: Task, sampler: Sampler, tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    run(task, sampler, tiny[1], whole)
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 4)
    with pytest.raises(Killed):
        run(task, DyingSampler(sampler), tiny[1], resumed)
    partial = tmp_path / "resumed.jsonl.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1 + 4 and not resumed.exists()
    with partial.open("a") as file:
        file.write('{"prompt": "half a li')
    with pytest.raises(ConfigError, match=r"was begun with another n, sampling; delete it to start afresh"):
        run(task, sampler, tiny[1], resumed, n=5, sampling=Sampling(max_new_tokens=7))
    assert run(task, sampler, tiny[1], resumed)["resumed"] == 4
    assert resumed.read_bytes() == whole.read_bytes() and not partial.exists()
    other = tmp_path / "other.jsonl"
    run(task, sampler, tiny[1], other, seed=4)
    assert other.read_bytes() != whole.read_bytes()


def test_what_was_sampled_outlives_a_verifier_that_fails(
    sampler: Sampler, tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_rewards.py").write_text("def f(prompt, completion, answer):\n    return 1 / (answer != '3')\n")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} + 0 =", "answer": str(i)} for i in range(8)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("prompts.jsonl", verifier="python:failing_rewards.f", test_size=1)
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 1)
    with pytest.raises(GuerdonError, match=r"failing_rewards\.f raised ZeroDivisionError.*record: prompts\.jsonl:4"):
        run(task, sampler, tiny[1], tmp_path / "out.jsonl", prompts=len(task.train))
    before = [record.columns["answer"] for record in task.train].index("3")
    assert len((tmp_path / "out.jsonl.partial.jsonl").read_text().splitlines()) == 1 + before


def test_more_prompts_than_there_are(task: Task, sampler: Sampler, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot collect 4 completions for each of 13 prompts: .* has 12"):
        run(task, sampler, tiny[1], tmp_path / "out.jsonl", prompts=13)
    assert list(tmp_path.iterdir()) == []
