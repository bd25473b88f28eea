"""Control policies in training: transitions or environments, many seeds at once, all that a checkpoint must hold."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from guerdon.errors import ConfigError
from guerdon.lazy import torch
from guerdon.training.config import ControlTraining
from guerdon.training.distributed import Distribution

if TYPE_CHECKING:
    from guerdon.control.environments import Environments
    from guerdon.control.networks import How
    from guerdon.control.policy import ControlPolicy, Scaling
    from guerdon.control.spaces import Spec
    from guerdon.control.transitions import Transitions
    from guerdon.methods.control import ControlMethod

Metrics = Mapping[str, Any]


class Stateful(Protocol):
    """What a run saves and restores: modules, optimisers, replay buffers, random streams, environments."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


T = TypeVar("T", bound=Stateful)
Network = TypeVar("Network", bound="torch.nn.Module")


@dataclass
class Cursor:
    """How far a run has come.

    Attributes:
        step: updates with data, steps of each seed in its environment without.
        samples: environment steps of each seed.
        tokens: none; what language runs count.
        done: share of the run.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    done: float = 0.0


class ControlRun:
    """What a control method works with.

    Attributes:
        seeds: of the policies that are trained together; S is their number.
        spec: what a policy sees and does.
        data: transitions to learn from, or None where the method learns in an environment.
        corrupted: element -> which rows of `data` were damaged, (N,) bool.
        env: id of the environment in which the policies are judged, None where nothing says.
        envs: where a method without data acts; else None.
        streams: random numbers, one stream per seed and purpose.
        policy: what is exported and judged, set by `act_with`.
        notes: what the user should know of data and environment.
        episodes: those that ended in `envs` of late.
        cursor: how far the run has come.
    """

    def __init__(self, method: ControlMethod, config: ControlTraining, distribution: Distribution, directory: Path):
        from guerdon.control.environments import Environments
        from guerdon.control.streams import Streams

        if distribution.world > 1:
            raise ConfigError(
                "control policies train in one process, all seeds at once: start guerdon without a launcher, and give "
                "--seeds, or `guerdon compare --jobs`."
            )
        keep_freed_memory()
        self.method, self.config, self.distribution, self.directory = method, config, distribution, directory
        self.device = distribution.device
        self.seeds = list(range(config.seed, config.seed + config.seeds))
        self.cursor = Cursor()
        self.parts: dict[str, Stateful] = {}
        self.batch: Any = None
        self.streams = self.add("streams", Streams(self.seeds, self.device))
        self.data, self.corrupted, self.env, self.notes = material(config, series=method.predicts)
        self.envs: Environments | None = None
        self.episodes = self.add("episodes", Episodes(len(self.seeds)))
        if self.data is None:
            assert self.env is not None
            self.envs = self.add("envs", Environments(self.env, self.seeds, method.copies, config.vector))
            self.notes += self.envs.notes
        self.spec: Spec = self.data.spec if self.data is not None else self.envs.spec  # type: ignore[union-attr]
        method.check_spec(self.spec, self.env or str(config.data))
        self.policy: ControlPolicy

    @property
    def precision(self) -> str:
        return "bf16" if self.config.precision == "bf16" else "fp32"

    def add(self, name: str, part: T) -> T:
        """Have a part of the run saved with every checkpoint and restored from it; returns it."""
        self.parts[name] = part
        return part

    def network(self, name: str, network: Network, how: How = "torch", head_gain: float = 1.0) -> Network:
        """Have a network as a part of the run, with first values by `networks.initialise`, on the run's device."""
        from guerdon.control.networks import initialise

        initialise(network, self.seeds, how, head_gain=head_gain, name=name)
        return self.add(name, network.to(self.device))

    def act_with(self, actor: Any, normalizer: Scaling | None = None, critic: Any = None) -> None:
        """Make `actor` the policy of the run, saved with the `critic` that judges it where that is a `QEnsemble`."""
        from guerdon.control.policy import ControlPolicy

        self.policy = ControlPolicy(actor, self.spec, normalizer, self.env, self.seeds, critic)

    def threads(self) -> AbstractContextManager[None]:
        """The CPU's threads for those who use them: for torch where images or much of bf16 are multiplied, else see
        `one_thread_each`."""
        from guerdon.control.networks import one_thread_each

        large = self.spec.image or (self.precision == "bf16" and len(self.seeds) > 3)
        if large or self.device != "cpu":
            return nullcontext()
        return one_thread_each(torch.get_num_threads())

    def compiled(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """`update`, compiled where the run is told to."""
        return torch.compile(update, dynamic=False) if self.config.compile else update

    def stretches(self, total: int) -> Iterator[int]:
        """Up to which step the method may go before it yields, again and again to the end of the run."""
        config, cursor = self.config, self.cursor
        marks = (config.log_every, config.eval_every, config.checkpoint_every, config.snapshot_every)
        while cursor.step < total:
            stop = min(total, *((cursor.step // every + 1) * every for every in marks if every))
            cursor.done = stop / total
            yield stop

    # State

    def save(self, directory: Path) -> None:
        """Write everything that the rest of the run depends on."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save_state({"parts": parts, "cursor": asdict(self.cursor)}, directory)

    def restore(self, directory: Path) -> None:
        """Continue from what `save` wrote.

        Environments that cannot be brought back to the middle of their episodes begin new ones; a note says so.
        """
        state = load_state(directory)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.cursor = Cursor(**state["cursor"])
        if self.envs is not None and not self.envs.restorable:
            self.notes += [note for note in self.envs.notes if note not in self.notes]

    def export(self, directory: Path) -> None:
        """Write the policies of all seeds."""
        self.policy.save(directory)

    def dump_batch(self, directory: Path) -> None:
        """Save the last batch, to look at what went wrong."""
        if self.batch is not None:
            save_state({k: v for k, v in vars(self.batch).items() if v is not None}, directory)


def keep_freed_memory() -> None:
    """Have glibc keep what small updates free and soon ask for again: page faults cost up to a quarter of the time."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, size in ((-1, 256 << 20), (-2, 16 << 20), (-3, 32 << 20)):  # trim threshold, top pad, mmap
            libc.mallopt(parameter, size)


class Means:
    """Means over many updates of metrics that have one number per seed, without a copy to Python at each of them."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, list[float]]:
        """The means since the last call, as lists over the seeds."""
        means = {name: (total.double() / self.counts[name]).tolist() for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


class Episodes:
    """Returns and lengths of the episodes that ended since they were last asked for."""

    def __init__(self, seeds: int) -> None:
        self.ended: list[list[tuple[float, int]]] = [[] for _ in range(seeds)]

    def add(self, finished: Sequence[tuple[int, int, float, int]]) -> None:
        """Take what `Environments.step` says of ends: (seed index, copy, return, length)."""
        for seed, _, total, length in finished:
            self.ended[seed].append((total, length))

    def take(self) -> dict[str, list[float]]:
        """`episode/return`, `episode/length` (means; nan for a seed without an end) and `episode/count`, by seed."""
        means = [np.mean(ended, axis=0).tolist() if ended else [math.nan, math.nan] for ended in self.ended]
        counts = [float(len(ended)) for ended in self.ended]
        self.ended = [[] for _ in self.ended]
        returns, lengths = zip(*means, strict=True)
        return {"episode/return": list(returns), "episode/length": list(lengths), "episode/count": counts}

    def state_dict(self) -> dict[str, Any]:
        return {"ended": self.ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ended = [[(total, length) for total, length in ended] for ended in state["ended"]]


def material(
    config: ControlTraining, series: bool = False
) -> tuple[Transitions | None, dict[str, np.ndarray], str | None, list[str]]:
    """Transitions (or None), which of their rows were damaged on purpose, the environment's id, what to tell the user.

    Args:
        series: the data are a series to predict, which no environment made.

    Raises:
        ConfigError: an unknown environment, or a bad corruption.
        DataError: data that cannot be read, or that another environment must have made.
    """
    if config.data is None:
        return None, {}, config.env, []
    if series:
        from guerdon.control.series import read_series

        data = read_series(config.data)
        return data, {}, None, data.notes
    from guerdon.control.corruption import Corruption, corrupt
    from guerdon.control.datasets import read_transitions

    corruptions = [Corruption.parse(text) for text in config.corrupt]
    data = read_transitions(config.data)
    notes, env = list(data.notes), config.env or data.env
    if env is None:
        notes.append(f"{config.data} does not say which environment made it: nothing is evaluated without --env.")
    else:
        data = data.recorded_in(env, _spec(env))
    masks: dict[str, np.ndarray] = {}
    if corruptions:
        attacked = _attacked(config.corrupt_against, data) if config.corrupt_against else (None, None)
        data, masks = corrupt(data, corruptions, 0, *attacked)  # the same damage for all methods and seeds
        notes += [f"{element}: {int(mask.sum()):,} of {len(mask):,} rows damaged" for element, mask in masks.items()]
    return data, masks, env, notes


def _attacked(run: str, data: Transitions) -> tuple[Any, Any]:
    """The critic and the actor in a run that learned in the world of `data`."""
    from guerdon.control.policy import ControlPolicy

    policy = ControlPolicy.load(run)
    if (policy.spec.observation, policy.spec.actions) != (data.spec.observation, data.spec.actions):
        raise ConfigError(f"corrupt_against: {run} sees or does other things than {data.source}.")
    try:
        return policy.attacked()
    except ConfigError as error:
        raise ConfigError(f"corrupt_against: {run} cannot be attacked: {error}") from None


def check_material(config: ControlTraining, methods: Sequence[Any]) -> None:
    """Raise what every trial of a comparison would fail with: data, environment, or a method that fits neither."""
    data, _, env, _ = material(config)
    if env is None:
        raise ConfigError(f"compare: {config.data} does not say where its policies can be judged: give --env.")
    spec = data.spec if data is not None else _spec(env)
    for method in methods:
        method.check_spec(spec, env)


def _spec(env: str) -> Spec:
    from guerdon.control.simulators import make, spec_of

    made = make(env)
    try:
        return spec_of(made)
    finally:
        made.close()


def save_state(tree: Mapping[str, Any], directory: Path) -> None:
    """Write nested plain data with tensors and arrays as leaves: `state.json` and `state.safetensors`."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner, f"{path}/{key}") for key, inner in value.items()}
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().contiguous().clone()
            return {"tensor": path}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, (list, tuple)):
            return [plain(inner, f"{path}/{i}") for i, inner in enumerate(value)]
        return value

    (directory / "state.json").write_text(json.dumps(plain(tree, "")), encoding="utf-8")
    save_file(tensors, directory / "state.safetensors")


def load_state(directory: Path) -> Any:
    """Read what `save_state` wrote; arrays come back as tensors, tuples as lists."""
    from safetensors.torch import load_file

    tensors = load_file(directory / "state.safetensors")

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value["tensor"]] if set(value) == {"tensor"} else {k: full(v) for k, v in value.items()}
        return [full(v) for v in value] if isinstance(value, list) else value

    return full(json.loads((directory / "state.json").read_text(encoding="utf-8")))
