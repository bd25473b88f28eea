"""Environments in words: Gymnasium environments whose observations and actions are text, and that can be brought back.

An adapter says how an episode begins and what an action does, and keeps all that changes in `state` and `chance`; that
is copied for a snapshot, or, where it cannot be (`copies` is false), the episode is played again, and checked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np

from guerdon.control.streams import generator_of
from guerdon.errors import ConfigError, GuerdonError, near

Split = Literal["train", "valid", "test"]
_LONGEST = 100_000  # characters; a bound for the spaces, which need one


class Words(gymnasium.spaces.Text):
    """Any text. Gymnasium's own space holds the characters of its alphabet alone, by which `sample` goes here too."""

    def __init__(self) -> None:
        super().__init__(_LONGEST)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)


@dataclass(frozen=True)
class Snapshot:
    """Where an episode stands: how it began, what was done since, and what came of it.

    Attributes:
        task, seed: of the reset.
        actions: since the reset.
        seen: of the reset and of each action the observation, the reward, and whether it terminated or truncated.
        state: a copy of all that changes, or None where the actions have to be played again.
    """

    task: str
    seed: int
    actions: tuple[str, ...]
    seen: tuple[tuple[str, float, bool, bool], ...]
    state: Any = None


class TextEnv(gymnasium.Env[str, str]):
    """Tasks in words, of one kind.

    `reset(seed=, options={"task": id})` begins a task, one of `tasks("train")` drawn by the seed where none is named;
    the seed is that of chance within the episode too. After `limit` steps an episode is truncated. An `info` has the
    `task`, the admissible `actions` where they are known, and at the end of an episode its `success`.

    Adapters write `_begin`, `_act` and, where the actions are known, `_actions`; where somebody knows how it is done,
    `expert`.

    Args:
        name: the spec by which `make_text` finds it.
        splits: task ids by split, none in two.
        instruction: what who acts here has to know beforehand: the aim, and how actions are put.
        limit: steps of an episode.

    Attributes:
        task, seed: of the episode.
        state: all that belongs to an episode but `task` and `chance`; a snapshot copies it.
        chance: random numbers of the episode.
        steps: actions taken in it.
        total: its reward so far.
        observation: what was seen last.
    """

    copies: ClassVar[bool] = True  # whether a deep copy of `state` brings an episode back
    closed: ClassVar[bool] = True  # whether the actions that `_actions` gives are all there are

    task: str
    seed: int
    state: Any
    chance: np.random.Generator

    def __init__(self, name: str, splits: Mapping[Split, Iterable[str]], *, instruction: str, limit: int) -> None:
        if limit < 1:
            raise ConfigError(f"{name}: the limit is {limit} steps: it must be at least 1.")
        self.name, self.instruction, self.limit = name, instruction, limit
        self._splits = {split: list(tasks) for split, tasks in splits.items()}
        self._split_of = {task: split for split, tasks in self._splits.items() for task in tasks}
        self.observation_space, self.action_space = Words(), Words()
        self._done: list[str] = []
        self._seen: list[tuple[str, float, bool, bool]] = []

    def tasks(self, split: Split = "train") -> list[str]:
        """Ids of the tasks of a split, for `options={"task": id}`; no id is in two splits."""
        if split not in self._splits:
            raise ConfigError(f"{self.name} has no split '{split}'.{near(split, self._splits)}")
        return list(self._splits[split])

    def split_of(self, task: str) -> Split:
        """The split that a task is of; `ConfigError` where there is no such task."""
        if task not in self._split_of:
            raise ConfigError(f"{self.name} has no task '{task}'.{near(task, self._split_of)}")
        return self._split_of[task]

    @property
    def steps(self) -> int:
        return len(self._done)

    @property
    def observation(self) -> str:
        return self._seen[-1][0]

    @property
    def total(self) -> float:
        return sum(reward for _, reward, _, _ in self._seen)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode; where no seed is given, it follows from the last one that was."""
        super().reset(seed=seed)
        self.seed = int(self.np_random.integers(2**31)) if seed is None else seed
        task = (options or {}).get("task")
        if task is None:
            train = self._splits["train"]
            task = train[int(generator_of(self.seed, "task").integers(len(train)))]
        self.split_of(task)
        self._start(task)
        return self.observation, self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act. What is no action here is answered in words and costs a step, for it may come from a model."""
        if not self._seen or True in self._seen[-1][2:]:
            raise gymnasium.error.ResetNeeded(f"{self.name}: no episode is under way: call reset first.")
        self._take(action)
        return *self._seen[-1], self._info()

    def snapshot(self) -> Snapshot:
        """Where the episode stands, for `restore`, now or later, here or in another environment of the same spec."""
        # The numbers of a generator are copied ten times faster than the generator.
        state = (copy.deepcopy(self.state), self.chance.bit_generator.state) if self.copies else None
        return Snapshot(self.task, self.seed, tuple(self._done), tuple(self._seen), state)

    def restore(self, snapshot: Snapshot) -> tuple[str, dict[str, Any]]:
        """Bring an episode back exactly; what was seen last, as `reset` gives it.

        Raises:
            GuerdonError: the episode was played again, and something else came of it than before.
        """
        if snapshot.state is not None:
            self.task, self.seed = snapshot.task, snapshot.seed
            state, numbers = snapshot.state
            self.state, self.chance = copy.deepcopy(state), generator_of(self.seed, self.task)
            self.chance.bit_generator.state = numbers
            self._done, self._seen = list(snapshot.actions), list(snapshot.seen)
        else:
            self.seed = snapshot.seed
            self._start(snapshot.task)
            self._compare(snapshot)
            for action in snapshot.actions:
                self._take(action)
                self._compare(snapshot)
        return self.observation, self._info()

    def expert(self) -> str:
        """What one who knows the task does now; `ConfigError` where nobody does."""
        raise ConfigError(f"{self.name} has no scripted policy.")

    def _compare(self, snapshot: Snapshot) -> None:
        at = len(self._done)
        if self._seen[at] != snapshot.seen[at]:
            after = f"after action {at}, '{snapshot.actions[at - 1]}'," if at else "at the reset"
            raise GuerdonError(
                f"{self.name}: task '{snapshot.task}' cannot be brought back by playing it again: {after} came "
                f"{self._seen[at]!r}, where before it was {snapshot.seen[at]!r}. Its chance does not follow the seed."
            )

    def _start(self, task: str) -> None:
        self.task, self.chance = task, generator_of(self.seed, task)
        self._done, self._seen = [], [(self._begin(), 0.0, False, False)]

    def _take(self, action: str) -> None:
        known = self._actions() if self.closed else None
        named = action.strip()
        if known is not None and named not in known:
            named = next((each for each in known if each.casefold() == named.casefold()), "")
        if known is not None and not named:
            observation, reward, terminated = _refused(action, known), 0.0, False
        else:
            observation, reward, terminated = self._act(named)
        self._done.append(action)
        late = not terminated and self._late()
        self._seen.append((observation, float(reward), terminated, late))

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {"task": self.task}
        actions = self._actions()
        if actions is not None:
            info["actions"] = list(actions)
        if True in self._seen[-1][2:]:
            info["success"] = self._succeeded()
        return info

    def _begin(self) -> str:
        """Set `state` to where `task` begins, by `chance` where it takes any; the first observation."""
        raise NotImplementedError

    def _act(self, action: str) -> tuple[str, float, bool]:
        """What an action brings: observation, reward, and whether the task has ended."""
        raise NotImplementedError

    def _actions(self) -> list[str] | None:
        """The actions that there are now; None where they are not known."""
        return None

    def _late(self) -> bool:
        """Whether the episode is cut short after the action just taken."""
        return self.steps >= self.limit

    def _succeeded(self) -> bool:
        """Whether an episode that is over reached its aim."""
        return self.total > 0


def numbered(train: int = 1000, valid: int = 100, test: int = 100) -> dict[Split, list[str]]:
    """Ids of tasks that are generated from their number: `train-0`, `train-1`, ..., `test-99`."""
    sizes: dict[Split, int] = {"train": train, "valid": valid, "test": test}
    return {split: [f"{split}-{i}" for i in range(size)] for split, size in sizes.items()}


def _refused(action: str, known: list[str]) -> str:
    some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"'{action.strip()[:80]}' is no action here. The actions are: {some}."
