"""Simulators, many copies at once, that can be saved in the middle of an episode.

Vector environments of Gymnasium's own kind are in `native`. Of all others, a copy goes from episode to episode, each
reset with its own seed, a function of the copy's seed and of the episode's number, so that the whole state of a copy is
that reset and the actions since: it is saved as these, and brought back by playing them again.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from guerdon.control.simulators import frames_of, make_noted, spec_of
from guerdon.control.spaces import Spec
from guerdon.errors import ConfigError
from guerdon.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from guerdon.control.native import NativeCopies


class Finished(NamedTuple):
    """An episode that has ended: of which copy, its undiscounted sum of raw rewards, and its steps."""

    seed: int  # index of the seed
    copy: int
    ret: float
    length: int


class Step(NamedTuple):
    """What a step of all copies brought; arrays are (S, C, ...) and are not written to again."""

    obs: np.ndarray  # where an episode ended, the first of the next
    reward: np.ndarray  # float32
    terminated: np.ndarray  # bool: the task ended
    truncated: np.ndarray  # bool: it was cut short, by a time limit say
    final_obs: np.ndarray  # what the action led to: the last of an episode where it ended, else as `obs`
    finished: list[Finished]
    success: list[float]  # of the finished: the best "success" or "is_success" that an `info` told, nan without one
    acted: np.ndarray | None = None  # bool: false where no action was taken, in a step that resets; None: all were


class InProcess:
    """What steps copies in this process; in a `_Worker`, another one, the two halves of a call are apart in time."""

    def send(self, name: str, *args: Any) -> None:
        """`receive` then gives what the method of that name gives."""
        self._answer = getattr(self, name)(*args)

    def receive(self) -> Any:
        return self._answer


class _Copies(InProcess):
    """Copies of an environment, each a row."""

    ragged = ("actions", "lengths")  # what a state has of varying length, and how much of it for each copy
    why = "the same reset and actions led elsewhere"  # some copy could not be restored

    def __init__(self, id: str, options: Mapping[str, Any], places: Sequence[tuple[int, int, int]]) -> None:
        """`places`: for each copy its seed, its own number, and how many copies the seed has."""
        options = dict(options)
        stack = options.pop("frame_stack", None)
        self._envs, notes = zip(*(make_noted(id, stack, options) for _ in places), strict=True)
        self.spec, self._note = spec_of(self._envs[0]), notes[0]
        self._steps = [env.step for env in self._envs]
        self._places = places
        self._episodes = [-1] * len(places)
        self._actions: list[list[Any]] = [[] for _ in places]
        self._returns = [0.0] * len(places)
        self._success = [math.nan] * len(places)
        self.obs = np.zeros((len(places), *self.spec.observation), np.uint8 if self.spec.image else np.float32)

    def about(self) -> tuple[Spec, str, int, tuple[int, ...]]:
        """What is to be known of an environment: also the number of the first discrete action, the actions' shape."""
        space = self._envs[0].action_space
        return self.spec, self._note, int(getattr(space, "start", 0)), space.shape

    def _begin(self, row: int) -> None:
        """The first observation of the next episode."""
        self._episodes[row] += 1
        self._replay(row, [])

    def _replay(self, row: int, actions: Sequence[Any]) -> None:
        """The episode in its state after these actions."""
        seed, copy, copies = self._places[row]
        entropy = np.random.SeedSequence((seed, copy + copies * self._episodes[row]))
        self.obs[row] = self._envs[row].reset(seed=int(entropy.generate_state(1)[0] >> 1))[0]  # 31 bits
        self._actions[row], self._returns[row], self._success[row] = [], 0.0, math.nan
        for action in actions:
            self._step(row, action)

    def _step(self, row: int, action: Any) -> tuple[float, bool, bool]:
        self.obs[row], reward, terminated, truncated, info = self._steps[row](action)
        self._actions[row].append(action)
        self._returns[row] += reward
        if "success" in info or "is_success" in info:
            told = float(info.get("success", info.get("is_success")))
            self._success[row] = told if math.isnan(self._success[row]) else max(told, self._success[row])
        return reward, terminated, truncated

    def reset(self) -> np.ndarray:
        self.obs = self.obs.copy()
        for row in range(len(self._places)):
            self._begin(row)
        return self.obs

    def step(self, actions: Sequence[Any], rows: Sequence[int]) -> tuple[Any, ...]:
        """The arrays of `Step` with copies in rows, and for each that finished (row, return, length, success)."""
        count = len(self._places)
        reward, terminated, truncated = [0.0] * count, [False] * count, [False] * count
        self.obs = self.obs.copy()
        ended = []
        for row in rows:
            reward[row], terminated[row], truncated[row] = self._step(row, actions[row])
            if terminated[row] or truncated[row]:
                ended.append(row)
        final = self.obs
        finished = []
        if ended:
            final = self.obs.copy()
            for row in ended:
                finished.append((row, float(self._returns[row]), len(self._actions[row]), self._success[row]))
                self._begin(row)
        flags = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
        return self.obs, np.array(reward, dtype=np.float32), *flags, final, finished

    def state(self) -> dict[str, np.ndarray]:
        kind = np.int64 if self.spec.discrete else np.float32
        actions = [action for log in self._actions for action in log]
        return {
            "episodes": np.array(self._episodes),
            "lengths": np.array([len(log) for log in self._actions]),
            "actions": np.array(actions, dtype=kind).reshape(-1, *self._envs[0].action_space.shape),
            "obs": self.obs,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[bool]]:
        """Bring each copy back; where that fails it begins its next episode. What they see, and which came back."""
        logs = np.split(state["actions"], np.cumsum(state["lengths"])[:-1])
        self.obs = self.obs.copy()
        self._episodes = state["episodes"].tolist()
        came_back = []
        for row, log in enumerate(logs):
            # An environment that no longer does the same may end early and refuse to go on.
            with suppress(Exception):
                self._replay(row, log.tolist() if self.spec.discrete else list(log))
            came_back.append(
                len(self._actions[row]) == len(log) and np.array_equal(self.obs[row], state["obs"][row], equal_nan=True)
            )
            if not came_back[-1]:
                self._begin(row)
        return self.obs, came_back

    def draw(self) -> np.ndarray:
        drawn: Any = self._envs[0].render()
        return drawn

    def close(self) -> None:
        for env in self._envs:
            env.close()


def _serve(pipe: Any, *args: Any) -> None:
    """A worker process: a `_Copies` whose methods are called through a pipe until it closes."""
    copies = None
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            name, given = pipe.recv()
            try:
                if copies is None:
                    copies = _Copies(*args)
                pipe.send((getattr(copies, name)(*given), None))
            except Exception as error:
                pipe.send((None, error if isinstance(error, ConfigError) else RuntimeError(traceback.format_exc())))


class _Worker:
    """`_Copies` in a process of its own."""

    def __init__(self, *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, name: str, *args: Any) -> None:
        self._pipe.send((name, args))

    def receive(self) -> Any:
        try:
            value, error = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"an environment's process ended with code {self._process.exitcode}") from None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


class Environments:
    """C copies of an environment for each of S seeds, stepped together; arrays are (S, C, ...).

    What a copy does depends on its seed, its own number and its actions alone, not on who else is there ("native": the
    copies of a seed share their chance). Actions are (S, C) integers that count from 0, or (S, C, A) numbers, which are
    clipped to the bounds of the environment. An episode begins with its own reset as soon as the last one has ended.

    Args:
        id: see `make`.
        seeds: one per row, none negative.
        copies: C, environments per seed.
        vector: "sync" steps them one after another here; "async" in as many processes as there are cores, which pays
            where a step takes longer than some 50 microseconds; "native" as one vector environment for each seed, of
            ids that have a vector entry point. See `native.NativeCopies` for where such a one resets in a step of its
            own: that step counts as one of the copy, and `Step.acted` is false there.
        options: `frame_stack` and whatever else `make` takes.

    Attributes:
        obs: what every copy sees now; call `reset` first.
        spec, seeds, copies, id: as given or found.
        frames: images that an observation stacks, the first one repeated at a reset; 1 where nothing says so.
        restorable: False once `load_state_dict` could not bring every copy back.
        notes: what a user should know of these environments.

    Raises:
        ConfigError: see `make` and `spec_of`.
    """

    def __init__(
        self,
        id: str,
        seeds: Sequence[int],
        copies: int = 1,
        vector: Literal["sync", "async", "native"] = "sync",
        **options: Any,
    ) -> None:
        self.id, self.seeds, self.copies = id, list(seeds), copies
        places = [(seed, copy, copies) for seed in self.seeds for copy in range(copies)]
        kind: type[_Copies | _Worker | NativeCopies] = _Worker if vector == "async" else _Copies
        parts = {"sync": 1, "async": len(os.sched_getaffinity(0)), "native": len(self.seeds)}[vector]
        self._kept: type[_Copies | NativeCopies] = _Copies
        if vector == "native":
            from guerdon.control.native import NativeCopies

            kind = self._kept = NativeCopies
        edges = np.linspace(0, len(places), min(parts, len(places)) + 1).astype(int).tolist()
        self._rows = [slice(a, b) for a, b in itertools.pairwise(edges)]
        self._parts: list[_Copies | _Worker | NativeCopies] = [kind(id, options, places[rows]) for rows in self._rows]
        self.spec, note, self._first, shape = self._ask("about")[0]
        self.frames: int = 1
        if self.spec.image and vector != "native":
            self.frames = options.get("frame_stack") or frames_of(id)
        self._action_shape = (len(places), *shape)
        self._shape = (len(self.seeds), copies)
        self.notes: list[str] = [note] if note else []
        self.restorable = True
        self._low, self._high = np.array(self.spec.low, np.float32), np.array(self.spec.high, np.float32)
        self._everyone = [range(rows.stop - rows.start) for rows in self._rows]

    def _ask(self, name: str, *arguments: Sequence[Any]) -> list[Any]:
        """Call a method of every part, with its own element of each of `arguments`."""
        for part, *given in zip(self._parts, *arguments, strict=True):
            part.send(name, *given)
        return [part.receive() for part in self._parts]

    def _together(self, parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """The arrays of all parts, each as (S, C, ...)."""
        whole = parts[0] if len(parts) == 1 else [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        return [array.reshape(self._shape + array.shape[1:]) for array in whole]

    def reset(self) -> np.ndarray:
        """Begin a new episode in every copy; the observations (S, C, *obs)."""
        (self.obs,) = self._together([[obs] for obs in self._ask("reset")])
        return self.obs

    def step(self, actions: np.ndarray, active: np.ndarray | None = None) -> Step:
        """Step every copy, or those of which `active` (S, C) is true; the others stay as they are, with reward 0."""
        if self.spec.discrete:
            given: Any = (actions.reshape(-1) + self._first).tolist()
        else:
            given = actions.clip(self._low, self._high).astype(np.float32, copy=False).reshape(self._action_shape)
        who: Any = self._everyone
        if active is not None:
            who = [np.flatnonzero(active.reshape(-1)[rows]).tolist() for rows in self._rows]
        answers = self._ask("step", [given[rows] for rows in self._rows], who)
        obs, reward, terminated, truncated, final = self._together([answer[:5] for answer in answers])
        self.obs = obs
        finished, success = [], []
        for rows, answer in zip(self._rows, answers, strict=True):
            for row, ret, length, told in answer[5]:
                seed, copy = divmod(rows.start + row, self.copies)
                finished.append(Finished(seed, copy, ret, length))
                success.append(told)
        acted = self._together([answer[6:] for answer in answers])
        return Step(obs, reward, terminated, truncated, final, finished, success, *acted)

    def draw(self) -> np.ndarray:
        """A picture (height, width, 3) of the first copy, of environments made with `render_mode="rgb_array"`."""
        return self._ask("draw")[0]

    def state_dict(self) -> dict[str, Tensor]:
        """Episode numbers, the actions since each reset, and what was seen last: all that it takes to come back.

        Of "native" ones the vector environments themselves, pickled, where they can be.
        """
        parts = self._ask("state")
        return {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Bring every copy back by playing its episode again, to the last bit; "native" ones as they were kept.

        A copy that then sees something else, because its environment's chance does not follow the reset's seed, begins
        its next episode instead, and so do those of a vector environment that cannot be pickled, or was saved by
        another code; `restorable` becomes False, and `notes` say so.
        """
        arrays = {name: np.array(tensor) for name, tensor in state.items()}
        values, sizes = self._kept.ragged
        ends = np.append(0, np.cumsum(arrays[sizes]))
        given = []
        for rows in self._rows:
            given.append({name: array[rows] for name, array in arrays.items() if name != values})
            given[-1][values] = arrays[values][ends[rows.start] : ends[rows.stop]]
        answers = self._ask("restore", given)
        (self.obs,) = self._together([[obs] for obs, _ in answers])
        lost = sum(not back for _, part in answers for back in part)
        self.restorable = lost == 0
        if lost:
            self.notes.append(
                f"{self.id} cannot be restored in the middle of an episode ({self._kept.why}): "
                f"{lost} of {len(self.seeds) * self.copies} copies began a new one"
            )

    def close(self) -> None:
        """Free the environments and end their processes."""
        for part in self._parts:
            part.close()
