from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import guerdon
from guerdon.control.networks import Gaussian, GaussianActor, QEnsemble
from guerdon.errors import ConfigError
from guerdon.exact.mdp import value_iteration
from guerdon.methods.base import check_options, get_method
from guerdon.methods.control import td_target
from guerdon.methods.online.dqn import greedy_value, td_loss, td_slope
from guerdon.methods.online.ppo import Moments, RewardScale, gae, value_loss
from guerdon.methods.online.sac import critic_loss, policy_slopes, soft_value, temperature_loss
from guerdon.training.config import ControlTraining
from methods.online_problems import CHAIN, begin

SMALL = {"hidden": (16, 16), "max_samples": 300}
REPLAY = {"batch_size": 16, "learning_starts": 50}
CASES = {
    "dqn": {"env": "CartPole-v1", **REPLAY},
    "sac": {"env": "Pendulum-v1", **REPLAY},
    "ppo-control": {"env": "Pendulum-v1", "rollout": 64, "batch_size": 32, "copies": 2, "epochs": 2},
}
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# DQN


def test_greedy_value_and_its_double_form():
    target = torch.tensor([[[1.0, 5.0, 2.0], [0.0, -1.0, 3.0]]])
    online = torch.tensor([[[9.0, 0.0, 1.0], [0.0, 7.0, 1.0]]])
    close(greedy_value(target), torch.tensor([[5.0, 3.0]]))
    close(greedy_value(target, online), torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("kind", ["huber", "squared"])
def test_td_slope_is_the_derivative_of_td_loss(kind):
    q, target = (3 * torch.randn(2, 50)).requires_grad_(), torch.randn(2, 50)
    loss = td_loss(q, target, kind)
    (slope,) = torch.autograd.grad(loss.sum(), q)
    close(td_slope((q - target).detach(), kind), slope)
    for d, value in zip((q - target).detach().flatten().tolist(), loss.flatten().tolist(), strict=True):
        expected = abs(d) - 0.5 if kind == "huber" and abs(d) > 1 else d * d / 2
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"double": True}, {"dueling": True}, {"n_step": 3, "loss": "squared"}])
def test_dqn_moves_as_autograd_and_torchs_adam_do(tmp_path, options):
    method, run = begin("dqn", "CartPole-v1", tmp_path, seeds=2, **SMALL, **REPLAY, **options)
    steps = method.learn(run)
    next(steps)
    net, target = copy.deepcopy(method.q), method.target
    for p in target.parameters():
        p.add_(0.1 * torch.randn_like(p))
    method.optimizer.first[0].zero_()
    batch = method.replay.sample(16)
    chooser = net(batch.next_obs) if method.double else None
    y = td_target(batch, greedy_value(target(batch.next_obs), chooser), 0.99).detach()
    q = net(batch.obs).gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
    loss = td_loss(q, y, method.loss).mean(-1)
    for net_p, first, second in zip(net.parameters(), method.optimizer.first, method.optimizer.second, strict=True):
        (gradient,) = torch.autograd.grad(loss.sum(), net_p, retain_graph=True)
        t = float(method.optimizer.steps) + 1
        m, v = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        net_p.data -= 2.5e-4 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    metrics = method.update(batch)
    close(metrics["loss/q"], loss.detach())
    for mine, theirs in zip(method.q.parameters(), net.parameters(), strict=True):
        close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_priorities_follow_the_errors_and_weights_scale_the_loss(tmp_path):
    method, run = begin("dqn", "CartPole-v1", tmp_path, priority=1.0, **SMALL, **REPLAY)
    next(method.learn(run))
    batch = run.batch
    assert batch.weight is not None and batch.weight.max() == 1
    full = copy.deepcopy(batch)
    full.weight = torch.ones_like(full.weight)
    again = copy.deepcopy(method.optimizer.state_dict()), copy.deepcopy(method.q.state_dict())
    loss = method.update(full)["loss/q"]
    method.optimizer.load_state_dict(again[0])
    method.q.load_state_dict(again[1])
    full.weight *= 0.5
    close(method.update(full)["loss/q"], loss / 2)
    method.replay.prioritise(batch.index[:, :1], torch.full((1, 1), 1e6))
    assert (method.replay.sample(16).index == batch.index[:, :1]).all()


def test_epsilon_falls_linearly(tmp_path):
    method, run = begin("dqn", "CartPole-v1", tmp_path, epsilon_end=0.0, epsilon_decay=0.5, **SMALL, **REPLAY)
    obs = np.zeros((1, 4000, 4), np.float32)
    greedy = run.policy.act(obs)
    shares = []
    for run.cursor.step in (0, 75, 150, 300):
        shares.append(float((method.explore(run, obs) != greedy).mean()))
    assert shares[0] == pytest.approx(0.5, abs=0.03)  # half of random actions are the greedy one
    assert shares[1] == pytest.approx(0.25, abs=0.03)
    assert shares[2:] == [0, 0]


def test_target_network_follows_every_so_many_steps(tmp_path):
    method, run = begin("dqn", "CartPole-v1", tmp_path, target_every=100, log_every=50, **SMALL, **REPLAY)
    seen = []
    for _ in method.learn(run):
        same = all(torch.equal(p, q) for p, q in zip(method.q.parameters(), method.target.parameters(), strict=True))
        seen.append((run.cursor.step, same))
    assert seen == [(50, True), (100, True), (150, False), (200, True), (250, False), (300, True)]


def test_dqn_finds_the_optimal_values_of_a_chain(tmp_path):
    options = {"hidden": (), "lr": 0.01, "batch_size": 256, "loss": "squared", "target_every": 25, "target_rate": 0.5}
    schedule = {"learning_starts": 200, "epsilon_end": 1.0, "max_samples": 4000}
    method, run = begin("dqn", "Chain-v0", tmp_path, seeds=2, gamma=0.8, **options, **schedule)
    for _ in method.learn(run):
        pass
    states = torch.eye(4)[:3].expand(2, -1, -1)
    known = torch.from_numpy(value_iteration(CHAIN).q[:3]).float().expand(2, -1, -1)
    close(method.q(states).detach(), known, rtol=0, atol=0.06)
    assert (run.policy.act(states.numpy()) == 1).all()


# SAC


def test_sac_losses_by_hand():
    q = torch.tensor([[[1.0, 4.0], [2.0, 3.0]]])
    log_prob, alpha = torch.tensor([[0.5, -1.0]]), torch.tensor([0.2])
    close(soft_value(q, log_prob, alpha), torch.tensor([[1 - 0.1, 3 + 0.2]]))
    close(critic_loss(q, torch.tensor([[0.0, 1.0]])), torch.tensor([(1 + 9 + 4 + 4) / 2 / 2]))
    log_alpha = torch.tensor([math.log(0.2)], requires_grad=True)
    loss = temperature_loss(log_alpha, torch.tensor([3.0]), -1.0)
    close(loss.detach(), torch.tensor([0.8]))
    close(torch.autograd.grad(loss.sum(), log_alpha)[0], loss.detach())  # which `SAC.update` relies on


def test_policy_slopes_are_the_derivatives_through_the_sampled_action():
    mean, log_std = torch.randn(2, 30, 3).requires_grad_(), (torch.randn(2, 30, 3) / 2).requires_grad_()
    noise, alpha = torch.randn(2, 30, 3), torch.tensor([0.1, 2.0])
    action, log_prob = Gaussian(mean, log_std, torch.zeros(3), torch.ones(3)).sample(noise)
    value = (action.sin() * torch.tensor([1.0, 2.0, 3.0])).sum(-1)
    objective = alpha[:, None] * log_prob - value
    expected = torch.autograd.grad(objective.sum(), (mean, log_std), retain_graph=True)
    (to_action,) = torch.autograd.grad(value.sum(), action)
    for mine, theirs in zip(policy_slopes(mean, log_std, noise, to_action, alpha), expected, strict=True):
        close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_sac_moves_as_autograd_does(tmp_path):
    method, run = begin("sac", "Pendulum-v1", tmp_path, seeds=2, lr=1e-3, **SMALL, **REPLAY)
    next(method.learn(run))
    actor, critic = copy.deepcopy(method.actor), copy.deepcopy(method.critic)
    batch, noise = method.replay.sample(16), torch.randn(2, 2, 16, 1)
    method.streams = SimpleNamespace(normal=lambda *_: noise)
    alpha = method.log_alpha.detach().exp()
    with torch.no_grad():
        following, log_prob = actor(batch.next_obs).sample(noise[:, 1])
        value = method.target(batch.next_obs, following).amin(1) - alpha[:, None] * (log_prob + math.log(2))
        y = td_target(batch, value, 0.99)
    q_loss = 0.5 * (critic(batch.obs, batch.action) - y[:, None]).square().sum(1).mean(-1)
    expected = list(torch.autograd.grad(q_loss.sum(), list(critic.parameters())))
    before = [p.clone() for p in method.actor.parameters()]
    metrics = method.update(batch)
    close(metrics["loss/q"], q_loss.detach())
    for p, gradient in zip(method.critic.parameters(), expected, strict=True):
        close(p.grad, gradient, rtol=1e-4, atol=1e-6)
    action, log_prob = actor(batch.obs).sample(noise[:, 0])  # judged by the critics as they are now
    loss = (alpha[:, None] * (log_prob + math.log(2)) - method.critic(batch.obs, action).amin(1)).mean(-1)
    close(metrics["loss/policy"], loss.detach())
    gradients = torch.autograd.grad(loss.sum(), list(actor.parameters()))
    for p, gradient, old in zip(method.actor.parameters(), gradients, before, strict=True):
        close(p.grad, gradient, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, old)
    close(metrics["policy/entropy"], -(log_prob + math.log(2)).detach().mean(-1))


def test_a_log_std_at_its_bound_is_not_pushed_further(tmp_path):
    method, run = begin("sac", "Pendulum-v1", tmp_path, **SMALL, **REPLAY)
    next(method.learn(run))
    with torch.no_grad():
        method.actor.mlp.head.bias[:, 1] = 50.0
    batch = method.replay.sample(16)
    method.update(batch)
    assert (method.actor.mlp.head.weight.grad[:, 1] == 0).all()
    assert (method.actor.mlp.head.weight.grad[:, 0] != 0).any()


def test_sac_finds_the_soft_optimum_of_a_bandit(tmp_path):
    """pi(a) is proportional to exp(-(a - 0.3)^2 / alpha): a normal distribution of variance alpha / 2."""
    options = {"alpha": 0.1, "lr": 3e-3, "hidden": (32,), "batch_size": 64, "learning_starts": 100}
    method, run = begin("sac", "Bandit-v0", tmp_path, seeds=2, max_samples=1500, **options)
    for _ in method.learn(run):
        pass
    with torch.no_grad():
        actions, log_prob = method.actor(torch.zeros(2, 20_000, 1)).sample(torch.randn(2, 20_000, 1))
    close(actions.mean((1, 2)), torch.full((2,), 0.3), rtol=0, atol=0.05)
    close(actions.std((1, 2)), torch.full((2,), math.sqrt(0.05)), rtol=0, atol=0.04)
    known = 0.5 * math.log(2 * math.pi * math.e * 0.05)
    close(-log_prob.mean(1), torch.full((2,), known), rtol=0, atol=0.12)


def test_the_temperature_brings_entropy_to_its_target(tmp_path):
    options = {"target_entropy": -0.5, "lr": 1e-2, "hidden": (32,), "batch_size": 64, "learning_starts": 100}
    method, run = begin("sac", "Bandit-v0", tmp_path, max_samples=2500, log_every=500, **options)
    *_, last = method.learn(run)
    assert last["policy/entropy"][0] == pytest.approx(-0.5, abs=0.1)
    # where the entropy of exp(-(a - 0.3)^2 / alpha) is the target
    assert last["policy/temperature"][0] == pytest.approx(2 * math.exp(-1) / (2 * math.pi * math.e), rel=0.3)


def test_entropy_is_counted_between_minus_1_and_1(tmp_path):
    """An actor over [-2, 2] has more entropy than one over [-1, 1], but counts as having the same."""
    method, _ = begin("sac", "Pendulum-v1", tmp_path, **SMALL, **REPLAY)
    assert method.unit == pytest.approx(math.log(2))
    assert method.wanted == -1


# PPO


def naive_gae(reward, value, next_value, terminated, truncated, gamma, lamda):
    advantage = torch.zeros_like(reward)
    for s, c in np.ndindex(reward.shape[0], reward.shape[2]):
        running = 0.0
        for t in reversed(range(reward.shape[1])):
            at = s, t, c
            delta = reward[at] + gamma * next_value[at] * (not terminated[at]) - value[at]
            running = delta + gamma * lamda * running * (not (terminated[at] or truncated[at]))
            advantage[at] = running
    return advantage


@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_gae_is_the_recursion(steps):
    reward, value, next_value = torch.randn(3, 2, steps, 3)
    terminated, truncated = torch.rand(2, 2, steps, 3) < 0.1
    given = reward, value, next_value, terminated, truncated
    before = [x.clone() for x in given]
    close(gae(*given, 0.9, 0.8), naive_gae(*given, 0.9, 0.8), rtol=1e-4, atol=1e-5)
    close(gae(*given, 0.9, 0.0), reward + 0.9 * next_value * ~terminated - value)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_gae_with_lamda_1_is_the_return_less_the_value():
    reward, value = torch.randn(2, 1, 5, 1)
    never, end = torch.zeros(1, 5, 1, dtype=torch.bool), torch.zeros(1, 5, 1, dtype=torch.bool)
    end[0, 4, 0] = True
    following = torch.cat([value[:, 1:], torch.full((1, 1, 1), 7.0)], 1)
    discounts = 0.9 ** torch.arange(5.0)
    total = (discounts * reward.flatten()).sum()
    close(gae(reward, value, following, end, never, 0.9, 1.0)[0, 0, 0], total - value[0, 0, 0])
    # a truncation bootstraps from the true last observation
    close(gae(reward, value, following, never, end, 0.9, 1.0)[0, 0, 0], total + 0.9**5 * 7 - value[0, 0, 0])


def test_value_loss_and_its_clipping():
    value, old, target = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 4.0])
    close(value_loss(value, old, target, 0.0), torch.tensor([0.5, 0.5]))
    close(value_loss(value, old, target, 0.2), torch.tensor([0.5, (1.2 - 4) ** 2 / 2]))


def test_moments_and_the_scale_of_rewards():
    rng = np.random.default_rng(0)
    chunks = [rng.normal(3, 2, (2, n, 3)) for n in (1, 5, 40)]
    moments = Moments(2, (3,))
    assert (moments.mean == 0).all() and (moments.std == 1).all()
    for chunk in chunks:
        moments.update(chunk)
    together = np.concatenate(chunks, 1)
    np.testing.assert_allclose(moments.mean, together.mean(1), rtol=1e-5)
    np.testing.assert_allclose(moments.std, together.std(1), rtol=1e-5)

    reward, ended = rng.normal(size=(2, 30, 2)), rng.random((2, 30, 2)) < 0.1
    scaler = RewardScale(2, 2, 0.9)
    scaler.scale(reward[:, :10], ended[:, :10])
    scaled = scaler.scale(reward[:, 10:], ended[:, 10:])
    sums = np.zeros_like(reward)
    for s, c in np.ndindex(2, 2):
        u = 0.0
        for t in range(30):
            u = 0.9 * u + reward[s, t, c]
            sums[s, t, c] = u
            u *= not ended[s, t, c]
    np.testing.assert_allclose(scaled, reward[:, 10:] / sums.reshape(2, -1).std(1)[:, None, None], rtol=1e-4)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_ppo_loss_starts_at_ratios_of_1_and_moves_as_autograd_does(tmp_path, env):
    how = {"rollout": 32, "batch_size": 16, "entropy_coef": 0.1, "value_clip": 0.2, "max_grad_norm": 0.0}
    method, run = begin("ppo-control", env, tmp_path, seeds=2, **{**SMALL, "max_samples": 100}, **how)
    steps = method.learn(run)
    obs = run.envs.reset()
    for _ in range(32):
        step = run.envs.step(actions := method.explore(run, obs))
        method.gathered.add(
            obs=obs,
            action=actions,
            reward=step.reward,
            next_obs=step.final_obs,
            terminated=step.terminated,
            truncated=step.truncated,
        )
        obs = step.obs
    batch = method.credit(run)
    part = batch.take(torch.stack([torch.randperm(32)[:16] for _ in range(2)]))
    actor, critic = copy.deepcopy(method.actor), copy.deepcopy(method.critic)
    with torch.no_grad():
        for p in actor.parameters():
            p += 0.1 * torch.randn_like(p)
    method.actor.load_state_dict(actor.state_dict())
    losses = []
    for k in range(2):
        ratio = (actor(part.obs).log_prob(part.action)[k] - part.log_prob[k]).exp()
        advantage = (part.advantage[k] - part.advantage[k].mean()) / (part.advantage[k].std() + 1e-8)
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        value, target = critic(part.obs)[k], part.advantage[k] + part.value[k]
        entropy = actor(part.obs).entropy()[k].mean()
        losses.append(-surrogate + 0.5 * 0.5 * (value - target).square().mean() - 0.1 * entropy)
    parameters = [*actor.parameters(), *critic.parameters()]
    gradients = torch.autograd.grad(sum(losses), parameters)
    first = method.update(batch.take(torch.arange(32).expand(2, -1)))
    assert not torch.allclose(first["policy/kl"], torch.zeros(2))
    method.actor.load_state_dict(actor.state_dict())
    method.critic.load_state_dict(critic.state_dict())
    method.update(part)
    for p, gradient in zip(method.optimizer.parameters, gradients, strict=True):
        close(p.grad, gradient, rtol=1e-3, atol=1e-5)
    del steps


def test_ppo_first_ratio_is_1(tmp_path):
    how = {"rollout": 32, "batch_size": 32, "epochs": 1, "log_every": 32}
    method, run = begin("ppo-control", "Pendulum-v1", tmp_path, **{**SMALL, "max_samples": 64}, **how)
    first = next(method.learn(run))
    assert abs(first["policy/kl"][0]) < 1e-6 and first["policy/clip_share"] == [0]
    assert first["loss/policy"][0] == pytest.approx(0, abs=1e-5)  # the mean of normalised advantages


def test_ppo_bootstraps_a_truncation_from_the_last_observation(tmp_path):
    how = {"rollout": 4, "batch_size": 4, "scale_rewards": False, "normalize_observations": False}
    method, run = begin("ppo-control", "Pendulum-v1", tmp_path, **{**SMALL, "max_samples": 8}, **how)
    rng = np.random.default_rng(0)
    obs, final = rng.normal(size=(2, 1, 4, 1, 3)).astype(np.float32)
    truncated, terminated = np.zeros((2, 1, 4, 1), bool)
    truncated[0, 1], terminated[0, 2] = True, True
    method.gathered.arrays = {
        "obs": obs,
        "next_obs": final,
        "action": np.zeros((1, 4, 1, 1), np.float32),
        "reward": np.ones((1, 4, 1), np.float32),
        "terminated": terminated,
        "truncated": truncated,
    }
    batch = method.credit(run)
    with torch.no_grad():
        v, following = method.critic(torch.from_numpy(obs[:, :, 0])), method.critic(torch.from_numpy(final[:, :, 0]))
    delta = 1 + 0.99 * following[0] * torch.tensor([1, 1, 0, 1.0]) - v[0]
    close(batch.advantage[0], delta + 0.99 * 0.95 * torch.stack([delta[1], *torch.zeros(3)]))


def test_ppo_learning_rate_falls_to_0(tmp_path):
    how = {"rollout": 25, "batch_size": 25, "log_every": 25}
    method, run = begin("ppo-control", "CartPole-v1", tmp_path, lr=1e-3, **{**SMALL, "max_samples": 100}, **how)
    rates = [method.optimizer.lr for _ in method.learn(run)]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


# All three


@pytest.mark.parametrize("name", CASES)
def test_a_seed_learns_the_same_alone_and_beside_others(tmp_path, name):
    found = {}
    for seed, seeds in ((0, 3), (1, 1)):
        method, run = begin(name, path := CASES[name]["env"], tmp_path, seed=seed, seeds=seeds, **_options(name))
        rows = list(method.learn(run))
        found[seeds] = rows, run.policy.act(run.envs.obs[:1].repeat(seeds, 0)), run.envs.obs
        assert path
    alone, (rows, _, obs) = found[1][0], found[3]
    assert len(alone) == len(rows) == 3
    for a, b in zip(alone, rows, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key][0], b[key][1], rtol=2e-3, atol=1e-4, err_msg=key)
    np.testing.assert_allclose(found[1][2][0], obs[1], rtol=1e-3, atol=1e-3)


def _options(name: str) -> dict:
    return {"log_every": 100, **SMALL, **{k: v for k, v in CASES[name].items() if k != "env"}}


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    script = Path(__file__).with_name("online_chaos.py")
    how = {"cwd": script.parents[1], "capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": "."}}
    done = subprocess.run([sys.executable, script, tmp_path], **how, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in CASES:
        whole, killed = tmp_path / f"whole-{name}", tmp_path / f"killed-{name}"
        a, b = (load_file(path / "policy" / "policy.safetensors") for path in (whole, killed))
        assert all(torch.equal(a[key], b[key]) for key in a)
        rows = [
            [
                {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
                for line in (path / "metrics.jsonl").read_text().splitlines()
            ]
            for path in (whole, killed)
        ]
        assert str(rows[0]) == str(rows[1])  # as text, in which nan is nan


@pytest.mark.parametrize("name", CASES)
def test_state_goes_to_a_checkpoint_and_comes_back(tmp_path, name):
    method, run = begin(name, CASES[name]["env"], tmp_path, seeds=2, **_options(name))
    steps = method.learn(run)
    next(steps)
    run.save(tmp_path)
    rest = list(steps)
    again, fresh = begin(name, CASES[name]["env"], tmp_path, seeds=2, **_options(name))
    fresh.restore(tmp_path)
    assert str(list(again.learn(fresh))) == str(rest)
    for p, q in zip(run.policy.actor.parameters(), fresh.policy.actor.parameters(), strict=True):
        assert torch.equal(p, q)


def test_training_from_the_top(tmp_path):
    out = guerdon.train(
        "dqn", env="CartPole-v1", max_samples=2500, seeds=2, learning_starts=500, out=str(tmp_path / "a")
    )
    last = out.metrics()[-1]
    assert last["eval/return"] > 100  # 20 at random
    policy = guerdon.load_policy(tmp_path / "a")
    assert policy.act(np.zeros((2, 1, 4), np.float32)).shape == (2, 1)


@pytest.mark.slow
def test_ppo_balances_the_pole(tmp_path):
    how = {"max_samples": 16_384, "rollout": 1024, "copies": 2}
    out = guerdon.train("ppo-control", env="CartPole-v1", out=str(tmp_path / "a"), **how)
    last = out.metrics()[-1]
    assert last["eval/return"] > 300


@pytest.mark.parametrize("env", ["MiniGrid-Empty-5x5-v0", "MinAtar/Breakout-v1", "ALE/Breakout-v5"])
@pytest.mark.parametrize("name", ["dqn", "ppo-control"])
def test_grids_and_images_need_no_code_of_their_own(tmp_path, name, env):
    own = {"dqn": {"learning_starts": 100, "train_every": 10, "batch_size": 8}}
    how = own.get(name, {"rollout": 64, "batch_size": 32, "epochs": 1})
    method, run = begin(name, env, tmp_path, hidden=(), max_samples=200, log_every=100, seeds=2, **how)
    rows = list(method.learn(run))
    assert run.spec.image == (not env.startswith("MiniGrid")) and method.hidden == ()
    assert all(np.isfinite(rows[-1][key]).all() for key in rows[-1] if key.startswith("loss/"))
    assert any(key.startswith("loss/") for key in rows[-1])
    assert run.policy.act(run.envs.obs).shape == (2, 1)


@pytest.mark.parametrize(
    ("name", "env", "options"),
    [
        ("dqn", "CartPole-v1", {"buffer_size": 1, "batch_size": 1, "learning_starts": 0, "target_every": 1}),
        ("sac", "Pendulum-v1", {"buffer_size": 1, "batch_size": 1, "learning_starts": 0}),
        ("ppo-control", "Pendulum-v1", {"rollout": 1, "batch_size": 1, "epochs": 1, "normalize_advantages": False}),
    ],
)
def test_learning_from_the_last_transition_alone(tmp_path, name, env, options):
    method, run = begin(name, env, tmp_path, hidden=(8,), max_samples=20, log_every=1, **options)
    rows = list(method.learn(run))
    assert all(np.isfinite(row[key]).all() for row in rows for key in row if key.startswith("loss/"))
    assert sum("value/mean" in row for row in rows) == 20


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("dqn", {"env": "CartPole-v1", "max_samples": 500}, "learning_starts is 1000, and the run ends after 500"),
        ("dqn", {"data": "x.npz"}, "give env instead of data"),
        ("dqn", {"env": "CartPole-v1", "epsilon_end": 2.0}, "epsilon_end is 2.0"),
        ("dqn", {"env": "CartPole-v1", "hidden": (0,)}, "every layer must be at least 1 wide"),
        ("sac", {"env": "Pendulum-v1", "alpha": 0.0}, "alpha is 0.0: it must be above 0"),
        ("ppo-control", {"env": "CartPole-v1", "max_samples": 100}, "before the first update after 2048"),
        ("ppo-control", {"env": "CartPole-v1", "batch_size": 60}, "make it a multiple of batch_size"),
        ("ppo-control", {"env": "CartPole-v1", "batch_size": 1}, "give normalize_advantages=false"),
    ],
)
def test_bad_options_are_told(name, options, told):
    cls = get_method(name)
    training = {k: v for k, v in options.items() if k in ("env", "data", "max_samples")}
    method = cls(**{k: v for k, v in options.items() if k not in training})
    with pytest.raises(ConfigError, match=told):
        check_options(method, ControlTraining(**training))


def test_a_method_that_cannot_act_there_says_which_can(tmp_path):
    with pytest.raises(ConfigError, match=r"sac acts with continuous actions, .* dqn, ppo-control"):
        begin("sac", "CartPole-v1", tmp_path, **SMALL, **REPLAY)
    with pytest.raises(ConfigError, match=r"dqn acts with discrete actions, .* ppo-control, sac"):
        begin("dqn", "Pendulum-v1", tmp_path, **SMALL, **REPLAY)


def test_environments_that_could_not_be_restored_cut_what_was_running(tmp_path):
    for name in CASES:
        method, run = begin(name, CASES[name]["env"], tmp_path, **_options(name))
        steps = method.learn(run)
        next(steps)
        run.envs.restorable = False
        next(method.learn(run))
        if name == "ppo-control":
            assert method.gathered.arrays["truncated"].any()
        else:
            assert method.replay.state_dict()["data.truncated"].any()


def test_sac_uses_the_networks_it_should(tmp_path):
    method, _ = begin("sac", "Pendulum-v1", tmp_path, critics=3, **SMALL, **REPLAY)
    assert isinstance(method.actor, GaussianActor) and method.actor.squash
    assert isinstance(method.critic, QEnsemble) and method.critic.mlp.head.weight.shape[:2] == (1, 3)
