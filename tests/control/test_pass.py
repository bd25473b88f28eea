from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.control.networks import DiscreteQ, GreedyQ, Pass, QEnsemble, Value, in_numpy, initialise
from guerdon.control.spaces import Spec

BODY = Spec((5,), False, False, 2, (-1.0, -1.0), (1.0, 1.0))
CHOICES = Spec((5,), False, True, 3, (), ())
IMAGE = Spec((4, 10, 10), True, True, 3, (), ())
close = torch.testing.assert_close


def built(kind, spec, seeds=3, **options):
    network = kind(seeds, spec, (16, 80), **options)
    initialise(network, range(seeds))
    return network


def seen(spec, seeds=3, rows=20):
    torch.manual_seed(0)
    if spec.image:
        return torch.randint(0, 2, (seeds, rows, *spec.observation), dtype=torch.uint8)
    return torch.randn(seeds, rows, *spec.observation)


@pytest.mark.parametrize(
    "network",
    [
        built(Value, BODY),
        built(Value, BODY, activation="tanh", layer_norm=True),
        built(DiscreteQ, CHOICES, dueling=True),
        built(DiscreteQ, CHOICES, members=2),
        built(DiscreteQ, IMAGE),
        built(QEnsemble, BODY),
        built(QEnsemble, BODY, layer_norm=True),
    ],
    ids=["plain", "norm", "dueling", "members", "image", "beside", "beside-norm"],
)
def test_a_pass_has_the_gradients_of_autograd(network):
    obs, beside = seen(network.spec), []
    if isinstance(network, QEnsemble):
        beside = [torch.randn(3, 20, 2, requires_grad=True)]
    output = network.outputs(obs, *beside)
    gradient = torch.randn_like(output)
    expected = torch.autograd.grad(output, list(network.parameters()), gradient, retain_graph=True)
    with torch.no_grad():
        found = Pass(network, obs, *beside)
        close(found.output, output)
        for mine, theirs in zip(found.parameters(gradient), expected, strict=True):
            close(mine, theirs, rtol=1e-4, atol=1e-5)
        if beside:
            to_beside = Pass(network, obs, *beside).beside(gradient)
            close(to_beside, torch.autograd.grad(output, beside[0], gradient)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "network",
    [built(GreedyQ, CHOICES), built(GreedyQ, CHOICES, activation="elu"), built(GreedyQ, CHOICES, dueling=True)],
    ids=["plain", "elu", "dueling"],
)
def test_numpy_follows_a_network_that_learns(network):
    values, obs = in_numpy(network), seen(CHOICES, rows=2)
    for _ in range(2):
        np.testing.assert_allclose(values(obs.numpy()), network(obs).detach().numpy(), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for p in network.parameters():
                p += 0.1
