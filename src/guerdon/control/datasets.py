"""Logged trajectories as transitions: Minari datasets, OGBench files, the layout of D4RL, and how they are written.

Whatever a file leaves open is either refused with one message or settled in one way and counted in
`Transitions.notes`. `terminated` (the task ended: nothing is worth anything afterwards) and `truncated` (the recording
ended: values go on) are read apart and stay apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from guerdon.control.flat_files import read_hdf5, read_npz
from guerdon.control.minari_files import load_minari, minari_data, open_minari, read_minari
from guerdon.control.transitions import Transitions, not_finite
from guerdon.errors import DataError, near

SUFFIXES = (".npz", ".hdf5", ".h5")


def is_control_source(source: str) -> bool:
    """Whether `source` names logged trajectories (and not a file of feedback in language), by its name alone.

    True for `minari:ID`, files in `.npz`, `.hdf5` or `.h5`, and directories of a Minari dataset.
    """
    path = Path(source).expanduser()
    return source.startswith("minari:") or path.suffix.lower() in SUFFIXES or minari_data(path) is not None


def read_transitions(source: str, *, finite: bool = True) -> Transitions:
    """Logged trajectories from a file or a Minari dataset.

    Args:
        source: `minari:ID` (downloaded only where it is not in the local Minari directory) or `minari:PATH`; the
            directory of a Minari dataset or its `main_data.hdf5`; a `.npz` file of OGBench (`terminals` end a
            trajectory, `masks` = 0 terminates the task, and a trajectory's last row holds its last observation alone
            unless there are `next_observations`); a `.hdf5`, `.h5` or `.npz` file in the layout of D4RL
            (`observations`, `actions`, `rewards`, `terminals`, `timeouts` and, if need be, `next_observations`;
            Gymnasium's `terminated` and `truncated` are understood too).
        finite: refuse NaN and infinities; otherwise they are left for the caller to find.

    Observations are vectors as `gymnasium.spaces.utils.flatten` makes them, or images; see `Transitions`. Without
    bounds of the actions in the source, they are [-1, 1] where all actions lie inside, else their extremes.

    Raises:
        DataError: the source cannot be read, columns are missing or do not fit, or values are not finite.
    """
    path = Path(source.removeprefix("minari:")).expanduser()
    if path.name == "main_data.hdf5" and minari_data(path.parent):
        path = path.parent
    if (data := minari_data(path)) is not None:
        transitions = read_minari(open_minari(data, source), source)
    elif source.startswith("minari:"):
        transitions = read_minari(load_minari(source), source)
    elif not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        kind = "a directory, but not that of a Minari dataset" if path.is_dir() else "no such file"
        raise DataError(f"{source}: {kind}.{near(path.name, siblings)} A dataset of Minari is written minari:ID.")
    elif path.suffix.lower() == ".npz":
        transitions = read_npz(path, source)
    elif path.suffix.lower() in SUFFIXES:
        transitions = read_hdf5(path, source)
    else:
        raise DataError(f"{source}: not a file of trajectories; known are minari:ID, {', '.join(SUFFIXES)}.")
    if finite:
        _require_finite(transitions)
    return transitions


def _require_finite(transitions: Transitions) -> None:
    for name, rows in not_finite(transitions).items():
        values = np.atleast_1d(getattr(transitions, name)[rows[0]]).ravel()
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        column = f"[{at}]" if values.size > 1 else ""
        raise DataError(
            f"{transitions.source}: '{name}'{column} is {values[at]} at {transitions.where(int(rows[0]))}, and "
            f"{len(rows):,} of {len(transitions):,} rows of it are not finite. Mend or leave out these episodes; "
            "`guerdon inspect` lists them."
        )
