"""Sheet of stream-x (arXiv 2410.14606): every number and statement that can be checked without a long run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from guerdon.control.ingredients import ActorCriticIngredients, Ingredients
from guerdon.control.streaming import kernels
from guerdon.control.streaming.agents import ActorCriticAgent, ValueAgent
from guerdon.control.streaming.networks import sparse_init_
from guerdon.control.streaming.optimizers import ObGD
from guerdon.control.streaming.senses import ObservationNormalizer

E = (1.0, -2.0, 0.5)


@pytest.mark.parametrize(
    ("trace", "delta", "bound", "step"),
    [
        (E, 3.0, 21.0, (0.142857, -0.285714, 0.071429)),  # L1 norm 1 / kappa
        (E, 0.5, 7.0, (0.071429, -0.142857, 0.035714)),  # L1 norm |delta| / kappa
        ((0.01, -0.02, 0.005), 0.5, 0.07, (0.005, -0.01, 0.0025)),  # lr as it is
    ],
)
def test_obgd(trace, delta, bound, step):
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor(trace)
    optimizer = ObGD([p], lr=1.0, kappa=2.0)
    optimizer.step(delta)
    assert optimizer.bound == pytest.approx(bound)
    torch.testing.assert_close(p.data, torch.tensor(step), atol=1e-6, rtol=0)

    rows = np.array([[0.0, 0.0, 0.0], trace], np.float32)
    norm = float(np.abs(rows[1]).sum())
    found, share = kernels.descend(kernels.OBGD, rows, norm, delta, 1.0, 2.0, 1, False)
    assert (found, share) == pytest.approx((bound, 1 / max(bound, 1)))
    np.testing.assert_allclose(rows[0], step, atol=1e-6)


def test_a_step_on_a_linear_value_never_overshoots():
    rng = np.random.default_rng(0)
    for kappa in (1.01, 2.0):
        for _ in range(200):
            w = nn.Parameter(torch.tensor(rng.normal(size=7)))
            x, target = torch.tensor(rng.uniform(-1, 1, 7)), float(rng.normal() * 10 ** rng.uniform(-3, 3))
            optimizer = ObGD([w], lr=1.0, lamda=0.0, kappa=kappa)
            before = target - float(w.detach() @ x)
            w.grad = x
            optimizer.step(before)
            after = target - float(w.detach() @ x)
            assert before * after >= 0
            if optimizer.bound > 1:  # by at most 1 / kappa of the way
                assert 1 - after / before <= 1 / kappa + 1e-9


def test_welford():
    normalizer = ObservationNormalizer((1,))
    outputs = [float(normalizer(np.array([x]))[0]) for x in (1.0, 2.0, 4.0)]
    assert outputs == pytest.approx([0.0, 0.70711, 1.09109], abs=1e-5)
    assert (float(normalizer.mean[0]), float(normalizer.variance[0])) == pytest.approx((2.33333, 2.33333), abs=1e-5)

    senses = kernels.Senses(np.zeros((1, 1), np.float32), np.zeros((1, 2, 2)), np.zeros(1), np.zeros((1, 4)))
    settings = kernels.Settings(0, 0, True, True, True, 0.0, 0.99, 0.8, 1.0, 2.0, 3.0, 0.01)
    compiled = []
    for x in (1.0, 2.0, 4.0):
        kernels.observe(senses, 0, np.array([x], np.float32), senses.x[0], settings, False)
        compiled.append(float(senses.x[0, 0]))
    assert compiled == pytest.approx(outputs, abs=1e-6)


@pytest.mark.parametrize(("fan_in", "left"), [(5, 0), (10, 1), (11, 1), (128, 12)])
def test_sparse_initialisation(fan_in, left):
    weight = sparse_init_(torch.empty(128, fan_in), 0.9, np.random.default_rng(0))
    assert ((weight != 0).sum(1) == left).all()
    assert weight.abs().max() <= 1 / math.sqrt(fan_in)


def tabular(kind: str, actions: int, lr: float, **options) -> ValueAgent:
    network = nn.Linear(4, actions, bias=False).double()
    nn.init.zeros_(network.weight)
    return ValueAgent(kind, Ingredients(optimizer="sgd", lr=lr, **options), network)


STATES = torch.eye(4, dtype=torch.double).unsqueeze(1)


@pytest.mark.parametrize("kind", ["td", "q", "sarsa"])
def test_without_trace_and_bound_it_is_the_textbook_rule(kind):
    rng, actions = np.random.default_rng(0), 1 if kind == "td" else 2
    agent, table = tabular(kind, actions, 0.1, lamda=0.0), np.zeros((4, actions))
    for _ in range(300):
        s, s_next = rng.integers(4, size=2)
        a, a_next = rng.integers(actions, size=2)
        r, done = rng.normal(), rng.random() < 0.2
        agent.update(STATES[s], a, r, STATES[s_next], done, False, next_action=a_next if kind == "sarsa" else 0)
        ahead = table[s_next].max() if kind == "q" else table[s_next, a_next]
        table[s, a] += 0.1 * (r + 0.99 * ahead * (not done) - table[s, a])
    np.testing.assert_allclose(agent.network.weight.detach().numpy().T, table, atol=1e-12)


def test_with_a_full_trace_it_is_every_visit_monte_carlo_to_first_order():
    path, rewards, gamma = [0, 1, 2, 1, 3], [1.0, -2.0, 0.5, 3.0, 1.5], 0.9
    returns, found = 0.0, np.zeros(4)
    for s, r in zip(reversed(path), reversed(rewards), strict=True):
        returns = r + gamma * returns
        found[s] += returns
    errors = []
    for lr in (1e-3, 5e-4):
        agent = tabular("td", 1, lr, lamda=1.0, gamma=gamma)
        for t, r in enumerate(rewards):
            last = t == len(path) - 1
            agent.update(STATES[path[t]], 0, r, STATES[path[t if last else t + 1]], last, False)
        errors.append(np.abs(agent.network.weight.detach().numpy()[0] / lr - found).max())
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.01)


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("reward", [2.0, -2.0, 0.0])
def test_every_step_raises_the_entropy(reward, discrete):
    """With lamda = 0 what the entropy adds to the step is lr |delta| tau grad H, whatever the sign of delta."""
    torch.manual_seed(0)
    x, outputs = torch.randn(1, 3), 4
    action = torch.tensor(1) if discrete else torch.tensor([0.3, -1.0])
    start = nn.Linear(3, outputs)
    policies = []
    for tau in (0.25, 0.0):
        policy, value = nn.Linear(3, outputs), nn.Linear(3, 1)
        policy.load_state_dict(start.state_dict())
        nn.init.zeros_(value.weight)
        nn.init.zeros_(value.bias)
        options = ActorCriticIngredients(optimizer="sgd", lr=0.1, lamda=0.0, entropy_coef=tau)
        agent = ActorCriticAgent(options, policy, value, discrete)
        before = agent.distribution(x).entropy()
        gradient = torch.autograd.grad(before, policy.weight)[0]
        agent.update(x, action, reward, x, True, False)
        policies.append(policy.weight.detach())
    torch.testing.assert_close(policies[0] - policies[1], 0.1 * abs(reward) * 0.25 * gradient, atol=1e-6, rtol=1e-4)

    out = start(x)[0].detach().numpy()
    found = []
    for bonus in (0.25, 0.0):
        grad, taken = np.zeros(outputs, np.float32), np.array([1]) if discrete else action.numpy()
        kernels.grad_policy(not discrete, out, taken, bonus * np.sign(reward), grad)
        found.append(reward * grad)
    added = np.outer(found[0] - found[1], x[0].numpy())
    np.testing.assert_allclose(added, abs(reward) * 0.25 * gradient.numpy(), atol=1e-5)


def test_nothing_is_learned_where_nothing_was_wrong():
    agent = tabular("td", 1, 0.1)
    agent.update(STATES[0], 0, 0.0, STATES[1], False, False)
    assert not agent.network.weight.detach().any()


def test_both_networks_learn_from_the_same_error_before_either_moves():
    torch.manual_seed(0)
    x, x_next = torch.randn(1, 3), torch.randn(1, 3)
    policy, value = nn.Linear(3, 2), nn.Linear(3, 1)
    options = ActorCriticIngredients(optimizer="sgd", lr=0.1, lamda=0.0, entropy_coef=0.0)
    agent = ActorCriticAgent(options, policy, value, discrete=True)
    with torch.no_grad():
        delta = float(1.0 + 0.99 * value(x_next) - value(x))
    expected = value.weight + 0.1 * delta * x
    log_prob = agent.distribution(x).log_prob(torch.tensor(1))
    gradient = torch.autograd.grad(log_prob, policy.weight)[0]
    moved = policy.weight.detach() + 0.1 * delta * gradient
    agent.update(x, torch.tensor(1), 1.0, x_next, False, False)
    torch.testing.assert_close(value.weight, expected)
    torch.testing.assert_close(policy.weight.detach(), moved)
