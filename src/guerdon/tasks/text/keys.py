"""Two keys to be pressed in turn, with no word about right and wrong before the end: bare credit assignment.

A model of the tasks of "Enhancing Decision-Making for LLM Agents via Step-Level Q-Value Models" (arXiv 2409.09345):
task (k0, k1), the right action of step t is k_{t mod 2}, and the reward is 1 only where all of them were right.
"""

from __future__ import annotations

from dataclasses import dataclass

from guerdon.control.streams import generator_of
from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.tasks.text.base import Split, TextEnv
from guerdon.tasks.text.names import TextSpec


@dataclass(frozen=True)
class KeysOptions:
    """Options of `keys:`."""

    depth: int = 3  # presses of an episode
    actions: int = 8  # keys that there are


class Keys(TextEnv):
    """`keys:`: tasks are called `k0-k1`; of all pairs, drawn for good, 5/8 are for training and 1/4 are held out."""

    def __init__(self, name: str = "keys:", options: KeysOptions = KeysOptions()) -> None:
        check_range(vars(options), "depth", low=1)
        check_range(vars(options), "actions", low=2)
        keys = range(options.actions)
        pairs = [f"{first}-{second}" for first in keys for second in keys]
        order = generator_of(0, "keys").permutation(len(pairs))
        train, test = len(pairs) * 5 // 8, len(pairs) // 4
        sides: dict[Split, list[str]] = {
            "train": [pairs[i] for i in sorted(order[:train])],
            "valid": [pairs[i] for i in sorted(order[train:-test])],
            "test": [pairs[i] for i in sorted(order[-test:])],
        }
        super().__init__(
            name,
            sides,
            instruction=(
                "You open a door with two keys. Press them in turn, the first one first. "
                "An action is the word press and the number of a key, for example: press 0"
            ),
            limit=options.depth,
        )
        self.depth = options.depth
        self._presses = [f"press {key}" for key in keys]

    def _begin(self) -> str:
        self.state: list[str] = []  # what was pressed
        first, second = self.task.split("-")
        return f"The keys are {first} and {second}. Press 1 of {self.depth}."

    def _act(self, action: str) -> tuple[str, float, bool]:
        self.state.append(action.removeprefix("press "))
        if self.steps + 1 < self.depth:
            return f"You pressed {self.state[-1]}. Press {self.steps + 2} of {self.depth}.", 0.0, False
        right = self.state == [self._right(step) for step in range(self.depth)]
        return ("The door opens." if right else "The door stays shut."), float(right), True

    def _right(self, step: int) -> str:
        return self.task.split("-")[step % 2]

    def expert(self) -> str:
        return f"press {self._right(self.steps)}"

    def _actions(self) -> list[str]:
        return self._presses


def make(spec: TextSpec) -> Keys:
    if spec.name:
        raise ConfigError(f"{spec.spec}: keys takes no name, only options: keys:?depth=3&actions=8.")
    return Keys(spec.spec, spec.options(KeysOptions))
