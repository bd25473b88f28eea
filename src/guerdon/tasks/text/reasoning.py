"""Questions of reasoning-gym as episodes of one step: the observation asks, the action answers."""

from __future__ import annotations

from guerdon.errors import ConfigError
from guerdon.feedback.schema import plain
from guerdon.tasks.base import GYM, load_task
from guerdon.tasks.text.base import Split, TextEnv
from guerdon.tasks.text.names import TextSpec

SIZES = {"train_size": 300, "test_size": 100}  # questions, unless the spec says otherwise


class Reasoning(TextEnv):
    """`reasoning:NAME?param=value`: the tasks of `reasoning-gym:NAME?param=value`, whose last ninth to train on is
    `valid` here. The reward is that task's, 1 where the answer is right."""

    closed = False

    def __init__(self, name: str, task: str, train_size: int | None, test_size: int | None) -> None:
        loaded = load_task(task, train_size=train_size, test_size=test_size)
        self._score = loaded.score
        cut = len(loaded.train) * 8 // 9
        sides: dict[Split, list] = {"train": loaded.train[:cut], "valid": loaded.train[cut:], "test": loaded.test}
        self._records = {f"{split}-{i}": record for split, side in sides.items() for i, record in enumerate(side)}
        names: dict[Split, list[str]] = {split: [f"{split}-{i}" for i in range(len(sides[split]))] for split in sides}
        super().__init__(name, names, instruction="Answer the question. The action is the answer.", limit=1)

    def _begin(self) -> str:
        self.state = None
        return plain(self._records[self.task].prompt)

    def _act(self, action: str) -> tuple[str, float, bool]:
        reward = float(self._score(self._records[self.task], [action])["reward"][0])
        return ("That is right." if reward >= 1 else "That is not right."), reward, True

    def expert(self) -> str:
        return str(self._records[self.task].columns["answer"])


def make(spec: TextSpec) -> Reasoning:
    if not spec.name:
        raise ConfigError(f"{spec.spec}: name a generator, for example reasoning:chain_sum.")
    task = f"{GYM}:" + spec.spec.removeprefix("reasoning:")
    return Reasoning(spec.spec, task, *(None if name in spec.params else size for name, size in SIZES.items()))
