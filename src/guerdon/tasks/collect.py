"""Sampling and verifying answers into a feedback file that every method can read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, GuerdonError
from guerdon.feedback.writers import write_feedback
from guerdon.language.sampling.base import Sampler, Sampling, completion_seeds
from guerdon.language.templates import prompt_ids
from guerdon.tasks.base import Task

PROMPTS_AT_ONCE = 32


def collect(
    task: Task,
    sampler: Sampler,
    tokenizer: Any,
    *,
    n: int,
    prompts: int,
    sampling: Sampling,
    seed: int,
    out: str | Path,
    policy: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Sample `n` completions for each of the first `prompts` training prompts, verify them and write `out`.

    Rows are of the type `scored` (prompt, completions, scores), with the task's columns, `finished` (per completion,
    whether it ended by itself) and `rewards` (component -> one number per completion). Until the end they stand in
    `out` + `.partial.jsonl`: called again with the same arguments after it was killed, it goes on from there, and gives
    the same file as if it had not been.

    Args:
        policy: identity of who answers, a name or fingerprint; rows of another one are not continued.
        progress: called with the numbers of prompts done and asked for.

    Returns:
        Plain data: prompts, completions, resumed (prompts found in the partial file), reward (mean), components (mean
        of each), finished (share), informative (share of the prompts whose completions do not all score the same).

    Raises:
        ConfigError: more prompts than the task has, or a partial file that was begun with other arguments.
        GuerdonError: a verifier of the user failed; what was collected before is kept.
    """
    if not 1 <= prompts <= len(task.train) or n < 1:
        raise ConfigError(
            f"cannot collect {n} completions for each of {prompts} prompts: the task '{task.name}' has "
            f"{len(task.train)} training prompts."
        )
    out = Path(out)
    partial = out.with_name(out.name + ".partial.jsonl")
    identity = {"task": task.digest, "n": n, "seed": seed, "policy": policy, "sampling": asdict(sampling)}
    with kept(partial):
        rows = _resume(partial, json.loads(json.dumps(identity)))
    resumed = len(rows)
    progress(min(resumed, prompts), prompts)
    with kept(partial), partial.open("a", encoding="utf-8") as file:
        for first in range(resumed, prompts, PROMPTS_AT_ONCE):
            records = task.train[first : min(first + PROMPTS_AT_ONCE, prompts)]
            ids = [prompt_ids(record.prompt or "", tokenizer) for record in records]
            seeds = [completion_seeds(n, "collect", seed, first + i) for i in range(len(records))]
            for record, completions in zip(records, sampler.sample(ids, seeds, sampling), strict=True):
                texts = [completion.text for completion in completions]
                finished = [completion.finished for completion in completions]
                scores = {name: values.tolist() for name, values in task.score(record, texts).items()}
                rows.append(
                    {
                        "prompt": record.prompt,
                        "completions": [_answer(text) for text in texts] if record.conversational else texts,
                        "scores": scores.pop("reward"),
                        **record.columns,
                        "finished": finished,
                        "rewards": scores,
                    }
                )
                file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            progress(len(rows), prompts)
    rows = rows[:prompts]
    write_feedback(out, rows)
    partial.unlink()
    return _summary(rows, min(resumed, prompts))


@contextmanager
def kept(partial: Path) -> Iterator[None]:
    """Whatever ends a collection that the user can mend is told with where the rows are that there are already."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, GuerdonError) as error:
        what = f"{partial} cannot be written: {error.strerror}." if isinstance(error, OSError) else str(error)
        there = f" What was collected is kept in {partial}: the same command goes on." if partial.exists() else ""
        raise GuerdonError(what + there) from error


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _resume(partial: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a collection that was killed, less a last line that was cut; begins the file where there is none."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        partial.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        return []
    begun = json.loads(whole[0])
    if begun != identity:
        different = ", ".join(name for name in identity if begun.get(name) != identity[name])
        raise ConfigError(
            f"{partial} was begun with another {different}; delete it to start afresh, or collect as before to go on."
        )
    os.truncate(partial, sum(map(len, whole)))
    return [json.loads(line) for line in whole[1:]]


def _summary(rows: list[dict[str, Any]], resumed: int) -> dict[str, Any]:
    scores = [row["scores"] for row in rows]
    return {
        "prompts": len(rows),
        "completions": sum(map(len, scores)),
        "resumed": resumed,
        "reward": float(np.mean(scores)),
        "components": {name: float(np.mean([row["rewards"][name] for row in rows])) for name in rows[0]["rewards"]},
        "finished": float(np.mean([row["finished"] for row in rows])),
        "informative": float(np.mean([len(set(s)) > 1 for s in scores])),
    }
