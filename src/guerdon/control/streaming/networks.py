"""Networks of one stream: sparse at the start, normalised by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from guerdon.control.spaces import Spec

Kind = Literal["td", "q", "sarsa", "ac"]


def sparse_init_(weight: Tensor, sparsity: float, rng: np.random.Generator, connect_all: bool = False) -> Tensor:
    """Fill a layer's weight (outputs, ...) in place: uniform in +-1/sqrt(fan_in), then a share of each unit's at 0.

    Of each unit ceil(sparsity * fan_in) incoming weights, chosen for it at random, become 0, so that at 0.9 a unit with
    fewer than 10 inputs begins without any.

    Args:
        connect_all: leave every unit at least one.
    """
    units, fan_in = len(weight), weight[0].numel()
    bound = 1 / math.sqrt(fan_in)
    zeros = min(math.ceil(round(sparsity * fan_in, 9)), fan_in - connect_all)  # 0.9 * 10 is a little above 9
    values = rng.uniform(-bound, bound, (units, fan_in))
    np.put_along_axis(values, rng.permuted(np.tile(np.arange(fan_in), (units, 1)), axis=1)[:, :zeros], 0.0, axis=1)
    with torch.no_grad():
        return weight.copy_(torch.from_numpy(values).view_as(weight))


def build_network(inputs: Sequence[int], outputs: int, hidden: Sequence[int], layer_norm: bool) -> nn.Sequential:
    """Layers, each followed by normalisation over all of its units and LeakyReLU, then a linear output.

    Images (C, H, W) first pass convolutions: those of Atari (32 of 8x8 by 5, 64 of 4x4 by 3, 64 of 3x3 by 2) from 36
    pixels on, that of MinAtar (16 of 3x3) below.
    """
    layers: list[nn.Module] = []
    shape = tuple(inputs)

    def add(layer: nn.Module) -> None:
        nonlocal shape
        shape = tuple(layer(torch.zeros(1, *shape)).shape[1:])
        norm = [nn.LayerNorm(shape, elementwise_affine=False)] if layer_norm else []
        layers.extend([layer, *norm, nn.LeakyReLU(0.01)])

    if len(shape) == 3:
        convolutions = ((32, 8, 5), (64, 4, 3), (64, 3, 2)) if min(shape[1:]) >= 36 else ((16, 3, 1),)
        for channels, size, stride in convolutions:
            add(nn.Conv2d(shape[0], channels, size, stride))
        layers.append(nn.Flatten())
        shape = (math.prod(shape),)
    for width in hidden:
        add(nn.Linear(shape[0], width))
    return nn.Sequential(*layers, nn.Linear(shape[0], outputs))


def paper_hidden(kind: Kind, spec: Spec) -> tuple[int, ...]:
    """Widths of the fully connected layers in the paper's experiments."""
    if spec.image:
        return (256,) if min(spec.observation[1:]) >= 36 else (128,)
    return (32, 32) if kind in ("q", "sarsa") else (128, 128)
