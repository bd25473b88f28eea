"""Which completions a preference loss compares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import numpy as np

from guerdon.errors import DataError
from guerdon.language.groups import Group
from guerdon.methods.base import pairs_from_scores

Pairing = Literal["best-worst", "best-random", "all"]


def with_pairs(groups: Iterable[Group], how: Pairing, rng: np.random.Generator) -> list[Group]:
    """The groups with the pairs that their scores give, and only the completions that a pair compares.

    Groups whose scores are all equal say nothing about order and are left out; `how` as in `pairs_from_scores`.

    Raises:
        DataError: where a group has no scores.
    """
    paired = []
    for group in groups:
        if "score" not in group.values:
            raise DataError(
                f"{group.key or 'a group'}: no preference and no scores to learn an order from. "
                "Give chosen and rejected answers or scores, or use `sft`, which imitates."
            )
        pairs = pairs_from_scores(group.values["score"], how, rng)
        if pairs:
            compared = sorted({completion for pair in pairs for completion in pair})
            paired.append(replace(group, pairs=pairs).subset(compared))
    return paired
