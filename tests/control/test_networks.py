from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn

from guerdon.control import networks
from guerdon.control.networks import (
    MLP,
    Categorical,
    CategoricalActor,
    ConvEncoder,
    DeterministicActor,
    DiscreteQ,
    Gaussian,
    GaussianActor,
    GreedyQ,
    Linear,
    QEnsemble,
    RecurrentEncoder,
    Value,
    build_actor,
    ema_,
    initialise,
)
from guerdon.control.optim import Adam
from guerdon.control.spaces import Spec
from guerdon.control.streams import Streams
from guerdon.errors import ConfigError

BODY = Spec((7,), False, False, 3, (-1.0, -2.0, 0.0), (1.0, 2.0, 4.0))
CHOICES = Spec((7,), False, True, 4, (), ())
PIXELS = Spec((4, 40, 44), True, True, 4, (), ())
PLANES = Spec((3, 10, 10), True, False, 2, (-1.0, -1.0), (1.0, 1.0))
SEEDS = [5, 8, 13]


def started(module: nn.Module, seeds=SEEDS, **how) -> nn.Module:
    initialise(module, seeds, **how)
    return module


def observations(spec: Spec, seeds: int = 3, batch: int = 6, salt: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(salt)
    if spec.image:
        return torch.randint(
            0, 256 if spec is PIXELS else 2, (seeds, batch, *spec.observation), generator=generator
        ).byte()
    return torch.randn(seeds, batch, *spec.observation, generator=generator)


# Layers


def reference(mlp: MLP, x: torch.Tensor, activation) -> torch.Tensor:
    """The MLP with `nn.functional.linear`, network by network, in plain autograd."""
    layers = [*mlp.layers, *([mlp.head] if mlp.head else [])]
    rows = []
    for k in range(x.shape[0]):
        members = []
        for m in range(mlp.members or 1):
            h = x[k]
            for i, layer in enumerate(layers):
                at = (k,) if mlp.members is None else (k, m)
                h = F.linear(h, layer.weight[at], layer.bias[at])
                if i < len(mlp.layers):
                    if mlp.norms:
                        norm = mlp.norms[i]
                        h = F.layer_norm(h, h.shape[-1:], norm.weight[at][0], norm.bias[at][0])
                    h = activation(h)
            members.append(h)
        rows.append(torch.stack(members) if mlp.members else members[0])
    return torch.stack(rows)


ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "elu": F.elu, "leaky_relu": F.leaky_relu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_mlp_values_and_gradients(activation, members, outputs, layer_norm):
    mlp = started(MLP(3, 7, (16, 9), outputs, members, activation=activation, layer_norm=layer_norm))
    x = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y, expected = mlp(x), reference(mlp, x, ACTIVATIONS[activation])
    assert y.shape == ((3, 6) if members is None else (3, members, 6)) + ((outputs or 9),)
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    inputs = [x, *mlp.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((y * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_wide_layers_take_another_road_to_the_same_numbers():
    mlp = started(MLP(2, 17, (256, 256), 2, members=2), SEEDS[:2])
    x = torch.randn(2, 64, 17, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y, expected = mlp(x), reference(mlp, x, F.relu)
    assert networks.layers._ONEDNN_FROM <= 64 * 256 * 256 or not torch.backends.mkldnn.is_available()
    torch.testing.assert_close(y, expected)
    inputs = [x, *mlp.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("members", [None, 2])
def test_bf16_is_as_near_as_autocast_and_its_gradients_are_fp32(members):
    plain = started(MLP(2, 17, (128, 128), 1, members), SEEDS[:2])
    quick = MLP(2, 17, (128, 128), 1, members, precision="bf16")
    quick.load_state_dict(plain.state_dict())
    x = torch.randn(2, 64, 17, generator=torch.Generator().manual_seed(1))
    exact, y = plain(x), quick(x)
    with torch.autocast("cpu", torch.bfloat16):
        peer = reference(plain, x, F.relu)
    assert y.dtype == torch.float32
    assert 0 < (y - exact).norm() < (peer - exact).norm()  # whose head is bf16 too
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((y * weights).sum(), list(quick.parameters()))
    right, other = (torch.autograd.grad((out * weights).sum(), list(plain.parameters())) for out in (exact, peer))
    for mine, theirs, true in zip(found, other, right, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() < 2 * (theirs - true).norm() + 1e-6
        assert (mine - true).norm() < 0.07 * true.norm()  # a few inputs of ReLU change their sign


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_of_a_gradient(precision):
    mlp = started(MLP(2, 5, (16, 16), 1, members=2, activation="tanh", precision=precision), SEEDS[:2])
    x = torch.randn(2, 18, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def penalty(y: torch.Tensor) -> list[torch.Tensor]:
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return list(
            torch.autograd.grad(slope.square().sum(), [mlp.layers[0].weight, mlp.layers[1].bias, mlp.head.weight])
        )

    for mine, theirs in zip(penalty(mlp(x)), penalty(reference(mlp, x, torch.tanh)), strict=True):
        assert theirs.abs().max() > 1e-4
        assert (mine - theirs).norm() < (1e-4 if precision == "fp32" else 0.05) * theirs.norm()


def test_a_large_value_keeps_its_digits_in_bf16():
    value = started(Value(1, BODY, (64, 64), precision="bf16"), [0])
    with torch.no_grad():
        value.mlp.head.bias.fill_(1000.0)
    spread = value(observations(BODY, 1, 256)).std()
    assert 0.001 < spread < 1.0  # in bf16 every value would be a multiple of 4


def test_a_few_rows_are_multiplied_in_fp32():
    plain = started(Value(1, BODY, (64, 64)), [0])
    quick = Value(1, BODY, (64, 64), precision="bf16")
    quick.load_state_dict(plain.state_dict())
    assert torch.equal(quick(observations(BODY, 1, 15)), plain(observations(BODY, 1, 15)))
    assert not torch.equal(quick(observations(BODY, 1, 16)), plain(observations(BODY, 1, 16)))


def test_linear_is_stacked_nn_linear():
    layer, single = started(Linear(2, 4, 3), [0, 1]), nn.Linear(4, 3)
    single.load_state_dict({"weight": layer.weight[1], "bias": layer.bias[1]})
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(x)[1], single(x[1]))


def test_members_may_see_different_inputs():
    layer = started(Linear(2, 4, 3, members=2), [0, 1])
    x = torch.randn(2, 2, 5, 4)
    torch.testing.assert_close(layer(x)[:, 1], layer(x[:, 1])[:, 1])


def test_gru_is_torchs():
    encoder = started(RecurrentEncoder(2, 5, 8), [0, 1])
    x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    out, last = encoder(x)
    for k in range(2):
        peer = nn.GRU(5, 8, batch_first=True)
        peer.load_state_dict(
            {
                "weight_ih_l0": encoder.inner.weight[k],
                "weight_hh_l0": encoder.recurrent.weight[k],
                "bias_ih_l0": encoder.inner.bias[k],
                "bias_hh_l0": encoder.recurrent.bias[k],
            }
        )
        expected, state = peer(x[k])
        torch.testing.assert_close(out[k], expected)
        torch.testing.assert_close(last[k], state[0])


def test_gru_in_steps_and_over_episode_starts():
    encoder = started(RecurrentEncoder(1, 5, 8), [0])
    x = torch.randn(1, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    first = torch.zeros(1, 2, 6, dtype=torch.bool)
    first[0, 1, 4] = True
    whole, last = encoder(x, first=first)
    state = None
    for t in range(6):
        out, state = encoder(x[:, :, t : t + 1], state, first[:, :, t : t + 1])
        torch.testing.assert_close(out[:, :, 0], whole[:, :, t])
    torch.testing.assert_close(last, state)
    fresh, _ = encoder(x[:, 1:, 4:])
    torch.testing.assert_close(whole[:, 1:, 4:], fresh)
    assert (whole[:, 1, 4] - encoder(x)[0][:, 1, 4]).abs().max() > 1e-3


def test_convolutions_are_conv2d_and_large_images_are_scaled():
    encoder = started(ConvEncoder(3, PIXELS.observation))
    assert encoder.features == 512
    images = observations(PIXELS)
    out = encoder(images)
    h = images[1].float() / 255
    for weight, bias, stride in zip(encoder.weights, encoder.biases, (4, 2, 1), strict=True):
        h = F.conv2d(h, weight[1], bias[1], stride).relu()
    layer = encoder.mlp.layers[0]
    torch.testing.assert_close(
        out[1], F.linear(h.flatten(1), layer.weight[1], layer.bias[1]).relu(), rtol=1e-4, atol=1e-5
    )


def test_small_images_are_taken_as_they_are():
    encoder = started(ConvEncoder(2, PLANES.observation), [0, 1])
    images = observations(PLANES, 2)
    assert encoder(images).shape == (2, 6, 128)
    torch.testing.assert_close(encoder(images), encoder(images.float()))
    with pytest.raises(ConfigError, match=r"2x2 is too small for convolutions of 3x3"):
        ConvEncoder(1, (3, 2, 2))


# The seed axis

NETWORKS = {
    "value": lambda s, p: Value(s, BODY, (24, 16), precision=p),
    "value-norm": lambda s, p: Value(s, BODY, (24, 16), layer_norm=True, activation="elu", precision=p),
    "q": lambda s, p: QEnsemble(s, BODY, (24, 16), 3, precision=p),
    "q-wide": lambda s, p: QEnsemble(s, BODY, (256, 256), 2, precision=p),
    "q-images": lambda s, p: QEnsemble(s, PLANES, (24,), 2, precision=p),
    "discrete-q": lambda s, p: DiscreteQ(s, CHOICES, (24, 16), dueling=True, precision=p),
    "discrete-q-images": lambda s, p: DiscreteQ(s, PIXELS, (24,), members=2, precision=p),
    "recurrent": lambda s, p: RecurrentEncoder(s, 7, 12, precision=p),
}
ACTORS = {
    "deterministic": lambda s, p="fp32": DeterministicActor(s, BODY, (24, 16), precision=p),
    "gaussian": lambda s, p="fp32": GaussianActor(s, BODY, (24, 16), precision=p),
    "gaussian-free": lambda s, p="fp32": GaussianActor(
        s, BODY, (24, 16), squash=False, state_dependent=False, activation="tanh", precision=p
    ),
    "gaussian-images": lambda s, p="fp32": GaussianActor(s, PLANES, (24,), precision=p),
    "categorical": lambda s, p="fp32": CategoricalActor(s, CHOICES, (24, 16), layer_norm=True, precision=p),
    "categorical-images": lambda s, p="fp32": CategoricalActor(s, PIXELS, (), precision=p),
    "greedy-q": lambda s, p="fp32": GreedyQ(s, CHOICES, (24, 16), members=3, dueling=True, precision=p),
}


def out_of(module: nn.Module, salt: int, seeds: slice) -> torch.Tensor:
    """(S,): a loss from a batch in which every seed has its own part."""
    batch = 64 if isinstance(module, QEnsemble) else 18
    if isinstance(module, RecurrentEncoder):
        return module(observations(BODY, 3, 12, salt)[seeds].unflatten(1, (3, 4)))[0].square().flatten(1).mean(1)
    obs = observations(module.spec, 3, batch, salt)[seeds]
    if isinstance(module, QEnsemble):
        y = module(obs, torch.tanh(observations(BODY, 3, batch, salt + 99)[seeds, ..., : module.spec.actions]))
    elif isinstance(module, GaussianActor):
        y = module(obs).log_prob(torch.full((obs.shape[0], batch, module.spec.actions), 0.3))
    else:
        y = module(obs).logits if isinstance(module, CategoricalActor) else module(obs)
    return (y - 1).square().flatten(1).mean(1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*NETWORKS, *ACTORS])
def test_a_seed_trains_the_same_alone_and_beside_others(name, precision):
    make = (NETWORKS | ACTORS)[name]
    many, alone = started(make(3, precision), name="x"), started(make(1, precision), SEEDS[1:2], name="x")
    adams = [Adam(module.parameters(), lr=1e-3, max_grad_norm=0.05) for module in (many, alone)]
    clipped = 0
    for step in range(4):
        losses = [out_of(many, step, slice(None)), out_of(alone, step, slice(1, 2))]
        for adam, loss in zip(adams, losses, strict=True):
            adam.minimise(loss)
        clipped += bool(adams[1].gradient_norms() > 0.049)
    assert clipped  # so that the norm of one seed alone decides
    moved = False
    # Adam turns the rounding of a tiny gradient into a whole step of lr; bf16 rounds coarsely
    tolerance = 2e-5 if precision == "fp32" else 2e-3
    for p, q in zip(many.parameters(), alone.parameters(), strict=True):
        assert (p[1] - q[0]).abs().max() < tolerance and (p[1] - q[0]).abs().mean() < tolerance / 10
        moved |= bool((p[1] - p[0]).abs().max() > 0.01)
    assert moved  # the seeds differ


@pytest.mark.parametrize("name", ACTORS)
def test_a_seed_acts_the_same_alone_and_beside_others(name):
    many, alone = started(ACTORS[name](3), name="x"), started(ACTORS[name](1), SEEDS[1:2], name="x")
    if name == "greedy-q":
        many.epsilon, alone.epsilon = torch.tensor([0.1, 0.5, 0.9]), 0.5
    streams = Streams(SEEDS), Streams(SEEDS[1:2])
    varied = False
    for salt in range(4):
        obs = observations(many.spec, 3, 6, salt)
        greedy, drawn = many.act(obs), many.act(obs, streams[0])
        torch.testing.assert_close(greedy[1:2], alone.act(obs[1:2]))
        torch.testing.assert_close(drawn[1:2], alone.act(obs[1:2], streams[1]))
        varied |= not torch.equal(greedy, drawn)
    assert varied == (name != "deterministic")


@pytest.mark.parametrize("name", ACTORS)
def test_actions_are_of_their_kind_and_within_bounds(name):
    actor = started(ACTORS[name](3))
    for p in actor.mlp.head.parameters():
        p.data *= 30.0
    spec, streams = actor.spec, Streams(SEEDS)
    for given in (None, streams):
        action = actor.act(observations(spec), given)
        if spec.discrete:
            assert action.shape == (3, 6) and action.dtype == torch.int64
            assert action.min() >= 0 and action.max() < spec.actions
        else:
            assert action.shape == (3, 6, spec.actions)
            assert (action >= torch.tensor(spec.low) - 1e-5).all() and (action <= torch.tensor(spec.high) + 1e-5).all()


@pytest.mark.parametrize("name", ACTORS)
def test_config_rebuilds_an_actor(name):
    actor = started(ACTORS[name](3, "bf16"))
    again = build_actor(json.loads(json.dumps(actor.config)))
    assert type(again) is type(actor) and again.config == actor.config
    again.load_state_dict(actor.state_dict())
    obs = observations(actor.spec)
    assert torch.equal(again.act(obs), actor.act(obs))


def test_errors_say_what_to_do():
    with pytest.raises(ConfigError, match=r"'gausian'. Did you mean 'gaussian'"):
        build_actor({**ACTORS["gaussian"](1).config, "actor": "gausian"})
    with pytest.raises(ConfigError, match="these are discrete"):
        DeterministicActor(1, CHOICES)
    with pytest.raises(ConfigError, match="these have none"):
        DeterministicActor(1, Spec((3,), False, False, 1, (-math.inf,), (math.inf,)))
    with pytest.raises(ConfigError, match=r"'rellu'. Did you mean 'relu'"):
        Value(1, BODY, activation="rellu")
    with pytest.raises(ConfigError, match=r"'ortogonal'. Did you mean 'orthogonal'"):
        initialise(Value(1, BODY), [0], "ortogonal")


def test_forgotten_initialisation_shows_at_once():
    assert Value(1, BODY)(observations(BODY, 1)).isnan().all()


# Distributions


def test_gaussian_is_torchs_normal():
    mean, log_std = torch.randn(2, 5, 3), torch.randn(2, 1, 3)
    mine, theirs = Gaussian(mean, log_std), D.Independent(D.Normal(mean, log_std.exp()), 1)
    noise = torch.randn(2, 5, 3)
    action, log_prob = mine.sample(noise)
    torch.testing.assert_close(action, mean + log_std.exp() * noise)
    torch.testing.assert_close(log_prob, theirs.log_prob(action))
    torch.testing.assert_close(mine.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(mine.entropy(), theirs.entropy())


def test_squashed_gaussian_is_torchs_transformed_normal():
    mean, log_std = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double() - 1
    centre, half = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 0.5, 3.0]).double()
    mine = Gaussian(mean, log_std, centre, half)
    theirs = D.Independent(
        D.TransformedDistribution(
            D.Normal(mean, log_std.exp()),
            [D.TanhTransform(cache_size=1), D.AffineTransform(centre, half, cache_size=1)],
        ),
        1,
    )
    action, log_prob = mine.sample(torch.randn(2, 5, 3).double())
    assert (action > centre - half).all() and (action < centre + half).all()
    torch.testing.assert_close(log_prob, theirs.log_prob(action))
    torch.testing.assert_close(mine.log_prob(action), theirs.log_prob(action), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.mode, centre + half * torch.tanh(mean))


def test_squashed_gaussian_far_out_stays_finite_and_right():
    free = torch.tensor([[[-30.0, 20.0, 8.0]]])
    mine = Gaussian(free.clone().requires_grad_(), torch.zeros(1, 1, 3), torch.zeros(3), torch.ones(3))
    _, log_prob = mine.sample(torch.zeros(1, 1, 3))
    # log(1 - tanh(u)^2) tends to log 4 - 2|u|
    expected = -1.5 * math.log(2 * math.pi) - (3 * math.log(4) - 2 * (30 + 20 + 8))
    torch.testing.assert_close(log_prob, torch.tensor([[expected]]), rtol=1e-5, atol=1e-4)
    assert torch.autograd.grad(log_prob.sum(), mine.mean)[0].isfinite().all()
    edge = mine.log_prob(torch.ones(1, 1, 3))
    assert edge.isfinite().all()


def test_categorical_is_torchs_and_gumbel_draws_its_shares():
    logits = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0))
    mine, theirs = Categorical(logits), D.Categorical(logits=logits)
    torch.testing.assert_close(mine.entropy(), theirs.entropy())
    wide = Categorical(logits.expand(1, 40_000, 4))
    action, log_prob = wide.sample(Streams([0]).uniform("act", 40_000, 4))
    torch.testing.assert_close(log_prob, D.Categorical(logits=wide.logits).log_prob(action))
    shares = torch.bincount(action[0], minlength=4) / 40_000
    assert (shares - logits.softmax(-1).flatten()).abs().max() < 0.01
    assert wide.sample(torch.zeros(1, 40_000, 4))[0].max() < 4  # uniform noise may be 0


def test_epsilon_greedy_draws_its_share():
    actor = started(GreedyQ(2, CHOICES, (8,)), SEEDS[:2])
    actor.epsilon = torch.tensor([0.2, 1.0])
    obs = observations(CHOICES, 2, 1).expand(2, 20_000, 7)
    other = (actor.act(obs, Streams(SEEDS[:2])) != actor.act(obs)).float().mean(1)
    torch.testing.assert_close(other, torch.tensor([0.15, 0.75]), atol=0.02, rtol=0)  # 3 of 4 draws are not the best


def test_dueling_advantages_are_centred():
    q = started(DiscreteQ(1, CHOICES, (8,), dueling=True), [0])
    obs = observations(CHOICES, 1)
    torch.testing.assert_close(q(obs).mean(-1), super(DiscreteQ, q).outputs(obs)[..., 0])


# Parameters


def test_initialisation_belongs_to_seed_and_name():
    many = started(QEnsemble(3, BODY, (16,), 2))
    alone, other = started(QEnsemble(1, BODY, (16,), 2), SEEDS[2:]), started(QEnsemble(3, BODY, (16,), 2), name="other")
    for p, q, r in zip(many.parameters(), alone.parameters(), other.parameters(), strict=True):
        assert torch.equal(p[2:], q)
        assert not torch.equal(p, r)
        assert not torch.equal(p[0], p[1]) and not torch.equal(p[:, 0], p[:, 1])


def test_torch_initialisation_has_torchs_range():
    q = started(QEnsemble(3, BODY, (400, 100), 2))
    for layer, inputs in zip([*q.mlp.layers, q.mlp.head], (10, 400, 100), strict=True):
        bound = inputs**-0.5
        assert 0.97 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound
    encoder = started(ConvEncoder(1, PIXELS.observation), [0])
    assert 0.97 / 16 < encoder.weights[0].abs().max() <= 1 / 16  # 4 channels of 8x8
    gru = started(RecurrentEncoder(1, 100, 25), [0])
    assert 0.97 / 5 < gru.inner.weight.abs().max() <= 1 / 5  # by the size of the state, as torch has it


def test_orthogonal_initialisation():
    actor = started(CategoricalActor(2, PIXELS, (64,)), SEEDS[:2], how="orthogonal", head_gain=0.01)
    for weight in (actor.mlp.layers[0].weight, actor.encoder.mlp.layers[0].weight, actor.encoder.weights[0]):
        rows = weight[1].flatten(1)
        gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
        torch.testing.assert_close(gram, 2 * torch.eye(len(gram)), atol=1e-4, rtol=0)
    head = actor.mlp.head.weight[0]
    torch.testing.assert_close(head @ head.T, 1e-4 * torch.eye(4), atol=1e-8, rtol=0)
    assert all(not p.any() for name, p in actor.named_parameters() if "bias" in name)
    members = started(QEnsemble(1, BODY, (8,), 2), [0], how="orthogonal").mlp.layers[0].weight[0]
    torch.testing.assert_close(members @ members.mT, 2 * torch.eye(8).expand(2, 8, 8), atol=1e-5, rtol=0)


def test_edac_initialisation():
    q = started(QEnsemble(2, BODY, (64, 64), 5), SEEDS[:2], how="edac")
    assert all((layer.bias == 0.1).all() for layer in q.mlp.layers)
    assert 0.0029 < q.mlp.head.weight.abs().max() <= 0.003 and q.mlp.head.bias.abs().max() <= 0.003
    assert 0.97 / 8 < q.mlp.layers[1].weight.abs().max() <= 1 / 8


def test_ema():
    source, target = started(Value(2, BODY, (8,)), SEEDS[:2]), started(Value(2, BODY, (8,)), SEEDS[:2], name="target")
    before = copy.deepcopy(target)
    ema_(target, source, 0.25)
    for t, b, s in zip(target.parameters(), before.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(t, 0.75 * b + 0.25 * s)


def test_copies_have_parameters_of_their_own():
    value = started(Value(1, BODY, (8,)), [0])
    target = copy.deepcopy(value).requires_grad_(False)
    obs = observations(BODY, 1)
    before = target(obs)
    with torch.no_grad():
        for p in value.parameters():
            p.add_(1.0)
    assert torch.equal(target(obs), before) and not torch.equal(value(obs), before)
    assert not target(obs).requires_grad


@pytest.mark.slow
def test_a_compiled_update_moves_as_the_plain_one_and_follows_the_learning_rate():
    torch._dynamo.reset()
    obs, action = observations(BODY, 2), torch.rand(2, 6, 3)
    critics = [started(QEnsemble(2, BODY, (16,), 2), SEEDS[:2]) for _ in range(2)]
    targets = [copy.deepcopy(q).requires_grad_(False) for q in critics]
    adams = [Adam(q.parameters(), 0.0, max_grad_norm=1.0) for q in critics]

    def update(i: int) -> torch.Tensor:
        loss = (critics[i](obs, action) - targets[i](obs, action) - 1).square().mean((1, 2))
        adams[i].minimise(loss)
        ema_(targets[i], critics[i], 0.1)
        return loss

    compiled = torch.compile(lambda: update(1), dynamic=False)
    for step in range(12):
        for adam in adams:
            adam.lr = 0.01 / (1 + step)
        torch.testing.assert_close(compiled(), update(0))
    for p, q in zip(*(m.parameters() for m in critics), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for p, q in zip(*(m.parameters() for m in targets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_first_values_do_not_depend_on_the_number_of_threads(one_thread):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        mlp = networks.MLP(2, 64, (256, 256), 3)
        networks.initialise(mlp, [0, 1], "orthogonal")
        assert torch.get_num_threads() == threads
        found.append(list(mlp.parameters()))
    torch.testing.assert_close(*found, rtol=0, atol=0)
