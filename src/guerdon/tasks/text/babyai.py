"""Missions in a grid with what is seen in words: BabyAI and MiniGrid (Chevalier-Boisvert et al. 2019, 2023).

The agent sees what lies before it, 7 by 7 cells, walls hiding what is behind them; everything is told from where it
stands. Words for observations and actions in the manner of BabyAI-Text (arXiv 2302.02662), in a wording of our own.
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gymnasium
import minigrid  # noqa: F401  # registers them

from guerdon.errors import ConfigError, near
from guerdon.tasks.text.base import TextEnv, numbered
from guerdon.tasks.text.names import TextSpec

ACTIONS = ("turn left", "turn right", "go forward", "pick up", "drop", "toggle")
_STATES = {True: "open", False: "closed"}


@dataclass(frozen=True)
class BabyAIOptions:
    """Options of `babyai:`."""

    limit: int = 0  # steps of an episode; 0 is the mission's own limit, which holds in any case


class BabyAI(TextEnv):
    """`babyai:GoToLocal` is `BabyAI-GoToLocal-v0`, `babyai:Empty-5x5` is `MiniGrid-Empty-5x5-v0`; whole ids do, too.

    The reward is theirs: at success 1 - 0.9 steps / (the mission's own limit), else 0. The scripted policy is BabyAI's
    bot, which MiniGrid's other missions lack.
    """

    def __init__(self, name: str, id: str, options: BabyAIOptions) -> None:
        self._make = lambda: gymnasium.make(id, disable_env_checker=True).unwrapped
        super().__init__(
            name,
            numbered(),
            instruction=(
                "You are in a house of rooms and carry out a mission. Toggle opens and closes what is right in front "
                f"of you; with the key of its colour in hand, also a locked door. Actions: {', '.join(ACTIONS)}."
            ),
            limit=options.limit or sys.maxsize,
        )

    def _begin(self) -> str:
        env: Any = self._make()
        with redirect_stdout(io.StringIO()):  # some levels print what they try
            env.reset(seed=int(self.chance.integers(2**31)))
        self.state = SimpleNamespace(env=env, bot=None, advice=None, last=None)
        return f"Mission: {env.mission}.\n{describe(env)}"

    def _act(self, action: str) -> tuple[str, float, bool]:
        state, number = self.state, ACTIONS.index(action)
        if state.bot is not None:  # once asked it is told of every step
            self.expert()
            state.last = number
        state.advice = None
        _, reward, terminated, _, _ = state.env.step(number)
        return describe(state.env), float(reward), bool(terminated)

    def _late(self) -> bool:
        return self.steps >= min(self.limit, self.state.env.max_steps)

    def _actions(self) -> list[str]:
        return list(ACTIONS)

    def expert(self) -> str:
        """What the bot does now, from what it saw since it was first asked; a turn to the left where it gives up."""
        from minigrid.utils.baby_ai_bot import BabyAIBot

        state = self.state
        if not hasattr(state.env, "instrs"):
            return super().expert()
        if state.advice is None:
            try:
                if state.bot is None:
                    state.bot, state.last = BabyAIBot(state.env), None
                state.advice = int(state.bot.replan(state.last))
            except Exception:  # it gives up by assertions, and by errors of its own
                state.bot, state.advice = None, 0
        return ACTIONS[state.advice]


def describe(env: Any) -> str:
    """What the agent of a MiniGrid environment sees, in words: things by distance, walls, and what it carries."""
    grid, visible = env.gen_obs_grid()
    size = env.agent_view_size
    middle, here = size // 2, size - 1
    things = []
    for x in range(size):
        for y in range(size):
            thing = grid.get(x, y)
            if thing is None or not visible[x, y] or thing.type in ("wall", "floor") or (x, y) == (middle, here):
                continue
            ahead, aside = here - y, x - middle
            things.append((ahead + abs(aside), ahead, aside, f"{_named(thing)} {_place(ahead, aside)}"))
    told = [f"You see {words}." for *_, words in sorted(things)] or ["You see nothing but floor and walls."]
    for words, cells in (
        ("ahead", [(middle, here - i) for i in range(1, size)]),
        ("to the left", [(middle - i, here) for i in range(1, middle + 1)]),
        ("to the right", [(middle + i, here) for i in range(1, middle + 1)]),
    ):
        distances = [i for i, cell in enumerate(cells, 1) if _is_wall(grid.get(*cell)) and visible[cell]]
        if distances:
            told.append(f"There is a wall {_steps(distances[0])} {words}.")
    if env.carrying is not None:
        told.append(f"You carry {_named(env.carrying)}.")
    return " ".join(told)


def _is_wall(thing: Any) -> bool:
    return thing is not None and thing.type == "wall"


def _named(thing: Any) -> str:
    state = ""
    if thing.type == "door":
        state = "locked " if thing.is_locked else f"{_STATES[thing.is_open]} "
    words = f"{state}{thing.color} {thing.type}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _place(ahead: int, aside: int) -> str:
    parts = [f"{_steps(ahead)} ahead"] if ahead else []
    if aside:
        parts.append(f"{_steps(abs(aside))} to the {'left' if aside < 0 else 'right'}")
    return " and ".join(parts)


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def make(spec: TextSpec) -> BabyAI:
    ids = [id for id in gymnasium.registry if id.startswith(("BabyAI-", "MiniGrid-"))]
    for id in (spec.name, f"BabyAI-{spec.name}-v0", f"MiniGrid-{spec.name}-v0"):
        if id in ids:
            return BabyAI(spec.spec, id, spec.options(BabyAIOptions))
    known = [id.partition("-")[2].removesuffix("-v0") for id in ids]
    raise ConfigError(f"{spec.spec}: BabyAI has no mission '{spec.name}'.{near(spec.name, known)}")
