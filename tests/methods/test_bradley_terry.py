from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guerdon.errors import DataError
from guerdon.language.forward import GroupModel, Outputs
from guerdon.language.groups import Group
from guerdon.language.packing import pack
from guerdon.methods.base import get_method
from guerdon.methods.reward_models.bradley_terry import RewardModel, bradley_terry_loss


def preference(seed: int, **columns: float) -> Group:
    rng = np.random.default_rng(seed)
    answers = [rng.integers(0, 11, n).tolist() for n in rng.integers(1, 7, 2)]
    return Group.of([1, 2], answers, values={"score": np.array([1, 0], dtype=np.float32)}, columns=columns)


def tiny_model() -> GroupModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GroupModel(LlamaForCausalLM(LlamaConfig(vocab_size=11, initializer_range=0.3, **sizes)), head="scores")


def test_loss_equals_its_formula_in_value_and_gradient():
    c, r, margin, k = 0.7, -0.4, 0.3, 0.05

    def written(c: float, r: float) -> float:
        return math.log(1 + math.exp(-(c - r - margin))) + k * (c + r) ** 2

    chosen, rejected = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (c, r))
    loss = bradley_terry_loss(chosen, rejected, torch.tensor([margin], dtype=torch.float64), k)
    loss.backward()
    assert loss.item() == pytest.approx(written(c, r), abs=1e-12)
    h = 1e-5
    assert chosen.grad.item() == pytest.approx((written(c + h, r) - written(c - h, r)) / (2 * h), abs=1e-8)
    assert rejected.grad.item() == pytest.approx((written(c, r + h) - written(c, r - h)) / (2 * h), abs=1e-8)


def test_starts_at_ln_2_and_micro_batches_change_nothing():
    method, model = RewardModel(), tiny_model()
    groups = method.credit([preference(seed) for seed in range(4)], np.random.default_rng(0))
    totals = method.totals(groups)
    whole = pack(groups, totals=totals)
    loss, metrics = method.loss(model(whole, method.wants), whole)
    assert loss.item() == pytest.approx(method.start_loss()) == pytest.approx(math.log(2))
    assert metrics["preference/accuracy"].tolist() == [0, 0, 0, 0]

    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    gradients, losses = [], []
    for parts in ([groups], [[g] for g in groups]):
        model.zero_grad()
        losses.append(0.0)
        for part in parts:
            batch = pack(part, totals=totals)
            share, _ = method.loss(model(batch, method.wants), batch)
            share.backward()
            losses[-1] += share.item()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and abs(losses[0] - math.log(2)) > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_margin_column_and_metrics():
    method = RewardModel(margin=True)
    groups = method.credit([preference(0, margin=0.5), preference(1, margin=2.0)], np.random.default_rng(0))
    batch = pack(groups, totals=method.totals(groups))
    scores = torch.tensor([1.0, 0.0, -1.0, 1.0])
    loss, metrics = method.loss(Outputs(scores=scores), batch)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-0.5)) + math.log1p(math.exp(4.0))) / 2)
    assert metrics["preference/margin"].tolist() == [1, -2] and metrics["preference/accuracy"].tolist() == [1, 0]
    assert method.start_loss() is None
    with pytest.raises(DataError, match="no `margin` column"):
        method.credit([preference(0)], np.random.default_rng(0))


def test_published_settings():
    method = get_method("reward-model")()
    assert (method.papers, method.lr, method.epochs, method.max_length) == ((17,), 3e-6, 1, 2048)
    assert method.wants == {"scores"} and not method.needs_reference()


def test_ratings_of_a_bandit_are_recovered_up_to_a_constant():
    """Gradient descent on the population loss over all pairs recovers the rewards that made the preferences."""
    reward = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    better, worse = (~torch.eye(4, dtype=torch.bool)).nonzero().unbind(1)
    probability = torch.sigmoid(reward[better] - reward[worse])
    for center_coef in (0.0, 1e-5):
        scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-10, tolerance_change=0)

        def closure():
            optimiser.zero_grad()  # noqa: B023
            loss = (probability * bradley_terry_loss(scores[better], scores[worse], 0.0, center_coef)).sum()  # noqa: B023
            loss.backward()
            return loss

        optimiser.step(closure)
        found = scores.detach()
        torch.testing.assert_close(found - found.mean(), reward - reward.mean(), atol=1e-3, rtol=0)
        assert not center_coef or abs(found.mean()) < 1e-3
