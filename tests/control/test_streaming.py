"""Streaming learners: what each part does, and that the compiled ones and those in torch are the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from guerdon.control.ingredients import ActorCriticIngredients, Ingredients, ValueIngredients
from guerdon.control.spaces import Spec
from guerdon.control.streaming.agents import StreamActor, ValueAgent
from guerdon.control.streaming.learners import KernelLearner, TorchLearner, build_learner
from guerdon.control.streaming.networks import build_network, paper_hidden, sparse_init_
from guerdon.control.streaming.optimizers import AdaptiveObGD, ObGD, TraceAdam
from guerdon.control.streaming.senses import ObservationNormalizer, RewardScaler, Senses
from guerdon.control.streams import Streams
from guerdon.errors import ConfigError
from guerdon.training.control import load_state, save_state

DISCRETE = Spec((12,), False, True, 3, (), ())
CONTINUOUS = Spec((12,), False, False, 2, (-1.0, -2.0), (1.0, 2.0))
ATARI = Spec((4, 84, 84), True, True, 3, (), ())
MINATAR = Spec((4, 10, 10), True, True, 3, (), ())
KINDS = [("td", DISCRETE), ("q", DISCRETE), ("sarsa", DISCRETE), ("ac", DISCRETE), ("ac", CONTINUOUS)]


def ingredients(kind: str, **options) -> Ingredients:
    cls = {"td": Ingredients, "ac": ActorCriticIngredients}.get(kind, ValueIngredients)
    return cls(**{"hidden": (16, 16), **options})


def stream(steps: int, seeds: int = 2, spec: Spec = DISCRETE):
    """Made-up experience in which episodes of some 20 steps end in both ways: first observations, then transitions."""
    rng = np.random.default_rng(0)
    scale = 10 ** rng.uniform(-1, 1, spec.observation)
    obs = (rng.normal(size=(seeds, *spec.observation)) * scale).astype(np.float32)
    yield obs
    for _ in range(steps):
        final = (0.9 * obs + 0.3 * rng.normal(size=obs.shape) * scale).astype(np.float32)
        reward = (obs.reshape(seeds, -1)[:, 0] + rng.normal(size=seeds)).astype(np.float32)
        terminated, truncated = rng.random((2, seeds)) < 0.03
        done = (terminated | truncated).reshape(-1, *[1] * len(spec.observation))
        obs = np.where(done, rng.normal(size=obs.shape) * scale, final).astype(np.float32)
        yield obs, reward, terminated, truncated, final


def drive(learner, steps: int, epsilon: float = 0.3) -> np.ndarray:
    """Every action (steps + 1, S, ...) on the way through `stream`."""
    learner.epsilon = epsilon
    first, *rest = stream(steps, len(learner.tally), learner.spec)
    return np.stack([learner.begin(first), *(learner.step(*transition) for transition in rest)])


# The compiled and the reference


@pytest.mark.parametrize(("kind", "spec"), KINDS)
def test_compiled_learners_equal_the_reference(kind, spec):
    options = ingredients(kind)
    learners = [cls(kind, options, spec, Streams([3, 4]), time_limit=50) for cls in (TorchLearner, KernelLearner)]
    reference, compiled = (drive(learner, 300) for learner in learners)
    np.testing.assert_allclose(compiled, reference, atol=1e-5)
    for name in learners[0].outputs:
        torch.testing.assert_close(learners[1].weights(name), learners[0].weights(name), atol=1e-5, rtol=0)
    for one, other in zip(*(learner.statistics() for learner in learners), strict=True):
        np.testing.assert_allclose(one, other)
    one, other = (learner.take() for learner in learners)
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-3, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "lr": 1e-3},
        {"optimizer": "adam", "lr": 1e-3, "lamda": 0.0},
        {"optimizer": "adaptive-obgd"},
        {"layer_norm": False},
        {"sparsity": 0.0},
        {"normalize_observations": False},
        {"scale_rewards": False},
        {"time_feature": False},
        {"hidden": (24,), "connect_all": True, "sparsity": 0.95},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize("kind", ["q", "ac"])
def test_they_are_the_same_without_each_ingredient(kind, options):
    learners = [
        cls(kind, ingredients(kind, **options), DISCRETE, Streams([1]), time_limit=50)
        for cls in (TorchLearner, KernelLearner)
    ]
    start = learners[0].weights("value").clone()
    reference, compiled = (drive(learner, 60) for learner in learners)
    np.testing.assert_array_equal(compiled, reference)
    for name in learners[0].outputs:
        torch.testing.assert_close(learners[1].weights(name), learners[0].weights(name), atol=1e-5, rtol=0)
    assert (learners[0].weights("value") - start).abs().max() > 1e-4


@pytest.mark.parametrize("cls", [TorchLearner, KernelLearner])
@pytest.mark.parametrize(("kind", "spec"), KINDS)
def test_a_seed_is_the_same_alone(cls, kind, spec):
    def learner(seeds: list[int]):
        return cls(kind, ingredients(kind), spec, Streams(seeds), time_limit=50)

    (together, alone), transitions = (learner([5, 6, 7]), learner([6])), list(stream(30, 3))
    actions = [together.begin(transitions[0])[1:2]], [alone.begin(transitions[0][1:2])]
    for transition in transitions[1:]:
        actions[0].append(together.step(*transition)[1:2])
        actions[1].append(alone.step(*(part[1:2].copy() for part in transition)))
    np.testing.assert_array_equal(*actions)
    assert torch.equal(together.weights("value")[1:2], alone.weights("value"))
    assert not torch.equal(together.weights("value")[0], alone.weights("value")[0])


@pytest.mark.parametrize("cls", [TorchLearner, KernelLearner])
@pytest.mark.parametrize(("kind", "spec"), KINDS)
def test_learning_goes_on_bit_for_bit_from_a_saved_state(cls, kind, spec, tmp_path):
    def fresh():
        streams = Streams([1, 2])
        return streams, cls(kind, ingredients(kind, optimizer="adaptive-obgd"), spec, streams, time_limit=50)

    first, *rest = stream(60)
    (streams, learner), (other_streams, other) = fresh(), fresh()
    learner.begin(first)
    for transition in rest[:30]:
        learner.step(*transition)
    save_state({"streams": streams.state_dict(), "learner": learner.state_dict()}, tmp_path)
    state = load_state(tmp_path)
    other_streams.load_state_dict(state["streams"])
    other.load_state_dict(state["learner"])
    np.testing.assert_array_equal(learner.actions, other.actions)
    for transition in rest[30:]:
        np.testing.assert_array_equal(learner.step(*transition), other.step(*transition))
    for name in learner.outputs:
        assert torch.equal(learner.weights(name), other.weights(name))
    assert learner.take() == other.take()


def test_the_arrays_of_a_network_are_neighbours():
    """Where they lie to each other decides which loops vectorise, and so how they round."""
    for kind, spec in (("q", DISCRETE), ("ac", DISCRETE)):
        for net in KernelLearner(kind, ingredients(kind), spec, Streams([3, 4])).nets.values():
            places = [array.ctypes.data for array in (net.rows, net.tape, net.scratch)]
            assert np.diff(places).tolist() == [net.rows.nbytes, net.tape.nbytes]
            assert len(net.scratch) == net.tape.shape[1] + 2 * net.sizes.max()


def test_without_numba_the_reference_learns(monkeypatch):
    chosen = ("q", ingredients("q"), DISCRETE, Streams([0]))
    assert isinstance(build_learner(*chosen), KernelLearner)
    monkeypatch.setattr("guerdon.control.streaming.learners.find_spec", lambda name: None)
    assert isinstance(build_learner(*chosen), TorchLearner)


# Networks


def test_layers_are_normalised_before_the_activation_and_without_parameters():
    network = build_network((5,), 3, (8, 6), layer_norm=True)
    assert [type(layer) for layer in network] == [nn.Linear, nn.LayerNorm, nn.LeakyReLU] * 2 + [nn.Linear]
    assert len(list(network.parameters())) == 6
    assert [layer.negative_slope for layer in network if isinstance(layer, nn.LeakyReLU)] == [0.01, 0.01]
    assert not any(isinstance(layer, nn.LayerNorm) for layer in build_network((5,), 3, (8, 6), layer_norm=False))


@pytest.mark.parametrize(
    ("spec", "kernels", "normed"),
    [
        (ATARI, [(32, 8, 5), (64, 4, 3), (64, 3, 2)], [(32, 16, 16), (64, 5, 5), (64, 2, 2), (256,)]),
        (MINATAR, [(16, 3, 1)], [(16, 8, 8), (128,)]),
    ],
)
def test_images_are_normalised_over_channels_and_places_together(spec, kernels, normed):
    network = build_network(spec.observation, 3, paper_hidden("q", spec), layer_norm=True)
    found = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in found] == kernels
    assert [layer.normalized_shape for layer in network if isinstance(layer, nn.LayerNorm)] == normed
    assert network(torch.zeros(1, *spec.observation)).shape == (1, 3)


def test_sparse_convolutions_count_the_window_as_inputs():
    weight = sparse_init_(torch.empty(16, 4, 3, 3), 0.9, np.random.default_rng(0))
    zeros = (weight.flatten(1) == 0).sum(1)
    assert (zeros == 33).all()  # ceil(0.9 * 36)
    assert weight.abs().max() <= 1 / 6 < weight.abs().max() * 1.1
    patterns = {tuple(row.tolist()) for row in weight.flatten(1) == 0}
    assert len(patterns) > 10  # chosen for each unit


def test_units_without_a_weight_are_counted_and_can_be_avoided():
    narrow = Spec((4,), False, True, 2, (), ())
    for connect_all, unconnected in ((False, 32), (True, 0)):
        learner = KernelLearner("q", ValueIngredients(connect_all=connect_all), narrow, Streams([0]))
        assert learner.unconnected == unconnected
    first = next(learner.networks(0)["value"].children())
    assert ((first.weight != 0).sum(1) == 1).all()


# Optimisers


def test_one_bound_holds_for_all_parameters_of_a_network():
    values = torch.tensor([1.0, -2.0, 0.5, 3.0])
    whole, parts = nn.Parameter(torch.zeros(4)), [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    whole.grad, parts[0].grad, parts[1].grad = values, values[:1], values[1:]
    for params in ([whole], parts):
        optimizer = ObGD(params)
        optimizer.step(3.0)
        assert optimizer.bound == pytest.approx(2 * 3 * 6.5)
    torch.testing.assert_close(whole.data, torch.cat([p.data for p in parts]))


def test_traces_gather_gradients_of_the_output_and_are_reset_after_the_step():
    p = nn.Parameter(torch.zeros(2))
    optimizer = ObGD([p], lr=0.01, gamma=0.5, lamda=0.5, kappa=0.0)
    p.grad = torch.tensor([1.0, 0.0])
    optimizer.step(2.0)
    p.grad = torch.tensor([0.0, 1.0])
    optimizer.step(1.0, reset=True)  # learns from its own error still, with what the trace held
    torch.testing.assert_close(p.data, torch.tensor([0.02 + 0.01 * 0.25, 0.01]))
    optimizer.step(1.0)
    torch.testing.assert_close(optimizer.state[p]["trace"], torch.tensor([0.0, 1.0]))


def test_adam_without_a_trace_is_torchs():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    trace, adam = TraceAdam([ours], lr=0.01, gamma=0.99, lamda=0.0), torch.optim.Adam([theirs], lr=0.01)
    for _ in range(20):
        gradient, delta = torch.randn(5), float(torch.randn(()))
        ours.grad, theirs.grad = gradient, -delta * gradient
        trace.step(delta)
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_adaptive_steps_are_bounded_in_their_own_metric():
    p = nn.Parameter(torch.zeros(3))
    optimizer = AdaptiveObGD([p], lr=1.0, kappa=2.0)
    p.grad = torch.tensor([1.0, -2.0, 0.5])
    optimizer.step(3.0)  # v = (3 e)^2, so that e / sqrt(v) is +-1/3
    assert optimizer.bound == pytest.approx(2 * 3 * 1.0)
    torch.testing.assert_close(p.data, torch.tensor([1.0, -1.0, 1.0]) / 6)


# Agents


def linear_agent(kind: str, **options) -> ValueAgent:
    network = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(network.weight)
    return ValueAgent(kind, Ingredients(optimizer="sgd", lr=0.1, **options), network)


X, Y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


@pytest.mark.parametrize("ends", [{"terminated": True, "truncated": False}, {"terminated": False, "truncated": True}])
def test_both_ends_stop_bootstrap_and_trace_but_not_the_last_reward(ends):
    agent = linear_agent("q")
    agent.network.weight.data[0, 1] = 5.0  # Q(y, 0), which must not be bootstrapped from
    agent.update(X, 0, 1.0, Y, **ends)
    assert float(agent.network.weight[0, 0].detach()) == pytest.approx(0.1)
    assert not agent.optimizer.state[agent.network.weight]["trace"].any()


def test_q_forgets_its_trace_after_exploring_and_sarsa_does_not():
    for kind, left in (("q", False), ("sarsa", True)):
        agent = linear_agent(kind)
        agent.update(X, 0, 1.0, Y, False, False, explored=True)
        assert bool(agent.optimizer.state[agent.network.weight]["trace"].any()) == left


def test_q_bootstraps_from_the_best_action_and_sarsa_from_the_next():
    for kind, target in (("q", 0.99 * 5), ("sarsa", 0.99 * 2)):
        agent = linear_agent(kind)
        agent.network.weight.data[:, 1] = torch.tensor([5.0, 2.0])
        told = agent.update(X, 0, 0.0, Y, False, False, next_action=1)
        assert told["td/abs"] == pytest.approx(target)


def test_a_random_draw_of_the_greedy_action_is_no_exploration():
    agent = linear_agent("q")
    agent.network.weight.data[:, 0] = torch.tensor([0.0, 1.0])
    assert agent.act(X, torch.tensor([0.1, 0.9]), epsilon=0.5) == (1, False)
    assert agent.act(X, torch.tensor([0.1, 0.1]), epsilon=0.5) == (0, True)
    assert agent.act(X, torch.tensor([0.7, 0.1]), epsilon=0.5) == (1, False)


def test_epsilon_falls_linearly_over_its_share_of_the_run():
    options = ValueIngredients()
    assert [options.epsilon(done) for done in (0.0, 0.025, 0.05, 1.0)] == pytest.approx([1.0, 0.505, 0.01, 0.01])


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_sampled_actions_follow_the_policy(spec):
    learner = TorchLearner("ac", ActorCriticIngredients(sparsity=0.0), spec, Streams([0]))
    agent, x = learner.agents[0], torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 3
    generator = torch.Generator().manual_seed(1)
    draw = torch.rand if spec.discrete else torch.randn
    actions = torch.stack([agent.act(x, draw(2, generator=generator)) for _ in range(4000)])
    policy = agent.distribution(x)
    if spec.discrete:
        shares = torch.bincount(actions, minlength=3) / 4000
        torch.testing.assert_close(shares, policy.probs.detach(), atol=0.03, rtol=0)
    else:
        torch.testing.assert_close(actions.mean(0), policy.mean.detach(), atol=0.05, rtol=0)
        torch.testing.assert_close(actions.std(0), policy.stddev.detach(), atol=0.05, rtol=0)


# Observations and rewards


def test_the_reward_scale_forgets_at_an_end_but_not_its_last_reward():
    scaler = RewardScaler(0.5)
    sums = []
    for reward, done in ((1.0, False), (2.0, True), (4.0, False), (1.0, False)):
        scaler(reward, done)
        sums.append(scaler.u)
    assert sums == [1.0, 2.0, 5.0, 3.5]
    assert scaler.variance == pytest.approx(np.var(sums, ddof=1))


def test_statistics_see_first_and_last_observations_alike():
    for cls in (TorchLearner, KernelLearner):
        learner = cls("td", Ingredients(hidden=(4,)), DISCRETE, Streams([0]))
        first, *rest = stream(40, 1)
        learner.begin(first)
        seen = [first[0]]
        for obs, reward, terminated, truncated, final in rest:
            learner.step(obs, reward, terminated, truncated, final)
            seen += [final[0]] + ([obs[0]] if terminated[0] or truncated[0] else [])
        assert len(seen) > 41
        mean, variance = learner.statistics()
        np.testing.assert_allclose(mean[0], np.mean(seen, 0), rtol=1e-5)
        np.testing.assert_allclose(variance[0], np.var(seen, 0, ddof=1), rtol=1e-5)


def test_time_starts_over_with_every_episode():
    senses = Senses(Ingredients(normalize_observations=False), (1,), tick=0.1)
    times = [float(senses.observe(np.zeros(1), begins)[0, -1]) for begins in (True, False, False, False, True, False)]
    assert times == pytest.approx([-0.5, -0.5, -0.4, -0.3, -0.5, -0.5])
    assert Senses(Ingredients(), (1,)).observe(np.zeros(1), True).shape == (1, 1)


def test_frames_are_normalised_when_they_come_and_then_stacked():
    senses, normalizer = Senses(Ingredients(), (3, 2, 2), frames=3), ObservationNormalizer((1, 2, 2))
    frames = np.random.default_rng(0).integers(0, 255, (6, 1, 2, 2)).astype(np.uint8)
    normal = [normalizer(frame) for frame in frames]
    first = senses.observe(np.concatenate([frames[0]] * 3), True)
    np.testing.assert_allclose(first[0], np.concatenate([normal[0]] * 3))
    for t in range(1, 4):
        seen = senses.observe(np.concatenate(frames[[max(t - 2, 0), max(t - 1, 0), t]]), False)
    np.testing.assert_allclose(seen[0], np.concatenate(normal[1:4]), rtol=1e-6)
    again = senses.observe(np.concatenate([frames[4]] * 3), True)  # nothing of the episode before is left
    np.testing.assert_allclose(again[0], np.concatenate([normal[4]] * 3), rtol=1e-6)


# What is left of it


@pytest.mark.parametrize(("kind", "spec"), [case for case in KINDS if case[0] != "td"])
def test_the_policy_acts_as_the_learner_would(kind, spec):
    learner = TorchLearner(kind, ingredients(kind), spec, Streams([0, 1]), time_limit=50)
    drive(learner, 60)
    actor, scaling = learner.policy()
    obs = np.random.default_rng(1).normal(size=(2, 3, 12)).astype(np.float32)
    scaled = torch.from_numpy((obs - scaling.mean[:, None]) / scaling.std[:, None])
    actions = actor.act(scaled)
    for s, agent in enumerate(learner.agents):
        network = agent.policy if kind == "ac" else agent.network
        for b in range(3):
            out = network(torch.cat([scaled[s, b], torch.zeros(1)])[None])[0].detach()
            if spec.discrete:
                assert int(actions[s, b]) == int(out.argmax())
            else:
                low, high = torch.tensor(spec.low), torch.tensor(spec.high)
                torch.testing.assert_close(actions[s, b], out[:2].clamp(low, high))
    copy = StreamActor(**{k: Spec(**v) if k == "spec" else v for k, v in actor.config.items() if k != "actor"})
    copy.load_state_dict(actor.state_dict())
    assert torch.equal(copy.act(scaled), actions)


def test_images_learn():
    learner = build_learner("ac", ActorCriticIngredients(), MINATAR, Streams([0]))
    assert isinstance(learner, TorchLearner)
    start = learner.weights("policy").clone()
    drive(learner, 5)
    actor, scaling = learner.policy()
    assert not torch.equal(actor.weights, start)
    assert scaling.mean.shape == (1, 4, 10, 10)
    assert actor.act(torch.zeros(1, 2, 4, 10, 10)).shape == (1, 2)


# Mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lamda": 1.5}, "lamda is 1.5"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"hidden": (32, 0)}, "every layer must be at least 1 wide"),
        ({"optimizer": "adam"}, "lr=1 is a step size for ObGD"),
        ({"optimizer": "sgd"}, "give a smaller lr"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Ingredients(**options).check()
    Ingredients().check()
