"""Minari datasets: read, and written."""

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.control.columns import STEPWISE, decoding, join_episodes, library, reason
from guerdon.control.spaces import Spec
from guerdon.control.transitions import Transitions
from guerdon.errors import DataError, near
from guerdon.fields import build

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from gymnasium.spaces import Box, Space
    from minari import MinariDataset
    from minari.data_collector.episode_buffer import EpisodeBuffer

_OURS = "guerdon"  # in a Minari dataset's metadata: the Spec and the environment's id, where guerdon wrote it


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
    library("minari", target)
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


def minari_data(path: Path) -> Path | None:
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


def load_minari(source: str) -> MinariDataset:
    library("minari", source)
    import minari
    from minari.storage.datasets_root_dir import get_dataset_path

    identifier = _minari_id(source)
    place = get_dataset_path(identifier)
    if (data := minari_data(place)) is not None:
        return open_minari(data, source)
    try:
        minari.download_dataset(identifier)
        return minari.load_dataset(identifier)
    except Exception as error:  # the stores that Minari downloads from fail in many ways
        local = [path.parent.relative_to(get_dataset_path()).as_posix() for path in get_dataset_path().rglob("data")]
        raise DataError(
            f"{source}: not in the local Minari directory ({get_dataset_path()}), and it could not be downloaded "
            f"({reason(error)}).{near(identifier, local)}"
        ) from error


def open_minari(data: Path, source: str) -> MinariDataset:
    library("minari", source)
    from minari import MinariDataset

    try:
        return MinariDataset(data)
    except (ValueError, KeyError, AssertionError, OSError, ImportError) as error:
        raise DataError(f"{source}: not a Minari dataset that can be read ({reason(error)}).") from error


def read_minari(dataset: MinariDataset, source: str) -> Transitions:
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
            with decoding(source):
                episode = next(recorded, None)
            if episode is None:
                return
            columns = {name: np.asarray(value) for name, value in vars(episode).items() if name in STEPWISE}
            columns["actions"] = columns["actions"] - first
            columns["observations"] = episode.observations if encode is None else encode(episode.observations)
            yield f"{source}: episode {episode.id}", columns

    return join_episodes(episodes(), source, env, spec, notes)


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
