"""Machines to be tried, with unknown payouts: exploration in words.

`bernoulli` follows the button scenario of "Can large language models explore in-context?" (arXiv 2403.15371): one arm
pays 1 with probability 1/2 + gap/2, all others with 1/2 - gap/2. `gaussian` pays N(m, 1) with each m from N(0, 1).
`contextual` announces a customer before each pull; the payout, 0 or 1, depends on customer and arm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from guerdon.control.streams import generator_of
from guerdon.errors import ConfigError, near
from guerdon.fields import check_range
from guerdon.tasks.text.base import TextEnv, numbered
from guerdon.tasks.text.names import TextSpec

KINDS = ("bernoulli", "gaussian", "contextual")
ARMS = ("blue", "green", "red", "yellow", "purple", "orange", "white", "black", "pink", "grey")
CONTEXTS = ("a student", "a farmer", "a doctor", "a pilot", "a cook", "a painter", "a nurse", "a judge")


@dataclass(frozen=True)
class BanditOptions:
    """Options of `bandit:`."""

    arms: int = 5  # machines, 2 to 10
    steps: int = 20  # pulls of an episode
    gap: float = 0.5  # bernoulli: by how much the best arm pays more often than the others
    contexts: int = 3  # contextual: kinds of customers, 2 to 8


class Bandit(TextEnv):
    """`bandit:bernoulli`, `bandit:gaussian`, `bandit:contextual`: which arm pays what is a task's own, and hidden.

    Success is to pull the best arm at the end. `info["regret"]` is what pulling the best arm always had been expected
    to bring, less what the pulled arms were.
    """

    def __init__(self, name: str, kind: str, options: BanditOptions) -> None:
        check_range(vars(options), "arms", low=2, high=len(ARMS))
        check_range(vars(options), "contexts", low=2, high=len(CONTEXTS))
        check_range(vars(options), "gap", high=1)
        self.kind, self.gap = kind, options.gap
        self.arms = list(ARMS[: options.arms])
        self.contexts = list(CONTEXTS[: options.contexts if kind == "contextual" else 1])
        who = "Before each pull a customer comes in, and the payouts depend on who it is. " * (kind == "contextual")
        super().__init__(
            name,
            numbered(),
            instruction=(
                f"There are {options.arms} machines, called {', '.join(self.arms)}. Each pays by chance, around a mean "
                f"of its own that you do not know. {who}You have {options.steps} pulls: find out which one pays best, "
                f"and win as much as you can. An action is the name of a machine, for example: {self.arms[0]}"
            ),
            limit=options.steps,
        )

    def _begin(self) -> str:
        self.state = self._next({"means": self._means(), "regret": 0.0, "best": False})
        return f"{self.limit} pulls are left.{self._who()}"

    def _means(self) -> np.ndarray:
        """(contexts, arms) expected payouts of the task."""
        rng = generator_of(0, f"{self.kind} {self.task}")
        shape = len(self.contexts), len(self.arms)
        if self.kind == "contextual":
            return rng.random(shape)
        if self.kind == "gaussian":
            return rng.standard_normal(shape)
        means = np.full(shape, 0.5 - self.gap / 2)
        means[0, rng.integers(shape[1])] = 0.5 + self.gap / 2
        return means

    def _next(self, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"context": int(self.chance.integers(len(self.contexts)))}

    def _who(self) -> str:
        return f" {self.contexts[self.state['context']].capitalize()} comes in." if len(self.contexts) > 1 else ""

    def _act(self, action: str) -> tuple[str, float, bool]:
        means, arm = self.state["means"][self.state["context"]], self.arms.index(action)
        if self.kind == "gaussian":
            paid = round(float(self.chance.normal(means[arm])), 2)
        else:
            paid = float(self.chance.random() < means[arm])
        regret = self.state["regret"] + float(means.max() - means[arm])
        self.state = self._next(self.state | {"regret": regret, "best": bool(means[arm] == means.max())})
        left = self.limit - self.steps - 1
        told = f"The {action} machine paid {paid:g}."
        return (f"{told} {left} pulls are left.{self._who()}" if left else told), paid, left == 0

    def _actions(self) -> list[str]:
        return self.arms

    def expert(self) -> str:
        return self.arms[int(self.state["means"][self.state["context"]].argmax())]

    def _succeeded(self) -> bool:
        return bool(self.state["best"])

    def _info(self) -> dict[str, Any]:
        return super()._info() | {"regret": self.state["regret"]}


def make(spec: TextSpec) -> Bandit:
    if spec.name not in KINDS:
        raise ConfigError(f"{spec.spec}: no bandit is called '{spec.name}'.{near(spec.name, KINDS)} Use {KINDS}.")
    return Bandit(spec.spec, spec.name, spec.options(BanditOptions))
