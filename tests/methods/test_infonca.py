from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError, DataError
from guerdon.methods.base import get_method
from guerdon.methods.verifiers.infonca import InfoNCA, grouped_log_softmax

SCORES = [[1.0, 0.0, 0.0, 1.0], [0.5, 2.0], [1.0, 1.0]]
RNG = np.random.default_rng(0)


def test_name_and_refusals(sampled):
    assert get_method("infonca") is InfoNCA and not InfoNCA().per_completion
    with pytest.raises(ConfigError, match="beta is 0"):
        InfoNCA(beta=0).check()
    with pytest.raises(DataError, match="a score of -1"):
        InfoNCA().credit(sampled([[1.0, -1.0]]), RNG)


def test_targets_are_shares_of_the_reward(sampled):
    groups = InfoNCA().credit(sampled(SCORES), RNG)
    assert [g.values["target"].tolist() for g in groups] == [[0.5, 0, 0, 0.5], pytest.approx([0.2, 0.8])]


def test_grouped_log_softmax():
    torch.manual_seed(0)
    x = 100 * torch.randn(7)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    expected = torch.cat([part.log_softmax(0) for part in x.split([3, 2, 2])])
    torch.testing.assert_close(grouped_log_softmax(x, group), expected)


def test_loss_and_gradient_in_closed_form(sampled, on):
    method = InfoNCA(beta=0.3, sft_coef=0.2)
    groups = method.credit(sampled(SCORES), RNG)
    loss, gradients, _ = on(method, groups)
    expected, row = 0.0, 0
    for group in groups:
        values = [group.segments[leaf].values for leaf in group.leaves]
        logits = np.array([0.3 * (v["new_logps"] - v["old_logps"]).sum() for v in values])
        choice = np.exp(logits - logits.max())
        choice /= choice.sum()
        for k, target in enumerate(group.values["target"]):
            length = len(values[k]["new_logps"])
            expected -= target * (np.log(choice[k]) + 0.2 * values[k]["new_logps"].mean()) / 2
            slope = -(0.3 * (target - choice[k]) + 0.2 * target / length) / 2
            np.testing.assert_allclose(gradients[row], slope, atol=1e-6)
            row += 1
    assert loss == pytest.approx(expected, rel=1e-5)


def test_with_two_answers_it_is_dpo(sampled, on):
    """One right, one wrong: -log sigmoid(beta * difference of the log-ratios)."""
    method = InfoNCA(beta=0.3, sft_coef=0.0)
    groups = method.credit(sampled([[1.0, 0.0]]), RNG)
    better, worse = ((s.values["new_logps"] - s.values["old_logps"]).sum() for s in groups[0].segments[1:])
    assert on(method, groups)[0] == pytest.approx(np.log1p(np.exp(-0.3 * (better - worse))), rel=1e-5)
