"""A puzzle as a Gymnasium environment."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from guerdon.control.puzzles.domains import make_puzzle
from guerdon.errors import ConfigError


class PuzzleEnv(gymnasium.Env):
    """Scrambled states as one-hot vectors (L V,); the reward is -cost, and the episode ends at the goal.

    A reset walks back from the goal by 1 to `scramble` random moves; after twice so many the episode is truncated.

    Args:
        puzzle: name, as `make_puzzle` takes it.
        scramble: the longest walk; None is the puzzle's own.
    """

    def __init__(self, puzzle: str, scramble: int | None = None) -> None:
        self.puzzle = make_puzzle(puzzle)
        self.scramble = self.puzzle.scramble if scramble is None else scramble
        if self.scramble < 1:
            raise ConfigError(f"{puzzle}: scramble is {scramble}: it must be at least 1.")
        size = self.puzzle.places * self.puzzle.values
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (size,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(self.puzzle.actions)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state, self.steps = self.puzzle.goal[None], 0
        while self.puzzle.solved(self.state)[0]:  # a walk may come back
            self.state = self.puzzle.walk(self.np_random.integers(1, self.scramble + 1, 1), self.np_random)
        return self._seen(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.state = self.puzzle.next(self.state, np.array([action]))
        self.steps += 1
        solved = bool(self.puzzle.solved(self.state)[0])
        late = not solved and self.steps >= 2 * self.scramble
        return self._seen(), -float(self.puzzle.costs[action]), solved, late, {"success": solved}

    def _seen(self) -> np.ndarray:
        return np.eye(self.puzzle.values, dtype=np.float32)[self.state[0]].ravel()
