"""Prompts of the user with a verifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.feedback.readers import read_feedback
from guerdon.feedback.records import Record
from guerdon.rewards.compose import Rewards
from guerdon.rewards.verifiers import NAMES
from guerdon.tasks.base import Task

HELD_OUT = 0.1


def load_prompts(
    source: str, verifier: str | Mapping[str, float] | None, seed: int, train_size: int | None, test_size: int | None
) -> Task:
    """The prompts of a feedback file as a task; what the file says about completions is left aside.

    Which prompts are held out depends on the prompts alone, so that two runs with different seeds, and every method of
    a comparison, are judged by the same ones. Other arguments and errors as in `load_task`.
    """
    if verifier is None:
        raise ConfigError(f"the task '{source}' needs a verifier, one of {', '.join(NAMES)}; for example exact.")
    rewards = Rewards.of(verifier)
    feedback = read_feedback(source)
    if any(record.prompt is None for record in feedback.records):
        raise DataError(f"{source}: holds {feedback.kind}, which has no prompts; a task needs a column 'prompt'.")
    notes = []
    if feedback.kind != "prompt_only":
        notes.append(f"{source} holds {feedback.kind}; only its prompts are used.")
    prompts = [replace(record, completions=[], scores=None) for record in feedback.records]
    for record in prompts:
        rewards.check(record)
    share = HELD_OUT if test_size is None else min(test_size / len(prompts), 0.5)
    train, test = replace(feedback, records=prompts).split(share)
    task = Task(source, _subset(train.records, train_size, seed), _subset(test.records, test_size, 0), rewards, notes)
    for side, wanted, records in (("training", train_size, task.train), ("held-out", test_size, task.test)):
        if wanted is not None and len(records) < wanted:
            notes.append(f"{len(records)} {side} prompts, not the {wanted} asked for.")
    return task


def _subset(records: list[Record], size: int | None, seed: int) -> list[Record]:
    """`size` of the records, chosen by the seed and left in their order."""
    if size is None or size >= len(records):
        return records
    return [records[i] for i in np.sort(np.random.default_rng(seed).permutation(len(records))[:size])]
