"""What turns images and histories into features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.control.networks.layers import DTYPES, MLP, Linear, Precision, parameter
from guerdon.errors import ConfigError


class ConvEncoder(nn.Module):
    """A convolutional encoder of images: convolutions, then one fully connected layer, each with ReLU.

    By default images of 36 pixels and more get the three layers of the DQN paper (Mnih et al. 2015: 32 of 8x8 with
    stride 4, 64 of 4x4 with stride 2, 64 of 3x3; 512 features) and their bytes are divided by 255; smaller ones, which
    are maps of symbols (MinAtar, MiniGrid), get one layer (16 of 3x3; 128 features) and are taken as they are.

    Args:
        seeds: S.
        observation: (channels, height, width).
        layers: (filters, size, stride) of each convolution.
        features: width of the fully connected layer.
        scale: what bytes are divided by.
        precision: of the products.
    """

    def __init__(
        self,
        seeds: int,
        observation: Sequence[int],
        layers: Sequence[tuple[int, int, int]] | None = None,
        features: int | None = None,
        scale: float | None = None,
        *,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        channels, *size = observation
        large = min(size) >= 36
        layers = layers or (((32, 8, 4), (64, 4, 2), (64, 3, 1)) if large else ((16, 3, 1),))
        self.features = features or (512 if large else 128)
        self.scale = scale or (255.0 if large else 1.0)
        self.strides = [stride for _, _, stride in layers]
        self.dtype = DTYPES[precision]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for filters, width, stride in layers:
            self.weights.append(parameter(seeds, filters, channels, width, width))
            self.biases.append(parameter(seeds, filters))
            channels, size = filters, [(n - width) // stride + 1 for n in size]
        if min(size) < 1:
            raise ConfigError(
                f"an image of {observation[1]}x{observation[2]} is too small for convolutions of "
                f"{', '.join(f'{width}x{width} with stride {stride}' for _, width, stride in layers)}."
            )
        self.mlp = MLP(seeds, channels * math.prod(size), (self.features,), None, precision=precision)

    def forward(self, images: Tensor) -> Tensor:
        """Images (S, B, C, H, W), bytes or float, to features (S, B, `features`), fp32."""
        maps = [self._convolve(k, x) for k, x in enumerate(images)]  # one by one: faster than grouped convolutions
        return self.mlp(torch.stack(maps))

    def _convolve(self, k: int, x: Tensor) -> Tensor:
        x = x.to(self.dtype, memory_format=torch.channels_last) / self.scale
        for weight, bias, stride in zip(self.weights, self.biases, self.strides, strict=True):
            x = F.conv2d(x, weight[k].to(self.dtype), bias[k].to(self.dtype), stride).relu()
        return x.flatten(1)


class RecurrentEncoder(nn.Module):
    """A GRU (Cho et al. 2014, in the form of `torch.nn.GRU`) over histories of observations.

        r = sigmoid(W_r x + U_r h),  z = sigmoid(W_z x + U_z h),  n = tanh(W_n x + r * (U_n h)),  h <- (1 - z) n + z h

    Args:
        seeds: S.
        inputs: size of one observation.
        features: size of the state h.
        precision: of the products that do not wait for one another (W x); the recurrent ones stay fp32.
    """

    def __init__(self, seeds: int, inputs: int, features: int, *, precision: Precision = "fp32") -> None:
        super().__init__()
        self.features = features
        self.inner = Linear(seeds, inputs, 3 * features, precision=precision)
        self.recurrent = Linear(seeds, features, 3 * features)
        self.inner.fan_in = features

    def forward(self, x: Tensor, state: Tensor | None = None, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features after every observation, and the last state.

        Args:
            x: (S, B, T, inputs).
            state: before the first observation, (S, B, features); None is 0.
            first: (S, B, T), true where an observation is the first of an episode: the state before it is 0.

        Returns:
            (S, B, T, features) and (S, B, features).
        """
        seeds, batch, time, _ = x.shape
        inner = self.inner(x.flatten(1, 2)).float().view(seeds, batch, time, -1)
        state = x.new_zeros(seeds, batch, self.features, dtype=torch.float32) if state is None else state
        states = []
        for t in range(time):
            if first is not None:
                state = state.masked_fill(first[:, :, t, None], 0.0)
            reset_x, update_x, new_x = inner[:, :, t].chunk(3, -1)
            reset_h, update_h, new_h = self.recurrent(state).chunk(3, -1)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            state = torch.lerp(new, state, torch.sigmoid(update_x + update_h))
            states.append(state)
        return torch.stack(states, 2), state
