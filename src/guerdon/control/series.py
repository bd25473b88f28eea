"""Time series from files of columns, and how well their future was predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.control.columns import decoding
from guerdon.control.spaces import Spec
from guerdon.control.transitions import Transitions
from guerdon.errors import DataError, near

SUFFIXES = (".csv", ".parquet")
_REST = 0.01  # weight of the unknown rest of a return below which it counts as known


def read_series(source: str) -> Transitions:
    """One episode without choices from a table of rows in the order of time: what is seen, and what comes of it.

    Row t shows all columns of numbers; its reward is the target's value in row t + 1. After the last but one the
    recording is cut (`truncated`).

    Args:
        source: `FILE`, or `FILE?target=COLUMN`; without a target it is the last column of numbers.

    Raises:
        DataError: no such file or column, no numbers in it, or some of them missing.
    """
    from pyarrow import csv, parquet, types

    name, _, query = source.partition("?")
    path, (key, _, target) = Path(name).expanduser(), query.partition("=")
    if query and (key != "target" or not target):
        raise DataError(f"{source}: what follows the file is target=COLUMN.")
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        kind = "no such file" if path.suffix.lower() in SUFFIXES else "not a file of columns"
        raise DataError(f"{name}: {kind}. A series to predict is a {' or '.join(SUFFIXES)} file, a row for each time.")
    with decoding(name):
        whole = csv.ParseOptions(ignore_empty_lines=False)
        is_csv = path.suffix.lower() == ".csv"
        table = csv.read_csv(path, parse_options=whole) if is_csv else parquet.read_table(path)
    numbers = [f.name for f in table.schema if types.is_integer(f.type) or types.is_floating(f.type)]
    left_out = [column for column in table.column_names if column not in numbers]
    if len(table) < 2 or not numbers:
        raise DataError(f"{name}: {len(table)} rows and {len(numbers)} columns of numbers: too little to predict.")
    target = target or numbers[-1]
    if target not in numbers:
        raise DataError(f"{name}: no column of numbers is called '{target}'.{near(target, numbers)}")
    values = np.stack([table[column].to_numpy().astype(np.float64) for column in numbers], 1)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise DataError(
            f"{name}: row {row + 1} has no finite number in '{numbers[column]}'. Fill it in, or drop row or column."
        )
    notes = [f"{name}: predicts '{target}' from {', '.join(numbers)}"]
    if left_out:
        notes.append(f"{name}: no numbers in {', '.join(left_out)}, left out")
    steps = len(values) - 1
    return Transitions(
        observations=values[:-1].astype(np.float32),
        actions=np.zeros(steps, np.int64),
        rewards=values[1:, numbers.index(target)].astype(np.float32),
        next_observations=values[1:].astype(np.float32),
        terminated=np.zeros(steps, bool),
        truncated=np.arange(steps) == steps - 1,
        episode=np.zeros(steps, np.int64),
        spec=Spec((len(numbers),), False, True, 1, (), ()),
        source=source,
        notes=notes,
    )


def running_means(x: np.ndarray, decay: float) -> np.ndarray:
    """Exponentially weighted means over time of x (T, D), those of few values without their bias towards 0."""
    mean, means = np.zeros(x.shape[1]), np.empty(x.shape)
    for t, row in enumerate(x):
        mean = decay * mean + (1 - decay) * row
        means[t] = mean / (1 - decay ** (t + 1))
    return means.astype(np.float32)


class Forecast:
    """What S learners predicted of each of T steps, and what came of it.

    Attributes:
        values: (S, T) predictions, nan where there is none yet.
        returns: (T,) G_t = sum_k gamma^k c_{t+k}; nan towards the end, where more than a hundredth is not known.
    """

    def __init__(self, seeds: int, rewards: np.ndarray, gamma: float) -> None:
        self.values = np.full((seeds, len(rewards)), np.nan)
        self.returns, total = np.empty(len(rewards)), 0.0
        for t in reversed(range(len(rewards))):
            self.returns[t] = total = rewards[t] + gamma * total
        self.returns[gamma ** np.arange(len(rewards), 0, -1) > _REST] = np.nan

    def errors(self, start: int, stop: int) -> dict[str, list[float]]:
        """Of the steps from `start` to `stop`: `error/rmse`, and `error/share` of the variance of what came."""
        known = slice(start, stop)
        squared = (self.values[:, known] - self.returns[known]) ** 2
        if np.isnan(squared).all():
            return {}
        mean = np.nanmean(squared, 1)
        return {"error/rmse": np.sqrt(mean).tolist(), "error/share": (mean / np.nanvar(self.returns[known])).tolist()}

    def write(self, path: Path, seeds: list[int]) -> None:
        """A CSV file with a row for each step: its return and each seed's prediction of it."""
        rows = np.column_stack([np.arange(len(self.returns)), self.returns, self.values.T])
        header = ",".join(["row", "return", *(f"seed-{seed}" for seed in seeds)])
        np.savetxt(path, rows, ["%d", *["%.9g"] * (len(seeds) + 1)], ",", header=header, comments="", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values[:] = np.asarray(state["values"])
