from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guerdon.errors import ConfigError, DataError
from guerdon.exact.token_mdp import kl_regularised_optimum
from guerdon.language.forward import GroupModel, Outputs
from guerdon.language.groups import Group
from guerdon.language.packing import Batch, pack, unpack
from guerdon.methods.base import get_method
from guerdon.methods.preferences.dpo import (
    DPO,
    LENGTH_NORMALISED,
    LOSSES,
    REVERSE_KL_ONLY,
    DPONorm,
    LossType,
    divergence_slope,
    implicit_rewards,
    preference_loss,
)

RNG = np.random.default_rng(0)
BETA = 0.3


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def written(loss_type: str, c: float, r: float, e: float) -> float:
    """Each loss as its paper writes it, from implicit rewards c and r, beta and label noise e."""
    m = c - r
    if loss_type in ("sigmoid", "sigmoid_norm"):
        return -(1 - e) * math.log(s(m)) - e * math.log(s(-m))
    if loss_type == "ipo":
        return (m / BETA - 1 / (2 * BETA)) ** 2
    if loss_type == "hinge":
        return max(0.0, 1 - m)
    if loss_type == "robust":
        return (1 - e) / (1 - 2 * e) * -math.log(s(m)) - e / (1 - 2 * e) * -math.log(s(-m))
    if loss_type == "exo_pair":
        return s(m) * math.log(s(m) / (1 - e)) + s(-m) * math.log(s(-m) / e)
    if loss_type == "nca_pair":
        return -math.log(s(c)) - 0.5 * math.log(s(-c)) - 0.5 * math.log(s(-r))
    if loss_type == "sppo_hard":
        return (c / BETA - 1 / (2 * BETA)) ** 2 + (r / BETA + 1 / (2 * BETA)) ** 2
    if loss_type == "apo_zero":
        return (1 - s(c)) + s(r)
    if loss_type == "apo_down":
        return s(c) + (1 - s(m))
    assert loss_type == "discopop"
    w = s(m / 0.05)
    return (1 - w) * -math.log(s(m)) + w * math.exp(-m)


@pytest.mark.parametrize("loss_type", get_args(LossType))
@pytest.mark.parametrize(("chosen", "rejected"), [(0.4, -0.3), (-0.7, 0.2), (0.0, 0.0), (1.5, 0.1), (0.13, 0.1)])
def test_each_loss_equals_its_formula_in_value_and_gradient(loss_type, chosen, rejected):
    noise = 0.1 if loss_type in ("sigmoid", "robust", "exo_pair") else 0.0
    c, r = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected))
    loss = preference_loss(c, r, loss_type, BETA, noise)
    loss.backward()
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(written(loss_type, chosen, rejected, noise), abs=1e-12)
    h = 1e-5
    by_chosen = written(loss_type, chosen + h, rejected, noise) - written(loss_type, chosen - h, rejected, noise)
    by_rejected = written(loss_type, chosen, rejected + h, noise) - written(loss_type, chosen, rejected - h, noise)
    assert c.grad.item() == pytest.approx(by_chosen / (2 * h), abs=2e-6)
    assert r.grad.item() == pytest.approx(by_rejected / (2 * h), abs=2e-6)


def test_every_loss_type_has_a_loss():
    assert set(LOSSES) == set(get_args(LossType))


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
def test_gradients_stay_finite_far_away(loss_type):
    far = torch.tensor([500.0, -500.0, 500.0, -500.0], requires_grad=True)
    preference_loss(far, far.detach().flip(0), loss_type, BETA, 0.1).sum().backward()
    assert far.grad.isfinite().all()


F_OF_U = {
    "reverse_kl": lambda u, a: u * u.log(),
    "forward_kl": lambda u, a: -u.log(),
    "js_divergence": lambda u, a: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha_divergence": lambda u, a: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
}


@pytest.mark.parametrize("divergence", sorted(F_OF_U))
def test_divergence_slope_is_the_derivative_of_f(divergence):
    u = torch.tensor([1.0, 0.05, 0.6, 2.5, 30.0], dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(F_OF_U[divergence](u, 0.3).sum(), u)
    found = divergence_slope(u.detach().log(), divergence, 0.3)
    torch.testing.assert_close(found, slope - slope[0])


def test_alpha_divergence_lies_between_the_two_kls():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(divergence_slope(x, "alpha_divergence", 1e-7), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        divergence_slope(x, "alpha_divergence", 1 - 1e-7), divergence_slope(x, "forward_kl"), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("divergence", sorted(F_OF_U))
def test_a_rejected_answer_that_fell_far_gives_no_nan(divergence):
    logratio = torch.tensor([3.0, -400.0], requires_grad=True)
    chosen, rejected = implicit_rewards(logratio, torch.ones(2), divergence=divergence)
    preference_loss(chosen[None], rejected[None]).sum().backward()
    assert logratio.grad.isfinite().all()


def test_robust_loss_is_unbiased_under_flipped_labels():
    c, r, noise = torch.tensor([0.8, -1.0]), torch.tensor([0.1, 0.3]), 0.2
    seen = (1 - noise) * preference_loss(c, r, "robust", BETA, noise) + noise * preference_loss(
        r, c, "robust", BETA, noise
    )
    torch.testing.assert_close(seen, preference_loss(c, r))


# The method on a real model


def tiny_model(seed: int = 0) -> GroupModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GroupModel(LlamaForCausalLM(LlamaConfig(vocab_size=11, initializer_range=0.3, **sizes)))


def group(prompt: int, *lengths: int, scores: list[float] | None = None) -> Group:
    answers = [RNG.integers(0, 11, n).tolist() for n in lengths]
    values = np.array(scores if scores is not None else [1.0, 0.0], dtype=np.float32)
    return Group.of(RNG.integers(0, 11, prompt).tolist(), answers, values={"score": values})


def credited(method: DPO, groups: list[Group], reference: GroupModel) -> list[Group]:
    groups = method.credit(groups, np.random.default_rng(0))
    batch = pack(groups)
    unpack(batch, "ref_logps", reference(batch).logps)
    return groups


def run(method: DPO, model: GroupModel, parts: list[list[Group]]) -> tuple[torch.Tensor, torch.Tensor, list[dict]]:
    """Summed loss, gradient and metrics over the micro-batches of one global batch."""
    totals = method.totals([g for part in parts for g in part])
    model.zero_grad()
    loss, metrics = torch.zeros(()), []
    for part in parts:
        batch = pack(part, totals=totals)
        share, found = method.loss(model(batch), batch)
        share.backward()
        loss += share.detach()
        metrics.append(found)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()]), metrics


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
def test_start_loss_is_the_loss_where_policy_and_reference_are_equal(loss_type):
    smoothing = 0.01 if loss_type == "exo_pair" else 0.0
    method = DPO(loss_type=loss_type, label_smoothing=smoothing)
    model = tiny_model()
    loss, _, [metrics] = run(method, model, [credited(method, [group(3, 4, 6), group(2, 5, 1)], model)])
    assert loss.item() == pytest.approx(method.start_loss(), rel=1e-6)
    assert metrics["preference/margin"].abs().max() < 1e-6
    if loss_type in ("sigmoid", "sigmoid_norm"):
        assert method.start_loss() == pytest.approx(math.log(2), rel=1e-7)


def test_no_start_loss_where_it_depends_on_the_data():
    assert DPO(reference_free=True).start_loss() is None
    assert DPO(sft_coef=0.1).start_loss() is None


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo"])
@pytest.mark.parametrize("reference_free", [False, True])
def test_loss_on_packed_groups_equals_the_formula_on_plain_forward_passes(loss_type, reference_free):
    method = DPO(loss_type=loss_type, sft_coef=0.7, reference_free=reference_free)
    model, reference = tiny_model(0), tiny_model(1)
    groups = credited(method, [group(3, 4, 6), group(2, 5, 1)], reference)

    def plain(model: GroupModel, ids: np.ndarray, learn: np.ndarray) -> torch.Tensor:
        model.model.set_attn_implementation("sdpa")
        x = torch.from_numpy(ids)
        logps = model.model(input_ids=x[None]).logits[0, :-1].log_softmax(-1).gather(1, x[1:, None])[:, 0]
        model.model.set_attn_implementation("guerdon")
        return logps[torch.from_numpy(learn)[1:]]

    model.zero_grad()
    losses, chosen_logps = [], []
    for g in groups:
        rows = [plain(model, *g.sequence(c)) for c in (0, 1)]
        refs = [0 * row if reference_free else plain(reference, *g.sequence(c)) for c, row in enumerate(rows)]
        scale = [len(row) if loss_type in LENGTH_NORMALISED else 1 for row in rows]
        c, r = (method.beta * (row - ref).sum() / n for row, ref, n in zip(rows, refs, scale, strict=True))
        losses.append(((c - r - 0.5) / method.beta) ** 2 if loss_type == "ipo" else torch.log1p((r - c).exp()))
        chosen_logps.append(rows[0])
    expected = torch.stack(losses).mean() - 0.7 * torch.cat(chosen_logps).mean()
    expected.backward()
    slope = torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, gradient, [metrics] = run(method, model, [groups])
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, slope, atol=1e-4 * float(slope.abs().max()), rtol=0)
    assert metrics["loss/preference"].mean() + 0.7 * metrics["loss/sft"].mean() == pytest.approx(loss.item(), rel=1e-5)


def test_simpo_is_log_probs_per_token_with_a_margin_and_wpo_weighs_by_them():
    group = Group.of([1], [[2] * 2, [3] * 4], values={"score": np.array([1, 0], dtype=np.float32)})
    logps = torch.tensor([-0.5] * 2 + [-0.75] * 4)  # -1 and -3 in all
    lead = 2.0 * (-0.5 + 0.75)

    def loss_of(method: DPO) -> float:
        [paired] = method.credit([group], RNG)
        batch = pack([paired], totals=method.totals([paired]))
        batch.token_values["ref_logps"] = torch.zeros(6)
        return method.loss(Outputs(logps=logps), batch)[0].item()

    simpo = DPO(loss_type="sigmoid_norm", reference_free=True, beta=2.0, target_margin=0.6)
    assert loss_of(simpo) == pytest.approx(-math.log(s(lead - 0.6)), abs=1e-6)
    wpo = DPO(loss_type="sigmoid", beta=0.1, weighted=True)
    assert loss_of(wpo) == pytest.approx(-math.log(s(0.1 * (-1 + 3))) * math.exp(-0.5 - 0.75), abs=1e-6)
    assert wpo.start_loss() is None
    assert DPO(target_margin=0.6).start_loss() == pytest.approx(-math.log(s(-0.6)))


@pytest.mark.parametrize("pairs", ["best-worst", "best-random", "all"])
def test_micro_batches_change_neither_loss_nor_gradient(pairs):
    method = DPO(sft_coef=0.5, pairs=pairs)
    model = tiny_model(0)
    graded = [group(3, 4, 6, 2, scores=[2, 0, 1]), group(2, 5, 1), group(4, 3, 3, scores=[0, 1])]
    groups = credited(method, graded, tiny_model(1))
    whole, gradient, _ = run(method, model, [groups])
    parts, accumulated, metrics = run(method, model, [[g] for g in groups])
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(accumulated, gradient, atol=1e-6, rtol=1e-4)
    # Means over the global batch: every pair, and for the SFT part every token of every pair's chosen answer.
    mean = (
        torch.cat([m["loss/preference"] for m in metrics]).mean()
        + 0.5 * torch.cat([m["loss/sft"] for m in metrics]).mean()
    )
    torch.testing.assert_close(mean, whole)


def test_swapping_the_pairs_negates_the_margin():
    method = DPO(loss_type="sigmoid_norm")
    model = tiny_model(0)
    groups = credited(method, [group(3, 4, 6), group(2, 5, 1)], tiny_model(1))
    _, _, [metrics] = run(method, model, [groups])
    for g in groups:
        g.pairs = [(b, a) for a, b in g.pairs]
    _, _, [swapped] = run(method, model, [groups])
    torch.testing.assert_close(swapped["preference/margin"], -metrics["preference/margin"])
    torch.testing.assert_close(swapped["preference/accuracy"], 1 - metrics["preference/accuracy"])
    torch.testing.assert_close(swapped["reward/chosen"], metrics["reward/rejected"])


def test_credit_pairs_by_score_and_keeps_only_what_is_compared():
    graded = group(3, 1, 2, 3, 4, scores=[1, 3, 0, 3])
    [best_worst] = DPO().credit([graded], np.random.default_rng(0))
    assert best_worst.pairs == [(0, 1)] and best_worst.values["score"].tolist() == [3, 0]
    assert best_worst.lengths().tolist() == [2, 3]
    [every] = DPO(pairs="all").credit([graded], np.random.default_rng(0))
    assert sorted(every.pairs) == [(0, 2), (1, 0), (1, 2), (3, 0), (3, 2)] and len(every) == 4
    assert DPO().credit([group(3, 1, 2, scores=[1, 1])], np.random.default_rng(0)) == []
    assert graded.pairs == []


def test_credit_without_scores_says_what_to_do():
    with pytest.raises(DataError, match=r"row 7: no preference and no scores.*sft"):
        DPO().credit([Group.of([1], [[2]], key="row 7")], np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "ipo does not use label_smoothing"),
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing"),
        ({"alpha": 1.0}, "alpha"),
        ({"target_margin": 0.5, "loss_type": "apo_zero"}, "apo_zero looks at each reward alone"),
        *(({"loss_type": name, "divergence": "forward_kl"}, "reverse_kl") for name in sorted(REVERSE_KL_ONLY)),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DPO(**options).check()


def test_published_settings():
    dpo, norm = get_method("dpo")(), get_method("dpo-norm")()
    for method in (dpo, norm):
        method.check()
        assert method.needs_reference() and method.learns_from == "preferences"
    assert (dpo.papers, dpo.loss_type, dpo.beta, dpo.label_smoothing, dpo.lr) == ((11, 12), "sigmoid", 0.1, 0.0, 1e-6)
    tulu = (norm.papers, norm.loss_type, norm.beta, norm.lr, norm.batch_size, norm.epochs, norm.schedule, norm.warmup)
    assert tulu == ((17,), "sigmoid_norm", 5.0, 5e-7, 128, 1, "linear", 0.1)
    assert not DPO(reference_free=True).needs_reference()
    assert isinstance(norm, DPONorm)


# Against exact optima


def minimise(logits: torch.Tensor, loss, steps: int) -> torch.Tensor:
    optimiser = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(logits.log_softmax(-1)).backward()
        optimiser.step()
        schedule.step()
    return logits.detach().log_softmax(-1)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gradient_descent_on_dpo_reaches_the_kl_regularised_optimum(beta):
    """Population loss with exact Bradley-Terry preferences on a bandit of 5 answers."""
    rng = np.random.default_rng(1)
    reward, ref = rng.uniform(0, 3 * beta, 5), rng.normal(size=5)
    ref -= np.logaddexp.reduce(ref)
    optimum, _ = kl_regularised_optimum(reward, ref, beta)
    better, worse = (~torch.eye(5, dtype=torch.bool)).nonzero().unbind(1)
    r, reference, length = torch.from_numpy(reward), torch.from_numpy(ref), torch.ones(5)
    probability = torch.sigmoid(r[better] - r[worse])

    def loss(logps: torch.Tensor) -> torch.Tensor:
        rewards = implicit_rewards(logps - reference, length, "sigmoid", beta)
        return (probability * preference_loss(rewards[better], rewards[worse], "sigmoid", beta)).sum()

    found = minimise(torch.zeros(5, dtype=torch.float64, requires_grad=True), loss, 600)
    np.testing.assert_allclose(found.numpy(), optimum, atol=2e-4)


def test_dpo_under_an_f_divergence_reaches_that_divergence_s_optimum():
    """At the optimum of E[r] - beta D_f(pi || pi_ref) the reward is beta f'(pi / pi_ref) up to a constant."""
    rng = np.random.default_rng(2)
    beta, reward, ref = 0.5, rng.uniform(0, 1, 4), rng.normal(size=4)
    ref -= np.logaddexp.reduce(ref)
    better, worse = (~torch.eye(4, dtype=torch.bool)).nonzero().unbind(1)
    r, reference, length = torch.from_numpy(reward), torch.from_numpy(ref), torch.ones(4)
    probability = torch.sigmoid(r[better] - r[worse])

    def loss(logps: torch.Tensor) -> torch.Tensor:
        rewards = implicit_rewards(logps - reference, length, "sigmoid", beta, "js_divergence")
        return (probability * preference_loss(rewards[better], rewards[worse])).sum()

    def objective(logps: torch.Tensor) -> torch.Tensor:
        u = (logps - reference).exp()
        return -((logps.exp() * r).sum() - beta * (reference.exp() * F_OF_U["js_divergence"](u, 0)).sum())

    by_preferences = minimise(reference.clone().requires_grad_(), loss, 600)
    directly = minimise(reference.clone().requires_grad_(), objective, 600)
    torch.testing.assert_close(by_preferences, directly, atol=1e-3, rtol=0)


def test_outputs_without_a_model():
    """Log-probs and values by hand: two answers of 2 and 1 tokens behind one prompt."""
    g = Group.of([1], [[2, 3], [4]], values={"score": np.array([1, 0], dtype=np.float32)})
    [g] = DPO().credit([g], RNG)
    batch: Batch = pack([g], totals=DPO().totals([g]))
    batch.token_values["ref_logps"] = torch.tensor([-1.0, -2.0, -3.0])
    logps = torch.tensor([-0.5, -1.5, -5.0], requires_grad=True)
    loss, metrics = DPO(beta=0.5).loss(Outputs(logps=logps), batch)
    loss.backward()
    assert metrics["reward/chosen"].tolist() == [0.5] and metrics["reward/rejected"].tolist() == [-1.0]
    assert metrics["policy/logp_chosen"].tolist() == [-2.0] and metrics["policy/logp_rejected"].tolist() == [-5.0]
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)))
    torch.testing.assert_close(logps.grad, 0.5 * s(-1.5) * torch.tensor([-1.0, -1.0, 1.0]))
