"""Logged trajectories as transitions: Minari datasets, OGBench files, the layout of D4RL, and how they are written.

Whatever a file leaves open is either refused with one message or settled in one way and counted in
`Transitions.notes`. `terminated` (the task ended: nothing is worth anything afterwards) and `truncated` (the recording
ended: values go on) are read apart and stay apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from guerdon.control.spaces import Spec
from guerdon.errors import ConfigError, DataError, near
from guerdon.fields import build

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from gymnasium.spaces import Box, Space
    from minari import MinariDataset
    from minari.data_collector.episode_buffer import EpisodeBuffer

_SUFFIXES = (".npz", ".hdf5", ".h5")
_BLOCK = 4_000_000  # numbers looked at together where a whole array would need its memory again
_OURS = "guerdon"  # in a Minari dataset's metadata: the Spec and the environment's id, where guerdon wrote it
# Gymnasium's words beside those of D4RL.
_TERMINATED = ("terminals", "terminations", "terminated")
_TRUNCATED = ("timeouts", "truncations", "truncated")
_OGBENCH = ("masks", "valids", "qpos", "qvel", "button_states")  # columns that only OGBench's files have


class Chained:
    """Next observations that are the observations of the following rows, held without a second copy.

    Read it as an array: `chained[rows]`, `np.asarray(chained)`.
    """

    def __init__(self, observations: np.ndarray, ends: np.ndarray, finals: np.ndarray) -> None:
        """`ends` (N,) marks the last row of each episode; `finals` holds what was seen after these rows, in order."""
        self._observations, self.ends, self.finals = observations, ends, finals
        self._final_of = np.cumsum(ends) - 1
        self.shape, self.dtype, self.ndim = observations.shape, observations.dtype, observations.ndim

    def __len__(self) -> int:
        return len(self._observations)

    def __getitem__(self, rows: Any) -> np.ndarray:
        index = np.arange(len(self))[rows]
        last = self.ends[index]
        found = self._observations[np.where(last, index, index + 1)]
        if index.ndim == 0:
            return self.finals[self._final_of[index]] if last else found
        found[last] = self.finals[self._final_of[index[last]]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def take(self, observations: np.ndarray, rows: np.ndarray) -> Chained:
        """The same for the rows at these indices alone, where `observations` are those of the rows."""
        ends = self.ends[rows] | np.append(np.diff(rows) != 1, True)
        return Chained(observations, ends, self[rows[ends]])


@dataclass(eq=False)
class Transitions:
    """Logged transitions, row by row in the order of time, episode after episode.

    Vectors are float32, images uint8 with channels first. An episode's last row is `terminated`, `truncated` or both;
    where `terminated` stands earlier, the task had ended there but the recording went on (OGBench).
    """

    observations: np.ndarray  # (N, *obs)
    actions: np.ndarray  # (N, A) float32, or (N,) int64 where they are discrete
    rewards: np.ndarray  # (N,) float32
    next_observations: np.ndarray | Chained  # (N, *obs); `Chained` for images of whole episodes
    terminated: np.ndarray  # (N,) bool
    truncated: np.ndarray  # (N,) bool
    episode: np.ndarray  # (N,) int64, rising from 0
    spec: Spec
    source: str = ""
    env: str | None = None  # the environment it was recorded in, where that is known
    notes: list[str] = field(default_factory=list)  # what the file left open, and how it was settled
    declared: bool = True  # whether the source says which actions there are; else `spec` is what the rows show of them

    def __len__(self) -> int:
        return len(self.rewards)

    @cached_property
    def starts(self) -> np.ndarray:
        """(episodes,) the first row of each episode."""
        return np.flatnonzero(np.append(True, np.diff(self.episode) != 0)) if len(self) else np.zeros(0, np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the arrays: equal for equal data, wherever it was read from."""
        digest = hashlib.sha256()
        for name in (*_ARRAYS, "terminated", "truncated", "episode"):
            array = getattr(self, name)
            digest.update(f"{name} {array.dtype} {array.shape};".encode())
            for rows in blocks(array):
                digest.update(np.ascontiguousarray(array[rows]).data)
        return digest.hexdigest()

    def returns(self) -> np.ndarray:
        """(episodes,) the undiscounted sum of rewards."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.starts)

    def lengths(self) -> np.ndarray:
        """(episodes,) rows of each."""
        return np.diff(np.append(self.starts, len(self)))

    def where(self, row: int) -> str:
        """`row 17 (episode 2, step 3)`, all counted from 0."""
        episode = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"row {row} (episode {self.episode[row]}, step {row - self.starts[episode]})"

    def subset(self, rows: np.ndarray) -> Transitions:
        """The rows at these indices, or where this mask is true, in this order; episodes keep their numbers."""
        rows = np.arange(len(self))[rows]
        observations = self.observations[rows]
        following = self.next_observations
        return replace(
            self,
            observations=observations,
            actions=self.actions[rows],
            rewards=self.rewards[rows],
            next_observations=following.take(observations, rows) if isinstance(following, Chained) else following[rows],
            terminated=self.terminated[rows],
            truncated=self.truncated[rows],
            episode=self.episode[rows],
            notes=list(self.notes),
        )

    def recorded_in(self, env: str, spec: Spec) -> Transitions:
        """The same, known to be from `env`, whose spec takes the place of what the rows alone showed of the actions.

        Raises:
            DataError: they cannot be from there: other observations, or other actions.
        """
        told, there = asdict(self.spec), asdict(spec)
        shown = () if self.declared else ("low", "high", "actions") if spec.discrete else ("low", "high")
        wrong = [
            f"{n} {told[n]} in the data and {there[n]} there" for n in told if n not in shown and told[n] != there[n]
        ]
        if spec.discrete and not wrong and self.spec.actions > spec.actions:
            wrong = [f"action {self.spec.actions - 1} in the data and {spec.actions} actions there"]
        if wrong:
            raise DataError(
                f"{self.source} and {env} do not fit: {'; '.join(wrong)}. Name the environment that made the data."
            )
        return replace(self, env=env, spec=spec)

    def scaled(self, normalizer: Normalizer) -> Transitions:
        """The same with observations, this and next, as `normalizer` scales them."""
        following = np.asarray(self.next_observations)
        return replace(
            self, observations=normalizer.apply(self.observations), next_observations=normalizer.apply(following)
        )

    def split(self, share: float, seed: int = 0) -> tuple[Transitions, Transitions]:
        """(train, held out): `share` of the episodes, chosen at random by `seed`, is held out whole.

        Where there are two episodes or more and the share is neither 0 nor 1, neither side is empty.

        Raises:
            ConfigError: the share is not within 0 and 1.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"a share of {share} cannot be held out: it must lie within 0 and 1.")
        episodes = self.episode[self.starts]
        count = round(share * len(episodes))
        if 0 < share < 1:
            count = max(min(max(count, 1), len(episodes) - 1), 0)
        held_out = np.isin(self.episode, np.random.default_rng(seed).permutation(episodes)[:count])
        return self.subset(~held_out), self.subset(held_out)


_ARRAYS = ("observations", "actions", "rewards", "next_observations")


def blocks(array: np.ndarray | Chained) -> list[slice]:
    """Parts of the rows of an array that are small enough to be worked on as a copy."""
    step = max(1, _BLOCK // int(np.prod(array.shape[1:])))
    return [slice(start, min(start + step, len(array))) for start in range(0, len(array), step)]


def moments(*arrays: np.ndarray | Chained) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) per coordinate over the rows of all arrays together, in float64."""
    count = sum(map(len, arrays))
    parts = [(array, rows) for array in arrays for rows in blocks(array)]
    mean = sum(array[rows].sum(axis=0, dtype=np.float64) for array, rows in parts) / count
    variance = sum(np.square(array[rows] - mean).sum(axis=0) for array, rows in parts) / count
    return mean, np.sqrt(variance)


@dataclass(frozen=True)
class Normalizer:
    """x -> (x - mean) / std, per coordinate of an observation."""

    mean: np.ndarray  # (*obs), float32
    std: np.ndarray  # (*obs), float32

    @classmethod
    def fit(cls, transitions: Transitions) -> Normalizer:
        """Mean and std + 1e-3 over observations and next observations together, as the learner sees them (corrupted).

        Source: arXiv 2310.12955, section on observation normalisation.

        Raises:
            ConfigError: the observations are images, which encoders scale themselves.
        """
        if transitions.spec.image:
            raise ConfigError("images cannot be normalised: encoders scale them. Leave the normalisation off.")
        mean, std = moments(transitions.observations, transitions.next_observations)
        return cls(mean.astype(np.float32), (std + 1e-3).astype(np.float32))

    def apply(self, x: np.ndarray) -> np.ndarray:
        """`x` (..., *obs), normalised, in float32."""
        return (np.asarray(x, np.float32) - self.mean) / self.std


def is_control_source(source: str) -> bool:
    """Whether `source` names logged trajectories (and not a file of feedback in language), by its name alone.

    True for `minari:ID`, files in `.npz`, `.hdf5` or `.h5`, and directories of a Minari dataset.
    """
    path = Path(source).expanduser()
    return source.startswith("minari:") or path.suffix.lower() in _SUFFIXES or _minari_data(path) is not None


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
    if path.name == "main_data.hdf5" and _minari_data(path.parent):
        path = path.parent
    if (data := _minari_data(path)) is not None:
        transitions = _read_minari(_open_minari(data, source), source)
    elif source.startswith("minari:"):
        transitions = _read_minari(_load_minari(source), source)
    elif not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        kind = "a directory, but not that of a Minari dataset" if path.is_dir() else "no such file"
        raise DataError(f"{source}: {kind}.{near(path.name, siblings)} A dataset of Minari is written minari:ID.")
    elif path.suffix.lower() == ".npz":
        transitions = _read_npz(path, source)
    elif path.suffix.lower() in _SUFFIXES:
        transitions = _read_hdf5(path, source)
    else:
        raise DataError(f"{source}: not a file of trajectories; known are minari:ID, {', '.join(_SUFFIXES)}.")
    if finite:
        _require_finite(transitions)
    return transitions


def not_finite(transitions: Transitions) -> dict[str, np.ndarray]:
    """Name of an array -> its rows that hold NaN or an infinity; only arrays with such rows."""
    found = {}
    for name in _ARRAYS:
        array = getattr(transitions, name)
        if array.dtype.kind == "f":
            finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
            if not finite.all():
                found[name] = np.flatnonzero(~finite)
    return found


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


# --------------------------------------------------------------------------------------------------------- flat files


@contextlib.contextmanager
def _decoding(source: str) -> Iterator[None]:
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
        message = f"{source}: {missing}not a whole file ({_reason(error)}). Write or download it again."
        raise DataError(message) from error


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read_npz(path: Path, source: str) -> Transitions:
    with _decoding(source):
        file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
        raise DataError(f"{source}: holds one array without a name: save all of them with numpy.savez(...).")
    with file:
        return _read_flat(file, source)


def _read_hdf5(path: Path, source: str) -> Transitions:
    h5py = _library("h5py", source)
    with _decoding(source):
        file = h5py.File(path, "r")
    with file:
        with _decoding(source):
            members = dict(file.items())
        if any(name.startswith("episode_") for name in members):
            return _read_episodes(members, source)
        columns = {name: item for name, item in members.items() if isinstance(item, h5py.Dataset)}
        return _read_flat(columns, source)


def _library(name: str, source: str) -> Any:
    """h5py or minari, which only some sources need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{source}: needs {name}: pip install 'guerdon[control]'.") from error


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
        with _decoding(f"{self.source}: '{name}'"):
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
    observations, image = _observations(columns.take("observations"), "observations", source, notes)
    actions = columns.take("actions")
    given = None
    if "next_observations" in columns:
        given, _ = _observations(columns.take("next_observations"), "next_observations", source, [])
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
        following = _chain(observations, layout.ends, finals)
    actions, spec = _actions(actions, source, notes)
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
            _count(notes, (unused & terminated).sum(), "'masks' of 0 in a trajectory's last row, left out with it")
        _count(notes, (unused & np.append(True, unused[:-1])).sum(), "trajectories of one observation, left out")
    terminated = terminated[rows]
    _count(notes, (terminated & ~ends).sum(), "rows where the task ends and the trajectory goes on")
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
    _count(notes, unused.sum(), "rows that end by timeout without a next observation, left out")
    if not ends[-1]:
        unused[-1] = True
        notes.append("the last episode does not end: its last row has no next observation and is left out")
    rows = np.flatnonzero(~unused)
    terminated = terminated[rows]
    ends = terminated | np.append(unused, True)[rows + 1]
    truncated = truncated[rows] | (ends & ~terminated)
    _count(notes, terminated.sum(), "terminal rows without a next observation, which repeat their own")
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


def _count(notes: list[str], count: int, what: str) -> None:
    if count:
        notes.append(f"{count:,} {what}")


def _rewards(columns: _Columns, optional: bool, notes: list[str]) -> np.ndarray:
    if "rewards" not in columns and optional and not near("rewards", columns.columns):
        notes.append("no rewards: they are all 0, enough for imitation and for goals, not for learning values")
        return np.zeros(columns.rows["observations"], np.float32)
    return columns.scalars("rewards").astype(np.float32)


def _observations(array: np.ndarray, name: str, source: str, notes: list[str]) -> tuple[np.ndarray, bool]:
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


def _actions(array: np.ndarray, source: str, notes: list[str]) -> tuple[np.ndarray, Spec]:
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


def _chain(observations: np.ndarray, ends: np.ndarray, finals: np.ndarray) -> np.ndarray | Chained:
    """The next observations of rows in order: those of the following rows, and `finals` where episodes end."""
    chained = Chained(observations, ends, finals)
    return chained if observations.dtype == np.uint8 else chained[:]


# ------------------------------------------------------------------------------------------------------------- Minari


@dataclass(frozen=True)
class Episode:
    """One episode of T steps, as it is written by `write_minari`."""

    observations: np.ndarray  # (T + 1, *obs), the last one included
    actions: np.ndarray  # (T, A), or (T,) where they are discrete
    rewards: np.ndarray  # (T,)
    terminated: bool  # how it ended
    truncated: bool
    seed: int | None = None  # of its reset


def write_minari(
    episodes: Iterable[Episode], target: str, spec: Spec, env: str | None = None, behaviour: str = ""
) -> Path:
    """Write episodes, one after the other as they come, as a Minari dataset that `read_transitions` and Minari read.

    Args:
        episodes: with observations and actions as `spec` has them.
        target: `minari:ID`, with a version at its end, for the local Minari directory; or the path of a directory.
        spec: of the environment. Images are stored as they are (no JPEG), with their channels last.
        env: its id; where `gymnasium.spec` knows it, Minari's `recover_environment` makes it again.
        behaviour: what collected the data, as Minari's `algorithm_name`.

    Returns:
        The directory. It appears whole or not at all.

    Raises:
        DataError: it exists already, the id is malformed, there is no episode, or one does not fit `spec`.
    """
    _library("minari", target)
    from minari.dataset.minari_storage import MinariStorage
    from minari.storage.datasets_root_dir import get_dataset_path

    directory = (
        get_dataset_path(_minari_id(target)) if target.startswith("minari:") else Path(target).expanduser().absolute()
    )
    if directory.exists():
        raise DataError(f"{target}: {directory} exists already. Choose another name or version, or remove it.")
    observation_space, action_space = _spaces(spec)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".") as scratch:
        unfinished = Path(scratch) / directory.name
        unfinished.mkdir()
        with warnings.catch_warnings():  # of environments that Minari cannot describe; their id is kept beside
            warnings.simplefilter("ignore")
            storage = MinariStorage.new(
                unfinished / "data", observation_space, action_space, _env_spec(env), jpeg_encoding=False
            )
        storage.update_episodes(_buffer(episode, number, spec, target) for number, episode in enumerate(episodes))
        if not storage.total_episodes:
            raise DataError(f"{target}: no episodes to write.")
        name = target.removeprefix("minari:") if target.startswith("minari:") else f"{directory.name}-v0"
        storage.update_metadata(
            {
                "dataset_id": name,
                "minari_version": importlib.metadata.version("minari"),
                "algorithm_name": behaviour,
                _OURS: {"env": env, "spec": asdict(spec)},
            }
        )
        unfinished.rename(directory)
    return directory


def _spaces(spec: Spec) -> tuple[Space, Space]:
    from gymnasium.spaces import Box, Discrete

    if spec.image:
        channels, *size = spec.observation
        observations: Space = Box(0, 255, (*size, channels), np.uint8)
    else:
        observations = Box(-np.inf, np.inf, spec.observation, np.float32)
    if spec.discrete:
        return observations, Discrete(spec.actions)
    return observations, Box(np.array(spec.low, np.float32), np.array(spec.high, np.float32), dtype=np.float32)


def _env_spec(env: str | None) -> EnvSpec | None:
    import gymnasium

    try:
        return gymnasium.spec(env) if env else None
    except gymnasium.error.Error:
        return None


def _buffer(episode: Episode, number: int, spec: Spec, target: str) -> EpisodeBuffer:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    steps = len(episode.rewards)
    shapes = {
        "observations": (steps + 1, *spec.observation),
        "actions": (steps,) if spec.discrete else (steps, spec.actions),
    }
    for name, shape in shapes.items():
        if getattr(episode, name).shape != shape or not steps:
            raise DataError(
                f"{target}: episode {number} of {steps} steps has '{name}' of shape {getattr(episode, name).shape}, "
                f"not {shape}."
            )
    last = np.arange(steps) == steps - 1
    observations = np.moveaxis(episode.observations, 1, -1) if spec.image else episode.observations
    return EpisodeBuffer(
        seed=episode.seed,
        observations=observations,
        actions=episode.actions,
        rewards=episode.rewards,
        terminations=last & episode.terminated,
        truncations=last & episode.truncated,
    )


def _minari_data(path: Path) -> Path | None:
    """The directory inside a Minari dataset's directory that holds its data, or None where it is none."""
    return next((place for place in (path, path / "data") if (place / "metadata.json").is_file()), None)


def _minari_id(source: str) -> str:
    import minari

    identifier = source.removeprefix("minari:")
    try:
        minari.dataset.minari_dataset.parse_dataset_id(identifier)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{source}: a Minari id has the form (namespace/)name-v0: letters, digits, - and _, and a version at its "
            "end."
        ) from error
    return identifier


def _load_minari(source: str) -> MinariDataset:
    _library("minari", source)
    import minari
    from minari.storage.datasets_root_dir import get_dataset_path

    identifier = _minari_id(source)
    place = get_dataset_path(identifier)
    if (data := _minari_data(place)) is not None:
        return _open_minari(data, source)
    try:
        minari.download_dataset(identifier)
        return minari.load_dataset(identifier)
    except Exception as error:  # the stores that Minari downloads from fail in many ways
        local = [path.parent.relative_to(get_dataset_path()).as_posix() for path in get_dataset_path().rglob("data")]
        raise DataError(
            f"{source}: not in the local Minari directory ({get_dataset_path()}), and it could not be downloaded "
            f"({_reason(error)}).{near(identifier, local)}"
        ) from error


def _open_minari(data: Path, source: str) -> MinariDataset:
    _library("minari", source)
    from minari import MinariDataset

    try:
        return MinariDataset(data)
    except (ValueError, KeyError, AssertionError, OSError, ImportError) as error:
        raise DataError(f"{source}: not a Minari dataset that can be read ({_reason(error)}).") from error


def _read_minari(dataset: MinariDataset, source: str) -> Transitions:
    ours = dataset.storage.metadata.get(_OURS)
    if ours:
        spec, env, note = build(Spec, ours["spec"], source), ours["env"], ""
        first, encode = 0, (lambda x: np.moveaxis(x, -1, 1)) if spec.image else None
    else:
        from guerdon.control.simulators import encoding

        seen = encoding(dataset.observation_space, source)
        spec, first = _spec(seen.space, dataset.action_space, source)
        env, note = dataset.env_spec.id if dataset.env_spec else None, seen.note
        encode = None if seen.encode is None else partial(_each, seen.encode)
    notes = [note] if note else []
    if dataset.storage.jpeg_encoding and _has_images(dataset.observation_space):
        notes.append("images went through JPEG when they were written: they are not what the behaviour policy saw")
    if first:
        notes.append(f"actions count from {first} in the file, and from 0 here")

    def episodes() -> Iterator[tuple[str, Mapping[str, Any]]]:
        recorded = iter(dataset.iterate_episodes())
        while True:
            with _decoding(source):
                episode = next(recorded, None)
            if episode is None:
                return
            columns = {name: np.asarray(value) for name, value in vars(episode).items() if name in _STEPWISE}
            columns["actions"] = columns["actions"] - first
            columns["observations"] = episode.observations if encode is None else encode(episode.observations)
            yield f"{source}: episode {episode.id}", columns

    return _join(episodes(), source, env, spec, notes)


def _has_images(space: Space) -> bool:
    from minari.dataset.minari_storage import is_image_space

    return is_image_space(space) or any(map(_has_images, getattr(space, "spaces", {}).values()))


def _spec(seen: Box, action: Space, source: str) -> tuple[Spec, int]:
    """What is seen and done, and the number of the first discrete action."""
    from gymnasium.spaces import Box, Discrete

    shape, image = seen.shape, seen.dtype == np.uint8
    if isinstance(action, Discrete):
        return Spec(shape, image, True, int(action.n), (), ()), int(action.start)
    if not isinstance(action, Box) or action.dtype.kind != "f":
        raise DataError(f"{source}: no policy fits the actions {action}. One Discrete or a Box of floats does.")
    low, high = (tuple(bound.ravel().tolist()) for bound in (action.low, action.high))
    return Spec(shape, image, False, len(low), low, high), 0


def _each(encode: Callable[[Any], np.ndarray], observations: Any) -> np.ndarray:
    count = len(next(_leaves(observations)))
    return np.stack([encode(_at(observations, step)) for step in range(count)])


def _leaves(observations: Any) -> Iterator[Any]:
    parts = observations.values() if isinstance(observations, dict) else observations
    if isinstance(observations, (dict, tuple)):
        for part in parts:
            yield from _leaves(part)
    else:
        yield observations


def _at(observations: Any, step: int) -> Any:
    if isinstance(observations, dict):
        return {name: _at(part, step) for name, part in observations.items()}
    if isinstance(observations, tuple):
        return tuple(_at(part, step) for part in observations)
    return observations[step]


def _read_episodes(members: Mapping[str, Any], source: str) -> Transitions:
    """A `main_data.hdf5` of Minari without the metadata that belong beside it."""
    numbered = {int(name[8:]): group for name, group in members.items() if name[8:].isdigit()}

    def episodes() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, group in sorted(numbered.items()):
            with _decoding(source):
                columns = {name: item[()] for name, item in group.items() if hasattr(item, "dtype")}
            if (seen := columns.get("observations")) is None or seen.dtype.kind not in "bif":
                raise DataError(
                    f"{source}: what the observations mean is in the metadata.json that Minari writes beside this "
                    "file: bring it along."
                )
            columns["observations"], _ = _observations(seen, "observations", source, [])
            yield f"{source}: episode {number}", columns

    notes = ["no metadata.json beside it: spaces and environment are not known"]
    return _join(episodes(), source, None, None, notes)


_STEPWISE = ("actions", "rewards", "terminations", "truncations")


def _join(
    episodes: Iterable[tuple[str, Mapping[str, Any]]], source: str, env: str | None, spec: Spec | None, notes: list[str]
) -> Transitions:
    """Episodes of T steps and T + 1 observations, each with where it stands, as transitions."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("observations", "finals", *_STEPWISE)}
    empty = open_ended = 0
    for where, columns in episodes:
        for name in ("observations", *_STEPWISE):
            if name not in columns:
                missing = "a missing truncated field: " if name == "truncations" else ""
                raise DataError(f"{where}: {missing}has no '{name}'. It holds {', '.join(columns)}.")
            if columns[name].dtype.kind not in "buif":
                raise DataError(f"{where}: '{name}' holds {columns[name].dtype}, not numbers.")
        steps = len(columns["rewards"])
        for name in ("observations", *_STEPWISE):
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
        for name in _STEPWISE:
            parts[name].append(columns[name])
        open_ended += not (columns["terminations"][-1] or columns["truncations"][-1])
    if not parts["finals"]:
        raise DataError(f"{source}: holds no transitions.")
    _count(notes, empty, "episodes without a step, left out")
    _count(notes, open_ended, "episodes that end neither terminated nor truncated: they count as truncated")
    lengths = [len(part) for part in parts["rewards"]]
    episode = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.append(np.diff(episode) != 0, True)
    joined = {name: _concatenated(values, f"{source}: '{name}'") for name, values in parts.items() if name != "finals"}
    observations = joined["observations"]
    declared = spec is not None and bool(np.isfinite([*spec.low, *spec.high]).all())
    if spec is None:
        actions, spec = _actions(joined["actions"], source, notes)
        spec = replace(spec, observation=observations.shape[1:], image=observations.ndim == 4)
    else:
        actions, told = _actions(joined["actions"].astype(np.int64 if spec.discrete else np.float32), source, [])
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
        _chain(observations, ends, np.stack(parts["finals"])),
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
