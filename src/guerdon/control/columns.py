"""What all files of trajectories have in common: how they fail, and what their arrays become."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from guerdon.control.spaces import Spec
from guerdon.control.transitions import Chained, Transitions
from guerdon.errors import DataError


@contextlib.contextmanager
def decoding(source: str) -> Iterator[None]:
    """Whatever breaks while a library decodes a file (each breaks in many ways) becomes one message."""
    try:
        yield
    except Exception as error:
        if "pickle" in str(error).lower():
            raise DataError(
                f"{source}: holds Python objects (or is no .npz file at all), which could run code when they are "
                "loaded. Save arrays of numbers, all rows of one shape."
            ) from error
        missing = "a missing truncated field; " if "truncations" in str(error) else ""
        message = f"{source}: {missing}not a whole file ({reason(error)}). Write or download it again."
        raise DataError(message) from error


def reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def library(name: str, source: str) -> Any:
    """h5py or minari, which only some sources need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{source}: needs {name}: pip install 'guerdon[control]'.") from error


def as_observations(array: np.ndarray, name: str, source: str, notes: list[str]) -> tuple[np.ndarray, bool]:
    """(float32 vectors or uint8 images as environments give them, whether they are images)."""
    if array.dtype in (np.uint8, bool) and array.ndim > 2:
        from gymnasium.spaces import Box

        from guerdon.control.simulators import encoding

        high = 1 if array.dtype == bool else 255
        seen = encoding(Box(0, high, array.shape[1:], array.dtype.type), f"{source}: '{name}'")
        array = array if seen.encode is None else np.stack([seen.encode(frame) for frame in array])
        if seen.space.dtype == np.uint8:
            return array, True
    if array.ndim != 2:
        notes.append(f"'{name}' of shape {array.shape[1:]}, flattened")
    return array.reshape(len(array), -1).astype(np.float32, copy=False), False


def as_actions(array: np.ndarray, source: str, notes: list[str]) -> tuple[np.ndarray, Spec]:
    """The actions and a Spec of them (its observation still empty), by what the data show."""
    if array.dtype.kind in "bui":
        if array.size != len(array):
            raise DataError(
                f"{source}: 'actions' are whole numbers of shape {array.shape[1:]}: several discrete choices at once "
                "fit no policy here. Number their combinations, or write them as floats if they are continuous."
            )
        array = array.reshape(-1).astype(np.int64)
        if array.min() < 0:
            raise DataError(f"{source}: 'actions' is {array.min()} at row {array.argmin()}: actions count from 0.")
        count = int(array.max()) + 1
        notes.append(f"discrete actions without a count: the largest that occurs makes it {count}")
        return array, Spec((), False, True, count, (), ())
    array = array.reshape(len(array), -1).astype(np.float32, copy=False)
    low, high = np.fmin.reduce(array), np.fmax.reduce(array)  # NaN is told elsewhere
    if (low >= -1).all() and (high <= 1).all():
        low, high = np.full_like(low, -1), np.full_like(high, 1)
    else:
        notes.append("actions without bounds and beyond [-1, 1]: the extremes that occur are their bounds")
    return array, Spec((), False, False, array.shape[1], tuple(low.tolist()), tuple(high.tolist()))


def chain(observations: np.ndarray, ends: np.ndarray, finals: np.ndarray) -> np.ndarray | Chained:
    """The next observations of rows in order: those of the following rows, and `finals` where episodes end."""
    chained = Chained(observations, ends, finals)
    return chained if observations.dtype == np.uint8 else chained[:]


def note_count(notes: list[str], count: int, what: str) -> None:
    if count:
        notes.append(f"{count:,} {what}")


STEPWISE = ("actions", "rewards", "terminations", "truncations")


def join_episodes(
    episodes: Iterable[tuple[str, Mapping[str, Any]]], source: str, env: str | None, spec: Spec | None, notes: list[str]
) -> Transitions:
    """Episodes of T steps and T + 1 observations, each with where it stands, as transitions."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("observations", "finals", *STEPWISE)}
    empty = open_ended = 0
    for where, columns in episodes:
        for name in ("observations", *STEPWISE):
            if name not in columns:
                missing = "a missing truncated field: " if name == "truncations" else ""
                raise DataError(f"{where}: {missing}has no '{name}'. It holds {', '.join(columns)}.")
            if columns[name].dtype.kind not in "buif":
                raise DataError(f"{where}: '{name}' holds {columns[name].dtype}, not numbers.")
        steps = len(columns["rewards"])
        for name in ("observations", *STEPWISE):
            expected = steps + (name == "observations")
            if len(columns[name]) != expected:
                raise DataError(
                    f"{where}: '{name}' has {len(columns[name])} rows; {steps} rewards need {expected} of them. "
                    "Record the episode again, or leave it out."
                )
        if not steps:
            empty += 1
            continue
        seen = columns["observations"]
        seen = seen if seen.dtype == np.uint8 and seen.ndim == 4 else seen.reshape(steps + 1, -1).astype(np.float32)
        parts["observations"].append(seen[:-1])
        parts["finals"].append(seen[-1])
        for name in STEPWISE:
            parts[name].append(columns[name])
        open_ended += not (columns["terminations"][-1] or columns["truncations"][-1])
    if not parts["finals"]:
        raise DataError(f"{source}: holds no transitions.")
    note_count(notes, empty, "episodes without a step, left out")
    note_count(notes, open_ended, "episodes that end neither terminated nor truncated: they count as truncated")
    lengths = [len(part) for part in parts["rewards"]]
    episode = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.append(np.diff(episode) != 0, True)
    joined = {name: _concatenated(values, f"{source}: '{name}'") for name, values in parts.items() if name != "finals"}
    observations = joined["observations"]
    declared = spec is not None and bool(np.isfinite([*spec.low, *spec.high]).all())
    if spec is None:
        actions, spec = as_actions(joined["actions"], source, notes)
        spec = replace(spec, observation=observations.shape[1:], image=observations.ndim == 4)
    else:
        actions, told = as_actions(joined["actions"].astype(np.int64 if spec.discrete else np.float32), source, [])
        if told.actions > spec.actions if spec.discrete else told.actions != spec.actions:
            raise DataError(f"{source}: 'actions' need {told.actions}, the action space has {spec.actions}.")
        if not declared:
            spec = replace(spec, low=told.low, high=told.high)
            notes.append("actions without finite bounds: the extremes that occur, or [-1, 1], are their bounds")
    terminated = joined["terminations"].astype(bool)
    return Transitions(
        observations,
        actions,
        joined["rewards"].astype(np.float32),
        chain(observations, ends, np.stack(parts["finals"])),
        terminated,
        joined["truncations"].astype(bool) | (ends & ~terminated),
        episode,
        spec,
        source,
        env,
        notes,
        declared,
    )


def _concatenated(parts: list[np.ndarray], where: str) -> np.ndarray:
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise DataError(f"{where} of several shapes in one data set: {', '.join(map(str, shapes))}.")
    return np.concatenate(parts)
