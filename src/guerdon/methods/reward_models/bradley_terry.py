"""A reward model from preferences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from guerdon.errors import DataError
from guerdon.lazy import torch
from guerdon.methods.base import LanguageMethod, Metrics, method
from guerdon.methods.preferences.pairs import Pairing, with_pairs

if TYPE_CHECKING:
    from guerdon.language.forward import Outputs
    from guerdon.language.groups import Group
    from guerdon.language.packing import Batch


def bradley_terry_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 0.0, center_coef: float = 0.0
) -> torch.Tensor:
    """-log s(r_c - r_r - margin) + center_coef (r_c + r_r)^2 of each pair, (P,).

    The margin is that of Llama 2 (Touvron et al. 2023, eq. 2); the second term holds rewards around 0, as preferences
    alone do not (Eisenstein et al. 2023, arXiv 2312.09244).

    Args:
        chosen, rejected: (P,) rewards.
        margin: (P,) by how much the chosen answer should win.
    """
    losses = -torch.nn.functional.logsigmoid(chosen - rejected - margin)
    return losses + center_coef * (chosen + rejected) ** 2


@method("reward-model", learns_from="preferences", paper=17)
@dataclass(kw_only=True)
class RewardModel(LanguageMethod):
    """Bradley-Terry reward model: a scalar head on the last token, such that P(y_w beats y_l) = s(r_w - r_l).

    L = -log s(r(x, y_w) - r(x, y_l)), averaged over the pairs of the global batch (Tulu 3, Lambert et al. 2024).
    """

    lr: float = 3e-6  # peak learning rate of AdamW
    batch_size: int = 256  # groups per update
    pairs: Pairing = "best-random"  # which of a prompt's scored completions are compared
    margin: bool = False  # the record's `margin` column says by how much the chosen answer should win
    center_coef: float = 0.0  # weight of (r_w + r_l)^2, which holds rewards around 0

    wants: ClassVar[frozenset[Literal["logps", "entropy", "scores", "values"]]] = frozenset({"scores"})

    def credit(self, groups: list[Group], rng: np.random.Generator) -> list[Group]:
        paired = with_pairs(groups, self.pairs, rng)
        if self.margin:
            for group in paired:
                if "margin" not in group.columns:
                    raise DataError(f"{group.key or 'a group'}: no `margin` column; add it or leave out --margin")
                group.values["margin"] = np.full(len(group), group.columns["margin"], dtype=np.float32)
        return paired

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert outputs.scores is not None
        better, worse = batch.pairs.unbind(-1)
        chosen, rejected = outputs.scores[better], outputs.scores[worse]
        margin = batch.values["margin"][better] if self.margin else 0.0
        losses = bradley_terry_loss(chosen, rejected, margin, self.center_coef)
        return losses.sum() / batch.totals["pairs"], {
            "loss/preference": losses.detach(),
            "preference/accuracy": (chosen > rejected).float(),
            "preference/margin": (chosen - rejected).detach(),
            "reward/chosen": chosen.detach(),
            "reward/rejected": rejected.detach(),
        }

    def start_loss(self) -> float | None:
        """The loss of a head that is zero, ln 2; None where margins make it depend on the data."""
        return None if self.margin else math.log(2)
