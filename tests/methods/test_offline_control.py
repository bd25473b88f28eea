from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file

import guerdon
from guerdon.control.networks import (
    CategoricalActor,
    DeterministicActor,
    GaussianActor,
    build_actor,
    initialise,
)
from guerdon.control.optim import Adam
from guerdon.control.policy import ControlPolicy
from guerdon.control.replay import Batch, Replay
from guerdon.control.spaces import Spec
from guerdon.control.streams import Streams
from guerdon.control.tabular import as_transitions
from guerdon.errors import ConfigError
from guerdon.exact.fixed_points import advantage_weighted, in_sample_fixed_point
from guerdon.exact.samples import sample
from guerdon.exact.worlds import random_mdp
from guerdon.methods.base import check_options
from guerdon.methods.control import td_target
from guerdon.methods.offline.bc import BC, imitate, imitation_loss, top_episodes
from guerdon.methods.offline.iql import IQL, corruption_statistics, expectile_loss
from guerdon.methods.offline.riql import RIQL
from guerdon.methods.offline.td3_bc import TD3BC, smoothed, td3_bc_loss
from guerdon.training.config import ControlTraining
from guerdon.training.control import ControlRun
from guerdon.training.distributed import Distribution

SMALL = {"hidden": (16, 16), "batch_size": 32}
# RIQL with all that it adds taken out.
REDUCED = {
    "critics": 2,
    "td": "mse",
    "ensemble": "min",
    "normalize": False,
    "actor": "gaussian",
    "init": "orthogonal",
}


def write(path: Path, data: dict[str, np.ndarray]) -> str:
    np.savez(path, **data)
    return str(path)


def continuous(rows: int = 400) -> dict[str, np.ndarray]:
    """Episodes of 20 rows of noise, the actions linear in what is observed."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(rows, 3)).astype(np.float32)
    actions = np.tanh(observations[:, :2] + 0.1 * rng.normal(size=(rows, 2))).astype(np.float32)
    ends = np.arange(rows) % 20 == 19
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rng.normal(size=rows).astype(np.float32),
        "next_observations": rng.normal(size=(rows, 3)).astype(np.float32),
        "terminals": ends & (rng.random(rows) < 0.5),
        "timeouts": ends,
    }


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("data") / "noise.npz", continuous())


def prepared(method, data: str, **training) -> ControlRun:
    config = ControlTraining(data=data, **training)
    check_options(method, config)
    run = ControlRun(method, config, Distribution(), Path(data).parent)
    method.setup(run)
    return run


def updated(method, data: str, updates: int, **training) -> ControlRun:
    run = prepared(method, data, **training, max_updates=updates, log_every=updates)
    for metrics in method.learn(run):
        run.metrics = metrics
    return run


def parameters(run: ControlRun) -> dict[str, torch.Tensor]:
    modules = {name: part for name, part in run.parts.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{k}": p for name, module in modules.items() for k, p in module.state_dict().items()}


# Formulas


def test_expectile_loss():
    u = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], requires_grad=True)
    loss = expectile_loss(u, 0.7)
    torch.testing.assert_close(loss, torch.tensor([1.2, 0.3, 0.0, 0.7, 2.8]))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), u)[0], torch.tensor([-1.2, -0.6, 0.0, 1.4, 2.8]))


def test_td_target_goes_on_after_a_truncation():
    true, false = torch.tensor([[True, True, False, False]]), torch.tensor([[False, True, True, False]])
    ones = torch.ones(1, 4)
    batch = Batch(ones, ones, ones, ones, terminated=true, truncated=false, steps=torch.tensor([[1, 1, 1, 3]]))
    torch.testing.assert_close(td_target(batch, 10 * ones, 0.5), torch.tensor([[1, 1, 6, 2.25]]))


def test_imitation_losses(noise):
    action = torch.tensor([[[0.5, -1.0]]])
    assert imitation_loss(torch.tensor([[[0.0, 1.0]]]), action).item() == 4.25
    run = prepared(BC(**SMALL, actor="gaussian"), noise)
    obs = torch.randn(1, 4, 3)
    output = run.policy.actor(obs)
    expected = -torch.distributions.Normal(output.mean, output.log_std.exp()).log_prob(action).sum(-1)
    torch.testing.assert_close(imitation_loss(output, action.expand(1, 4, 2)), expected)


BODY = Spec((3,), False, False, 2, (-1.0, -3.0), (1.0, 2.0))
ACTORS = {
    "deterministic": DeterministicActor(2, BODY, (16,)),
    "gaussian": GaussianActor(2, BODY, (16,), squash=False, state_dependent=False),
    "bounded": GaussianActor(2, BODY, (16,), squash=False, state_dependent=False, bound_mean=True),
    "categorical": CategoricalActor(2, Spec((3,), False, True, 4, (), ()), (16,)),
    "image": GaussianActor(
        2, Spec((4, 10, 10), True, False, 2, BODY.low, BODY.high), (16,), squash=False, state_dependent=False
    ),
}


@pytest.mark.parametrize("kind", ACTORS)
def test_imitation_in_closed_form_is_that_of_autograd(kind):
    torch.manual_seed(0)
    mine = copy.deepcopy(ACTORS[kind])
    initialise(mine, [0, 1])
    if "log_std" in dict(mine.named_parameters()):
        mine.log_std.data = torch.tensor([[[0.3, -6.0]], [[2.0, 9.0]]])  # within, at and beyond the bounds
    theirs = copy.deepcopy(mine)
    obs = torch.randint(0, 2, (2, 7, 4, 10, 10), dtype=torch.uint8) if kind == "image" else torch.randn(2, 7, 3)
    action = torch.randint(0, 4, (2, 7)) if kind == "categorical" else torch.rand(2, 7, 2)
    weight = torch.rand(2, 7)
    loss = (weight * imitation_loss(theirs(obs), action)).mean(-1)
    expected = torch.autograd.grad(loss.sum(), list(theirs.parameters()))
    batch = Batch(obs, action, weight, obs, weight < 0, weight < 0)
    with torch.no_grad():
        torch.testing.assert_close(imitate(mine, Adam(mine.parameters(), 1e-3), batch, weight), loss.detach())
    for p, gradient in zip(mine.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)


def test_a_bounded_mean_is_the_tanh_of_a_plain_one(noise):
    plain, bounded = (
        prepared(IQL(**SMALL, actor=kind), noise, seeds=2).policy.actor for kind in ("gaussian", "bounded-gaussian")
    )
    obs = 3 * torch.randn(2, 5, 3)
    mean = (bounded.low + bounded.high) / 2 + (bounded.high - bounded.low) / 2 * torch.tanh(plain(obs).mean)
    torch.testing.assert_close(bounded(obs).mean, mean)
    torch.testing.assert_close(bounded(obs).log_std, plain(obs).log_std)
    again = build_actor(bounded.config)
    again.load_state_dict(bounded.state_dict())
    torch.testing.assert_close(again.act(obs), mean)


def test_top_episodes():
    returns, lengths = np.array([1.0, 5.0, 3.0, 5.0]), np.array([10, 30, 20, 40])
    assert top_episodes(returns, lengths, 0.7).tolist() == [False, True, False, True]
    assert top_episodes(returns, lengths, 0.5).tolist() == [False, True, False, False]
    assert top_episodes(returns, lengths, 0.9).tolist() == [False, True, True, True]
    assert top_episodes(returns, lengths, 0.01).tolist() == [False, True, False, False]


def test_smoothed_target_actions_stay_within_noise_and_bounds():
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
    action, noise = torch.tensor([[[0.0, 0.9]]]), torch.tensor([[[5.0, 5.0]]])
    torch.testing.assert_close(smoothed(action, noise, 0.5, low, high), torch.tensor([[[1.0, 1.0]]]))
    torch.testing.assert_close(smoothed(action, -noise / 50, 0.5, low, high), torch.tensor([[[-0.2, 0.85]]]))


def test_td3_bc_loss_and_its_gradient():
    q = torch.tensor([[1.0, -3.0]], requires_grad=True)
    policy = torch.tensor([[[0.5, 0.0], [0.0, 1.0]]], requires_grad=True)
    loss = td3_bc_loss(q, policy, torch.zeros(1, 2, 2), 2.5)
    assert loss.item() == pytest.approx(1.25 / 4 - 1.25 * -1.0)  # lambda = 2.5 / 2
    to_q, to_policy = torch.autograd.grad(loss.sum(), (q, policy))
    torch.testing.assert_close(to_q, torch.tensor([[-0.625, -0.625]]))
    torch.testing.assert_close(to_policy, policy.detach() / 2)


def test_corruption_statistics():
    rng = torch.Generator().manual_seed(0)
    q, target = torch.randn(2, 5, 40, generator=rng), torch.randn(2, 40, generator=rng) ** 3
    corrupted = torch.rand(2, 40, generator=rng) < 0.3
    found = corruption_statistics(q, q.amin(1), target, corrupted)
    for kind, rows in (("corrupted", corrupted), ("clean", ~corrupted)):
        for k in range(2):
            kurtosis = scipy.stats.kurtosis(target[k, rows[k]].double().numpy(), fisher=False)
            assert found[f"{kind}/target_kurtosis"][k].item() == pytest.approx(kurtosis, rel=1e-4)
            assert found[f"{kind}/q_std"][k].item() == pytest.approx(q[k, :, rows[k]].std(0).mean().item(), rel=1e-5)
            gap = (q.mean(1) - q.amin(1))[k, rows[k]].mean().item()
            assert found[f"{kind}/q_gap"][k].item() == pytest.approx(gap, rel=1e-5)
    none = corruption_statistics(q, q.amin(1), target, torch.zeros(2, 40, dtype=torch.bool))
    assert none["corrupted/target_kurtosis"].tolist() == [0, 0]


# Options


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (RIQL(huber_delta=0.0), "huber_delta is 0.0"),
        (RIQL(td="mse", sigma=1.0), "td is mse"),
        (RIQL(target_range=(1.0,)), "two numbers"),
        (RIQL(alpha=1.5), "alpha is 1.5"),
        (IQL(tau=1.0), "tau is 1.0"),
        (BC(top_share=0.0), "top_share is 0.0"),
        (TD3BC(policy_delay=0), "policy_delay is 0"),
    ],
)
def test_bad_options(method, message):
    with pytest.raises(ConfigError, match=message):
        method.check()


def test_td3_bc_needs_continuous_actions(table):
    with pytest.raises(ConfigError, match=r"continuous actions.*discrete.*bc, iql, riql"):
        prepared(TD3BC(), table[0])


# Updates


@pytest.mark.parametrize(
    "method",
    [
        BC(**SMALL),
        BC(**SMALL, actor="gaussian", normalize=True),
        TD3BC(**SMALL),
        IQL(**SMALL),
        RIQL(**SMALL),
        RIQL(**SMALL, actor="gaussian", ensemble="mean", alpha=0.1, sigma=3.0, target_range=(-1.0, 1.0)),
    ],
    ids=lambda m: f"{m.name}-{getattr(m, 'actor', '')}",
)
def test_a_seed_is_the_same_alone_and_among_others(method, noise):
    many = parameters(updated(dataclasses.replace(method), noise, 6, seed=3, seeds=3))
    alone = parameters(updated(dataclasses.replace(method), noise, 6, seed=5))
    start = parameters(prepared(dataclasses.replace(method), noise, seed=5))
    for name, p in alone.items():
        torch.testing.assert_close(many[name][2:], p, atol=1e-5, rtol=1e-5, msg=name)
        assert not torch.equal(p, start[name]), name
        assert not torch.allclose(many[name][:1], p), name


def test_riql_without_its_parts_is_iql(noise):
    iql = updated(IQL(**SMALL), noise, 20, seeds=2)
    for options in (REDUCED, REDUCED | {"ensemble": "quantile", "alpha": 0.0}):
        riql = updated(RIQL(**SMALL, **options), noise, 20, seeds=2)
        assert riql.metrics == iql.metrics
        for name, p in parameters(iql).items():
            assert torch.equal(parameters(riql)[name], p), name
    for part, published in {f.name: f.default for f in dataclasses.fields(RIQL) if f.name in REDUCED}.items():
        other = updated(RIQL(**SMALL, **REDUCED | {part: published}), noise, 20, seeds=2)
        assert other.metrics != iql.metrics, part


def plain(module: torch.nn.Module, *at: int) -> list[torch.Tensor]:
    """The weights and biases of one seed (and member), apart from the module."""
    return [p[at].detach().clone().requires_grad_() for p in module.mlp.parameters()]


def forward(parameters: list[torch.Tensor], *x: torch.Tensor) -> torch.Tensor:
    y = torch.cat(x, -1)
    for i in range(0, len(parameters) - 2, 2):
        y = torch.relu(torch.nn.functional.linear(y, *parameters[i : i + 2]))
    return torch.nn.functional.linear(y, *parameters[-2:])


def assert_follows(method, run, networks, targets, update) -> None:
    """After five updates of the second of two seeds, in plain torch, the method's parameters are the same."""
    optimizers = {name: torch.optim.Adam([p for net in nets for p in net]) for name, (_, nets) in networks.items()}
    replay = Replay.of(run.data.scaled(run.policy.normalizer) if method.normalize else run.data, 2, run.streams)
    for step in range(5):
        method.before_update(step, 10)
        batch = replay.sample(32)
        rows = [getattr(batch, name)[1] for name in ("obs", "action", "reward", "next_obs", "terminated")]
        method.update(batch)
        for name, loss, rate in update(step, *rows):
            optimizer = optimizers[name]
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for target, source in targets(step):
                for p, q in zip(target, source, strict=True):
                    p.copy_(0.9 * p + 0.1 * q)
    for name, (module, nets) in networks.items():
        for member, net in enumerate(nets):
            at = (1, member) if len(nets) > 1 else (1,)
            for found, expected in zip(plain(module, *at), net, strict=True):
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "method",
    [
        IQL(**SMALL, actor="deterministic", lr=1e-3, target_rate=0.1, tau=0.8),
        RIQL(**SMALL, lr=1e-3, target_rate=0.1, alpha=0.3, huber_delta=0.4),
        RIQL(**SMALL, lr=1e-3, target_rate=0.1, ensemble="mean", td="mse"),
    ],
    ids=["iql", "riql", "riql-mean-mse"],
)
def test_updates_are_those_of_plain_torch_iql(method, noise):
    run = prepared(method, noise, seeds=2)
    value, actor = [plain(method.value, 1)], [plain(run.policy.actor, 1)]
    critics, target = (
        [plain(module, 1, k) for k in range(method.critics)] for module in (method.critic, method.target)
    )

    def update(step, obs, action, reward, next_obs, terminated):
        with torch.no_grad():
            q = torch.stack([forward(net, obs, action)[:, 0] for net in target])
            if method.name == "iql":
                estimate = q.min(0).values
            else:
                estimate = q.mean(0) if method.ensemble == "mean" else torch.quantile(q, 0.3, dim=0)
            y = reward + 0.99 * (1 - terminated.float()) * forward(value[0], next_obs)[:, 0]
        u = estimate - forward(value[0], obs)[:, 0]
        weight = (3 * u.detach()).exp().clamp(max=100)
        yield "value", (abs(method.tau - (u < 0).float()) * u**2).mean(), 1e-3
        loss = torch.nn.functional.mse_loss
        if getattr(method, "td", "mse") == "huber":
            loss = functools.partial(torch.nn.functional.smooth_l1_loss, beta=0.4)
        yield "critic", sum(loss(forward(net, obs, action)[:, 0], y) for net in critics) / method.critics, 1e-3
        centre, half = (run.policy.actor.high + run.policy.actor.low) / 2, run.policy.actor.high - run.policy.actor.low
        away = (centre + half / 2 * torch.tanh(forward(actor[0], obs)) - action).square().sum(-1)
        yield "actor", (weight * away).mean(), 1e-3 * (1 + np.cos(np.pi * step / 10)) / 2

    networks = {
        "value": (method.value, value),
        "critic": (method.critic, critics),
        "actor": (run.policy.actor, actor),
    }
    assert_follows(method, run, networks, lambda step: zip(target, critics, strict=True), update)
    for k, net in enumerate(target):
        torch.testing.assert_close(plain(method.target, 1, k), net)


def test_updates_are_those_of_plain_torch_td3_bc(noise):
    method = TD3BC(**SMALL, lr=1e-3, target_rate=0.1, target_noise=0.4)
    run = prepared(method, noise, seeds=2)
    actor, target_actor = [plain(method.actor, 1)], [plain(method.target_actor, 1)]
    critics, target = ([plain(module, 1, k) for k in range(2)] for module in (method.critic, method.target_critic))
    low, high = method.actor.low, method.actor.high
    noises = Streams(run.seeds)

    def act(net, obs):
        return (low + high) / 2 + (high - low) / 2 * torch.tanh(forward(net, obs))

    def update(step, obs, action, reward, next_obs, terminated):
        with torch.no_grad():
            noise = (0.4 * noises.normal("target_noise", 32, 2)[1]).clamp(-0.5, 0.5) * (high - low) / 2
            after = torch.minimum(torch.maximum(act(target_actor[0], next_obs) + noise, low), high)
            q = torch.minimum(*(forward(net, next_obs, after)[:, 0] for net in target))
            y = reward + 0.99 * (1 - terminated.float()) * q
        yield "critic", sum(((forward(net, obs, action)[:, 0] - y) ** 2).mean() for net in critics), 1e-3
        if step % 2:
            chosen = act(actor[0], obs)
            q = forward(critics[0], obs, chosen)[:, 0]
            scale = 2.5 / q.abs().mean().detach()
            yield "actor", -scale * q.mean() + torch.nn.functional.mse_loss(chosen, action), 1e-3

    def targets(step):
        return [*zip(target, critics, strict=True), (target_actor[0], actor[0])] if step % 2 else []

    networks = {"critic": (method.critic, critics), "actor": (method.actor, actor)}
    assert_follows(method, run, networks, targets, update)
    torch.testing.assert_close(plain(method.target_actor, 1), target_actor[0])


def test_the_actors_learning_rate_falls_by_a_cosine(noise):
    method = IQL(**SMALL)
    prepared(method, noise)
    rates = []
    for step in (0, 25, 50, 100):
        method.before_update(step, 100)
        rates.append(method.actor_optimizer.lr / method.lr)
    assert rates == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, 0])
    assert method.optimizer.lr == method.lr


def test_targets_are_clamped_only_when_told(noise):
    target = torch.tensor([[-5.0, 0.5, 5.0]])
    assert RIQL().bound(target).tolist() == target.tolist()
    assert RIQL(target_range=(-1.0, 2.0)).bound(target).tolist() == [[-1, 0.5, 2]]
    values = [
        updated(RIQL(**SMALL, target_range=bounds, lr=1e-2, target_rate=0.1), noise, 200).metrics["value/mean"][0]
        for bounds in ((), (3.0, 4.0))
    ]
    assert values[0] < 1 and values[1] > 2


def test_diagnostics_where_data_is_corrupted(noise):
    names = {f"{kind}/{name}" for kind in ("corrupted", "clean") for name in ("q_std", "q_gap", "target_kurtosis")}
    for method in (IQL(**SMALL), RIQL(**SMALL)):
        assert not names & set(updated(dataclasses.replace(method), noise, 2).metrics)
        run = updated(dataclasses.replace(method), noise, 200, corrupt=("reward:0.3",))
        assert names <= set(run.metrics)
        assert torch.equal(run.method.corrupted, torch.from_numpy(run.corrupted["rewards"]))
    # Replaced rewards are 30 times the others: a clean row's targets are of both kinds no more than a corrupted one's.
    spread = updated(RIQL(**SMALL), noise, 50, corrupt=("reward:0.05",)).metrics
    assert spread["corrupted/target_kurtosis"][0] < spread["clean/target_kurtosis"][0] < 5


def test_td3_bc_moves_its_actor_every_second_update(noise):
    method = TD3BC(**SMALL)
    run = prepared(method, noise)
    replay = Replay.of(run.data, 1, run.streams)

    def step(number: int) -> dict[str, torch.Tensor]:
        before = {name: p.clone() for name, p in parameters(run).items()}
        method.before_update(number, 10)
        method.update(replay.sample(32))
        return {name.split(".")[0]: None for name, p in parameters(run).items() if not torch.equal(before[name], p)}

    assert set(step(0)) == {"critic"}
    assert set(step(1)) == {"critic", "actor", "target_critic", "target_actor"}
    batch = replay.sample(8)
    first = method.first_critic(batch.obs, batch.action)[:, 0]
    torch.testing.assert_close(first, method.critic(batch.obs, batch.action)[:, 0])


def test_top_share_learns_from_the_best_episodes_alone(noise):
    run = prepared(BC(**SMALL, top_share=0.25), noise, corrupt=("actions:0.5",))
    data = np.load(noise)
    returns = data["rewards"].reshape(20, 20).sum(1)
    best = np.sort(np.argsort(-returns)[:5])
    assert len(run.data) == 100
    np.testing.assert_array_equal(run.data.observations, data["observations"].reshape(20, 20, 3)[best].reshape(100, 3))
    moved = (run.data.actions != data["actions"].reshape(20, 20, 2)[best].reshape(100, 2)).any(1)
    np.testing.assert_array_equal(run.corrupted["actions"], moved)


def test_bf16_stays_near_fp32(noise):
    for method in (TD3BC, IQL, RIQL):
        full, half = (updated(method(**SMALL), noise, 30, precision=p).metrics for p in ("fp32", "bf16"))
        assert full.keys() == half.keys()
        for name in full:
            assert half[name] == pytest.approx(full[name], rel=0.05, abs=0.02), name
            assert half[name] != full[name], name


@pytest.mark.slow
def test_compiled_updates_give_the_same_numbers(noise):
    plain, compiled = (updated(IQL(**SMALL), noise, 6, seeds=2, compile=c).metrics for c in (False, True))
    assert plain.keys() == compiled.keys()
    for name, values in plain.items():
        assert compiled[name] == pytest.approx(values, rel=1e-4), name


# Fixed points on tables


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Four states and three actions, seen 3 to 8 times; (file, samples)."""
    samples = sample(random_mdp(4, 3, 0.8, seed=1), 8, seed=0)
    keep = np.random.default_rng(0).integers(3, 9, (4, 3, 1)) > np.arange(8)
    outliers = 4.0 * (np.random.default_rng(1).random((4, 3, 8)) < 0.2)
    samples = dataclasses.replace(samples, seen=samples.seen & keep, rewards=samples.rewards + outliers)
    data = as_transitions(samples)
    arrays = {
        "observations": data.observations,
        "actions": data.actions,
        "rewards": data.rewards,
        "next_observations": data.next_observations,
        "terminals": data.terminated,
        "timeouts": data.truncated,
    }
    return write(tmp_path_factory.mktemp("data") / "table.npz", arrays), samples


def settle(method, data: str, updates: int, lr: float) -> ControlRun:
    """Updates on all rows at once, with steps that get smaller."""
    run = prepared(method, data)
    rows = run.data if run.policy.normalizer is None else run.data.scaled(run.policy.normalizer)
    names = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")
    batch = Batch(
        *(torch.as_tensor(np.asarray(getattr(rows, name)))[None] for name in names),
        steps=torch.ones(1, len(rows), dtype=torch.int64),
    )
    optimizers = [part for name, part in run.parts.items() if "optimizer" in name]
    for step in range(updates):
        method.before_update(step, updates)
        for optimizer in optimizers:
            optimizer.lr = lr * 0.01 ** (step / updates)
        method.update(batch)
    return run


@pytest.mark.parametrize(("method", "delta"), [(IQL, np.inf), (RIQL, 0.5)])
def test_values_and_policy_end_in_the_exact_fixed_point(method, delta, table):
    data, samples = table
    options = {"huber_delta": delta} if method is RIQL else {}
    built = method(hidden=(32,), gamma=0.8, target_rate=0.1, normalize=False, **options)
    run = settle(built, data, 1200, 2e-2)
    exact = in_sample_fixed_point(samples, 0.8, delta=delta)
    states = torch.eye(4)[None]
    with torch.no_grad():
        q, values = built.critic(states)[0], built.value(states)[0]
        policy = run.policy.actor(states).log_probs[0].exp()
    for critic in q:
        np.testing.assert_allclose(critic, exact.q, atol=0.02)
    np.testing.assert_allclose(values, exact.values, atol=0.02)
    expected = advantage_weighted(samples.behaviour, exact.q - exact.values[:, None])
    np.testing.assert_allclose(policy, expected, atol=0.02)


def test_the_fixed_points_of_iql_and_riql_differ(table):
    values = [in_sample_fixed_point(table[1], 0.8, delta=delta).values for delta in (np.inf, 0.5)]
    assert np.abs(values[0] - values[1]).max() > 0.1


def test_cloning_a_table_gives_the_behaviour(table):
    data, samples = table
    run = settle(BC(hidden=(64,)), data, 500, 1e-2)
    policy = run.policy.actor(torch.eye(4)[None]).log_probs[0].exp().detach()
    np.testing.assert_allclose(policy, samples.behaviour, atol=0.01)


@pytest.fixture(scope="module")
def bandits(tmp_path_factory):
    """Three states that end at once, 41 actions in each: (file, mean action by state, slope of the reward by state)."""
    state, at = np.divmod(np.arange(3 * 41), 41)
    means, slopes = np.array([-0.1, 0.0, 0.1]), np.array([1.0, -0.5, 0.8])
    actions = (at - 20) / 40 + means[state]
    arrays = {
        "observations": np.eye(3, dtype=np.float32)[state],
        "actions": actions[:, None].astype(np.float32),
        "rewards": (2 + slopes[state] * actions).astype(np.float32),
        "next_observations": np.eye(3, dtype=np.float32)[state],
        "terminals": np.ones(len(state), bool),
        "timeouts": np.zeros(len(state), bool),
    }
    return write(tmp_path_factory.mktemp("data") / "bandits.npz", arrays), means, slopes


@pytest.mark.parametrize("kind", ["deterministic", "gaussian"])
def test_cloning_continuous_actions_gives_their_moments(kind, bandits):
    data, means, _ = bandits
    run = settle(BC(hidden=(32,), actor=kind), data, 600, 2e-2)
    np.testing.assert_allclose(run.policy.act(np.eye(3)[None])[0, :, 0], means, atol=0.005)
    if kind == "gaussian":
        deviation = run.policy.actor(torch.eye(3)[None]).log_std.exp().item()
        assert deviation == pytest.approx(np.std(np.arange(-20, 21) / 40), abs=0.005)


def test_td3_bc_ends_where_value_and_imitation_balance(bandits):
    """pi = mean + lambda slope / 2 in each state, lambda = alpha / mean Q(s, pi(s))."""
    data, means, slopes = bandits
    run = settle(TD3BC(hidden=(32, 32), alpha=0.8), data, 1500, 5e-3)
    pi = means
    for _ in range(50):
        pi = means + 0.8 / (2 + slopes * pi).mean() * slopes / 2
    assert np.abs(pi - means).min() > 0.05
    np.testing.assert_allclose(run.policy.act(np.eye(3)[None])[0, :, 0], pi, atol=0.02)


def test_iql_weighs_continuous_actions_by_their_advantage(bandits):
    """Q is the reward, V its expectile, and the actor the weighted mean of the actions of a state."""
    data, _, _ = bandits
    built = IQL(hidden=(32, 32), target_rate=0.05)
    run = settle(built, data, 1000, 1e-2)
    arrays = np.load(data)
    for state in range(3):
        rows = arrays["observations"][:, state] == 1
        rewards, actions = arrays["rewards"][rows].astype(float), arrays["actions"][rows, 0]
        value = scipy.stats.expectile(rewards, 0.7)
        weights = np.exp(3 * (rewards - value))
        seen = np.eye(3)[None, state : state + 1]
        assert built.value(torch.tensor(seen).float()).item() == pytest.approx(value, abs=0.01)
        assert run.policy.act(seen).item() == pytest.approx(np.average(actions, weights=weights), abs=0.01)


# Runs


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory) -> str:
    """Episodes of a script that leans with the pole, and errs at times."""
    import gymnasium

    rng, env = np.random.default_rng(0), gymnasium.make("CartPole-v1")
    rows = []
    for episode in range(20):
        obs, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            action = int(obs[2] + 0.5 * obs[3] > 0) if rng.random() < 0.8 else int(rng.integers(2))
            after, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, after, terminated, truncated))
            obs, ended = after, terminated or truncated
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    arrays = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return write(tmp_path_factory.mktemp("data") / "cartpole.npz", arrays)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", [IQL, TD3BC])
def test_a_killed_and_resumed_run_is_the_same_bit_for_bit(method, cartpole, noise, tmp_path, monkeypatch):
    options = {
        "data": cartpole if method is IQL else noise,
        "hidden": (32,),
        "seeds": 2,
        "max_updates": 300,
        "log_every": 50,
        "checkpoint_every": 100,
    }
    if method is IQL:
        options |= {"env": "CartPole-v1", "eval_episodes": 5, "lr": 3e-3}
    whole = guerdon.train(method.name, out=str(tmp_path / "whole"), **options)
    update = method.update

    def dies(self, batch):
        if (self.optimizer if method is IQL else self.critic_optimizer).steps == 230:
            raise Killed
        return update(self, batch)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(method, "update", dies)
        guerdon.train(method.name, out=str(tmp_path / "killed"), **options)
    resumed = guerdon.resume(tmp_path / "killed")
    ours, theirs = (load_file(run.path / "policy" / "policy.safetensors") for run in (whole, resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in run.metrics()]
        for run in (whole, resumed)
    ]
    assert [row["step"] for row in rows[0]] == [50, 100, 150, 200, 250, 300]
    assert rows[0] == rows[1]
    if method is IQL:
        assert rows[0][-1]["eval/return"] > 60  # 20 by chance


def test_policies_are_saved_with_their_scaling(noise, tmp_path):
    run = updated(RIQL(**SMALL), noise, 3, seeds=2)
    run.export(tmp_path)
    loaded = ControlPolicy.load(tmp_path)
    obs = np.load(noise)["observations"][:7]
    np.testing.assert_array_equal(loaded.act(np.stack([obs, obs])), run.policy.act(np.stack([obs, obs])))
    assert load_file(tmp_path / "policy.safetensors").keys() == run.policy.actor.state_dict().keys()
    seen = np.load(noise)
    both = np.concatenate([seen["observations"], seen["next_observations"]])
    np.testing.assert_allclose(loaded.normalizer.std, both.std(0) + 1e-3, rtol=1e-5)
