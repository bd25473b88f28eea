"""Several verifiers as one reward: the weighted sum, with every component beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from guerdon.errors import ConfigError, GuerdonError
from guerdon.feedback.records import Record
from guerdon.rewards.verifiers import Verifier, get_verifier

TOTAL = "reward"


@dataclass(frozen=True)
class Rewards:
    """reward = sum of weight x value over (name, verifier, weight).

    A weight of 0 logs a component without rewarding it.
    """

    components: Sequence[tuple[str, Verifier, float]]

    @classmethod
    def of(cls, verifiers: str | Mapping[str, float], own: Verifier | None = None) -> Rewards:
        """Rewards from one verifier's spec, or from a mapping of specs to weights (`{math: 1, "format:...": 0.2}`).

        Args:
            verifiers: see `guerdon.rewards.verifiers` for the specs.
            own: a verifier that the task brings, which a mapping may weigh under its name.

        Raises:
            ConfigError: no verifier at all, or a spec that is wrong.
        """
        weights = {verifiers: 1.0} if isinstance(verifiers, str) else verifiers
        if not weights:
            raise ConfigError("a reward needs at least one verifier.")
        found = {spec: own if own and spec == own.name else get_verifier(spec) for spec in weights}
        short = [verifier.name for verifier in found.values()]
        # Two formats would share the name 'format', and a function called 'reward' would hide the total.
        clear = {spec: short.count(v.name) == 1 and v.name != TOTAL for spec, v in found.items()}
        return cls([(v.name if clear[spec] else spec, v, float(weights[spec])) for spec, v in found.items()])

    @property
    def binary(self) -> bool:
        """Whether the reward is 0 or 1 whatever is answered."""
        return len(self.components) == 1 and all(v.binary and weight == 1 for _, v, weight in self.components)

    def check(self, record: Record) -> None:
        """`DataError` where a record lacks what a verifier reads."""
        for _, verifier, _ in self.components:
            verifier.check(record)

    def __call__(self, record: Record, completions: list[str]) -> dict[str, np.ndarray]:
        """Component -> (n,) float32, and their weighted sum under "reward".

        Raises:
            DataError: the record lacks a column.
            GuerdonError: a function of the user failed, or two components have one name.
        """
        scores: dict[str, np.ndarray] = {TOTAL: np.zeros(len(completions), dtype=np.float32)}
        if not completions:
            return scores
        for name, verifier, weight in self.components:
            verdict = verifier(record, completions)
            for part, values in {name: verdict.value, **verdict.parts}.items():
                if part in scores:
                    raise GuerdonError(f"two components of the reward are called '{part}'; rename one of them.")
                scores[part] = values
            scores[TOTAL] += np.float32(weight) * verdict.value
        return scores
