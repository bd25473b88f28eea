"""Trajectories as flat arrays in NPZ and HDF5 files: the layouts of D4RL and OGBench."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from guerdon.control.columns import as_actions, as_observations, chain, decoding, join_episodes, library, note_count
from guerdon.control.transitions import Chained, Transitions, blocks
from guerdon.errors import DataError, near

# Gymnasium's words beside those of D4RL.
_TERMINATED = ("terminals", "terminations", "terminated")
_TRUNCATED = ("timeouts", "truncations", "truncated")
_OGBENCH = ("masks", "valids", "qpos", "qvel", "button_states")  # columns that only OGBench's files have


def read_npz(path: Path, source: str) -> Transitions:
    with decoding(source):
        file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
        raise DataError(f"{source}: holds one array without a name: save all of them with numpy.savez(...).")
    with file:
        return _read_flat(file, source)


def read_hdf5(path: Path, source: str) -> Transitions:
    h5py = library("h5py", source)
    with decoding(source):
        file = h5py.File(path, "r")
    with file:
        with decoding(source):
            members = dict(file.items())
        if any(name.startswith("episode_") for name in members):
            return _read_episodes(members, source)
        columns = {name: item for name, item in members.items() if isinstance(item, h5py.Dataset)}
        return _read_flat(columns, source)


def _read_episodes(members: Mapping[str, Any], source: str) -> Transitions:
    """A `main_data.hdf5` of Minari without the metadata that belong beside it."""
    numbered = {int(name[8:]): group for name, group in members.items() if name[8:].isdigit()}

    def episodes() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, group in sorted(numbered.items()):
            with decoding(source):
                columns = {name: item[()] for name, item in group.items() if hasattr(item, "dtype")}
            if (seen := columns.get("observations")) is None or seen.dtype.kind not in "bif":
                raise DataError(
                    f"{source}: what the observations mean is in the metadata.json that Minari writes beside this "
                    "file: bring it along."
                )
            columns["observations"], _ = as_observations(seen, "observations", source, [])
            yield f"{source}: episode {number}", columns

    notes = ["no metadata.json beside it: spaces and environment are not known"]
    return join_episodes(episodes(), source, None, None, notes)


class _Columns:
    """The columns of a flat file, each checked for its kind and its number of rows as it is taken."""

    def __init__(self, columns: Mapping[str, Any], source: str) -> None:
        self.columns, self.source = columns, source
        self.rows: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def first(self, names: Iterable[str]) -> str | None:
        """The first of these names that there is."""
        return next((name for name in names if name in self.columns), None)

    def take(self, name: str) -> np.ndarray:
        if name not in self.columns:
            raise DataError(
                f"{self.source}: has no '{name}'.{near(name, self.columns)} It holds {', '.join(sorted(self.columns))}."
            )
        with decoding(f"{self.source}: '{name}'"):
            array = np.asarray(self.columns[name][()])
        if array.dtype.kind not in "buif":
            raise DataError(f"{self.source}: '{name}' holds {array.dtype}, not numbers.")
        if array.ndim == 0 or not len(array):
            raise DataError(f"{self.source}: '{name}' is empty: there is nothing to learn from.")
        self.rows[name] = len(array)
        if len(set(self.rows.values())) > 1:
            told = ", ".join(f"'{n}' {count:,}" for n, count in self.rows.items())
            raise DataError(f"{self.source}: arrays of different numbers of rows: {told}. Each needs one row per step.")
        return array

    def scalars(self, name: str) -> np.ndarray:
        """A column of one number per row, (N,) or (N, 1)."""
        array = self.take(name)
        if array.size != len(array):
            raise DataError(f"{self.source}: '{name}' has shape {array.shape}: it must be one number per row.")
        return array.reshape(-1)

    def flags(self, name: str) -> np.ndarray:
        array = self.scalars(name)
        odd = np.flatnonzero((array != 0) & (array != 1))
        if len(odd):
            raise DataError(f"{self.source}: '{name}' is {array[odd[0]]} at row {odd[0]}: it must be 0 or 1.")
        return array.astype(bool)


def _read_flat(mapping: Mapping[str, Any], source: str) -> Transitions:
    columns = _Columns(mapping, source)
    notes: list[str] = []
    observations, image = as_observations(columns.take("observations"), "observations", source, notes)
    actions = columns.take("actions")
    given = None
    if "next_observations" in columns:
        given, _ = as_observations(columns.take("next_observations"), "next_observations", source, [])
        if given.shape != observations.shape:
            raise DataError(
                f"{source}: 'next_observations' have the shape {given.shape}, 'observations' {observations.shape}: "
                "they must be equal."
            )
    if (terminals := columns.first(_TERMINATED)) is None:
        if columns.first(("dones", "done")):
            raise DataError(
                f"{source}: 'dones' does not say whether the task ended or the time did. Write 'terminals' (the task "
                "ended) and 'timeouts' (the recording ended) instead."
            )
        columns.take("terminals")  # is missing, and says so
    timeouts = columns.first(_TRUNCATED)
    ogbench = timeouts is None and ("rewards" not in columns or columns.first(_OGBENCH) is not None)
    if ogbench:
        layout = _ogbench(columns, columns.flags(str(terminals)), given is None, notes)
    else:
        layout = _d4rl(columns, columns.flags(str(terminals)), timeouts, observations, given, notes)
    rewards = _rewards(columns, ogbench, notes)
    following: np.ndarray | Chained | None = given
    if following is None:
        if not len(rows := layout.rows):
            raise DataError(f"{source}: holds no transitions: no row is followed by another of its episode.")
        finals = observations[layout.after[layout.ends]]
        observations, actions, rewards = observations[rows], actions[rows], rewards[rows]
        following = chain(observations, layout.ends, finals)
    actions, spec = as_actions(actions, source, notes)
    return Transitions(
        observations,
        actions,
        rewards,
        following,
        layout.terminated,
        layout.truncated,
        np.cumsum(layout.ends) - layout.ends,
        replace(spec, observation=observations.shape[1:], image=image),
        source,
        notes=notes,
        declared=False,
    )


class _Layout(NamedTuple):
    """Which rows of a flat file are transitions, and how their episodes end; (N,) each, N the number of transitions."""

    rows: np.ndarray  # where they stand
    after: np.ndarray  # the row that holds the next observation, where the file has no column of them
    terminated: np.ndarray
    truncated: np.ndarray
    ends: np.ndarray


def _ogbench(columns: _Columns, terminals: np.ndarray, chained: bool, notes: list[str]) -> _Layout:
    """`terminals` end trajectories, `masks` = 0 ends the task.

    Without a column of next observations, the last row of a trajectory (`valids` = 0) is its last observation alone.
    """
    if "masks" in columns:
        terminated = ~columns.flags("masks")
    else:
        terminated = np.zeros(len(terminals), bool)
        notes.append("no 'masks': the task ends nowhere, and every trajectory counts as truncated")
    if not chained:
        rows, ends = np.arange(len(terminals)), terminals.copy()
        _close(ends, notes)
    else:
        unused = ~columns.flags("valids") if "valids" in columns else terminals.copy()
        _close(unused, notes)
        rows = np.flatnonzero(~unused)
        ends = unused[rows + 1]
        if "valids" not in columns:
            note_count(notes, (unused & terminated).sum(), "'masks' of 0 in a trajectory's last row, left out with it")
        note_count(notes, (unused & np.append(True, unused[:-1])).sum(), "trajectories of one observation, left out")
    terminated = terminated[rows]
    note_count(notes, (terminated & ~ends).sum(), "rows where the task ends and the trajectory goes on")
    return _Layout(rows, rows + 1, terminated, ends & ~terminated, ends)


def _d4rl(
    columns: _Columns,
    terminated: np.ndarray,
    timeouts: str | None,
    observations: np.ndarray,
    given: np.ndarray | None,
    notes: list[str],
) -> _Layout:
    """`terminals` end the task, `timeouts` the recording; either ends an episode.

    Without a column of next observations, what followed a timeout is not in the file: such rows are left out.
    """
    if timeouts is not None:
        truncated = columns.flags(timeouts)
    elif given is None:
        raise DataError(
            f"{columns.source}: a missing truncated field: without 'timeouts' (or 'next_observations') it cannot be "
            "told where an episode ran out of time, and the next episode would be taken for its future. Write "
            "'timeouts', 1 on the last row of every episode that did not end in a terminal state."
        )
    else:
        truncated = np.append(unchained(observations, given), False) & ~terminated
        notes.append(
            f"a missing truncated field ('timeouts'): {truncated.sum():,} episode ends told by rows whose next "
            "observation is not the following row's observation"
        )
    ends = terminated | truncated
    if given is not None:
        truncated[-1] |= _close(ends, notes)
        rows = np.arange(len(ends))
        return _Layout(rows, rows + 1, terminated, truncated, ends)
    unused = truncated & ~terminated
    note_count(notes, unused.sum(), "rows that end by timeout without a next observation, left out")
    if not ends[-1]:
        unused[-1] = True
        notes.append("the last episode does not end: its last row has no next observation and is left out")
    rows = np.flatnonzero(~unused)
    terminated = terminated[rows]
    ends = terminated | np.append(unused, True)[rows + 1]
    truncated = truncated[rows] | (ends & ~terminated)
    note_count(notes, terminated.sum(), "terminal rows without a next observation, which repeat their own")
    return _Layout(rows, np.where(terminated, rows, rows + 1), terminated, truncated, ends)


def unchained(observations: np.ndarray, following: np.ndarray | Chained) -> np.ndarray:
    """(N - 1,) bool: where the next observation of a row is not the observation of the row after it."""
    differs = np.zeros(len(observations) - 1, bool)
    for rows in blocks(observations[1:]):
        later = observations[1:][rows]
        differs[rows] = (following[rows] != later).reshape(len(later), -1).any(axis=1)
    return differs


def _close(ends: np.ndarray, notes: list[str]) -> bool:
    """The end of the file ends the last episode; True where it had not ended before."""
    opened = not ends[-1]
    if opened:
        ends[-1] = True
        notes.append("the last episode does not end: it counts as truncated where the file ends")
    return opened


def _rewards(columns: _Columns, optional: bool, notes: list[str]) -> np.ndarray:
    if "rewards" not in columns and optional and not near("rewards", columns.columns):
        notes.append("no rewards: they are all 0, enough for imitation and for goals, not for learning values")
        return np.zeros(columns.rows["observations"], np.float32)
    return columns.scalars("rewards").astype(np.float32)
