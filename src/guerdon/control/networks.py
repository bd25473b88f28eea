"""Networks whose parameters carry a leading axis of seeds: S networks are one batched computation.

Nothing here mixes the seeds, so that each one's numbers are the same alone or beside others. Parameters are NaN until
`initialise` or `load_state_dict` gives them values: what was forgotten stops a run instead of slowing it.

One function, `_Layers`, is where the time goes. In `precision="bf16"` hidden layers multiply in bf16 from fp32 master
weights; the last layer of every network stays fp32, as a value of 100 in bf16 is a multiple of 1/2.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.control.spaces import Spec
from guerdon.control.streams import Streams
from guerdon.errors import ConfigError, near

Activation = Literal["relu", "tanh", "elu", "leaky_relu"]
Precision = Literal["fp32", "bf16"]
How = Literal["torch", "orthogonal", "edac"]

_aten = torch.ops.aten

# name -> (in place, its gradient from the gradient of the output and the output)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu_, lambda g, y: _aten.threshold_backward(g, y, 0)),
    "tanh": (torch.tanh_, _aten.tanh_backward),
    "elu": (F.elu_, lambda g, y: _aten.elu_backward(g, 1.0, 1.0, 1.0, True, y)),
    "leaky_relu": (F.leaky_relu_, lambda g, y: _aten.leaky_relu_backward(g, y, 0.01, True)),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LOG_2PI = math.log(2 * math.pi)

# From so many rows on, bf16 is worth casting the weights: acting with a few observations stays fp32.
_BF16_FROM = 16

# Above so many multiplications one oneDNN call for each matrix is worth its 12 microseconds: where torch's fp32 goes to
# MKL and the CPU is not Intel's, that has half of oneDNN's speed.
_ONEDNN_FROM = 2**21 if torch.backends.mkldnn.is_available() else math.inf

# A product with fewer columns than this takes MKL twice as long as its transpose.
_NARROW = 64

# What compiled layers are faster for: from so many rows on, up to so many multiplications in any layer where torch has
# one thread, which is what they use, and up to so many in all layers where it has more.
_COMPILED_FROM, _COMPILED_IN_ONE, _COMPILED_IN_ALL = 16, 2**24, 2**22
_SLOPES = {"relu": 0.0, "leaky_relu": 0.01}  # of activations that are straight lines


def _layer(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None, dtype: torch.dtype) -> Tensor:
    """activation(x W^T + b) of N networks: (N, B, I) to (N, B, O) in `dtype`, composed of torch's own operations.

    Weights are (..., O, I) and biases (..., O), with N leading entries in all.
    """
    weight, bias = weight.flatten(0, -3).to(dtype), bias.flatten(0, -2).to(dtype)
    y = torch.baddbmm(bias.unsqueeze(1), x.to(dtype), weight.transpose(1, 2))
    return y if activation is None else _ACTIVATIONS[activation][0](y)


class _Plan(NamedTuple):
    """What `_Layers` knows of an MLP before it sees a batch, so that a call does little beside the products."""

    activation: Activation
    dtype: torch.dtype  # from hidden layer to hidden layer
    hidden: int  # their number; one more layer is a head
    members: bool  # whether parameters have an axis of members
    sizes: tuple[int, ...]  # inputs x outputs of every layer
    slopes: np.ndarray | None  # of every layer below 0, where that is all there is to its activation


@cache
def _kernels() -> Any:
    """The module of compiled layers, where numba is installed."""
    return importlib.import_module("guerdon.control.kernels") if find_spec("numba") else None


def _compiled(plan: _Plan, x: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether layers are faster compiled."""
    n, rows, _ = x.shape
    return (
        not torch.compiler.is_compiling()
        and plan.slopes is not None
        and x.is_cpu
        and rows >= _COMPILED_FROM
        and (
            n * rows * sum(plan.sizes) <= _COMPILED_IN_ALL
            or (rows * max(plan.sizes) <= _COMPILED_IN_ONE and torch.get_num_threads() == 1)
        )
        and parameters[0].dtype == torch.float32
        and _kernels() is not None
    )


class _Layers(torch.autograd.Function):
    """`_layer` after `_layer` as one node of the graph: from hidden to hidden in `dtype`, first and head in fp32.

    What is observed keeps its digits so, and a value of 100 is no multiple of 1/2 as in bf16; both layers are small.

    Fewer nodes, no saved pre-activations, each weight cast once for both passes, and compiled layers or oneDNN where
    these are faster. The gradient of a gradient is left to the composed form.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *parameters: Tensor) -> Tensor:
        activate, _ = _ACTIVATIONS[plan.activation]
        dtype = plan.dtype if x.shape[1] >= _BF16_FROM else torch.float32
        cast = dtype != torch.float32
        ctx.plan, ctx.dtype, ctx.tape = plan, dtype, None
        if not cast and _compiled(plan, x, parameters):
            flat = [p.flatten(0, 1) for p in parameters] if plan.members else parameters
            y, ctx.tape = _kernels().forward(x.float(), flat, plan.slopes)
            ctx.save_for_backward(x, *parameters, None)
            return y
        rows = 0 if cast or not x.is_cpu else x.shape[1]
        seen, weights, large = [], [], []  # what every layer sees and multiplies it with, and how
        y = x if cast else x.float()
        for i, size in enumerate(plan.sizes):
            weight, bias = parameters[2 * i], parameters[2 * i + 1]
            if plan.members:
                weight, bias = weight.flatten(0, 1), bias.flatten(0, 1)
            if cast:
                kind = dtype if 0 < i < plan.hidden else torch.float32
                y, weight, bias = y.to(kind), weight.to(kind), bias.to(kind)
            seen.append(y)
            weights.append(weight)
            large.append(rows * size >= _ONEDNN_FROM)
            y = _product(y, weight.mT, bias, large[i])
            if i < plan.hidden:
                y = activate(y)
        ctx.save_for_backward(x, *parameters, y if len(seen) == plan.hidden else None)
        ctx.seen, ctx.weights, ctx.large = seen, weights, large
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parameters, last = ctx.saved_tensors
        plan, dtype, wanted = ctx.plan, ctx.dtype, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _Layers._again(plan, dtype, wanted, gradient, x, parameters)
        _, derivative = _ACTIVATIONS[plan.activation]
        cast, learns = dtype != torch.float32, any(wanted[2:])
        result: list[Tensor | None] = [None] * len(wanted)
        if ctx.tape is not None:
            found, to_x = _kernels().backward(gradient, ctx.tape, learns, wanted[0])
            result[2:] = (f.view_as(p) for f, p in zip(found, parameters, strict=True)) if learns else result[2:]
            result[0] = to_x if to_x is None else to_x.to(x.dtype)
            return tuple(result)
        for i in reversed(range(len(plan.sizes))):
            seen = ctx.seen[i]
            if i < plan.hidden:
                gradient = derivative(gradient, last)
                gradient = gradient.to(seen.dtype) if cast else gradient
            if learns:
                if seen.shape[2] < gradient.shape[2]:  # few inputs: the other way around is three times as fast
                    to_weight = _product(seen.mT, gradient, None, ctx.large[i]).mT
                else:
                    to_weight = _product(gradient.mT, seen, None, ctx.large[i])
                to_bias = gradient.sum(1)
                if cast:
                    to_weight, to_bias = to_weight.float(), to_bias.float()
                if plan.members:
                    to_weight = to_weight.reshape(parameters[2 * i].shape)
                    to_bias = to_bias.view_as(parameters[2 * i + 1])
                result[2 + 2 * i], result[3 + 2 * i] = to_weight, to_bias
            if i or wanted[0]:
                gradient, last = _product(gradient, ctx.weights[i], None, ctx.large[i]), seen
        if wanted[0]:
            result[0] = gradient.to(x.dtype)
        return tuple(result)

    @staticmethod
    def _again(
        plan: _Plan,
        dtype: torch.dtype,
        wanted: Sequence[bool],
        gradient: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor],
    ) -> tuple[Tensor | None, ...]:
        """The same gradients by the composed form, with a graph of their own."""
        y = x
        for i in range(len(plan.sizes)):
            kind = dtype if 0 < i < plan.hidden else torch.float32
            activation = plan.activation if i < plan.hidden else None
            y = _layer(y, parameters[2 * i], parameters[2 * i + 1], activation, kind)
        inputs = [t for t, want in zip((x, *parameters), (wanted[0], *wanted[2:]), strict=True) if want]
        found = iter(torch.autograd.grad(y, inputs, gradient, create_graph=True))
        return tuple(next(found) if want else None for want in wanted)


_forward, _backward = _Layers.forward, _Layers.backward  # plain functions, which torch.compile can follow


class _Forgetful:
    """A context of `_Layers` for a pass that no backward pass follows."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def _product(a: Tensor, b: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """a (N, M, K) times b (N, K, O), plus bias (N, O)."""
    if not onednn:
        if bias is not None:
            return torch.baddbmm(bias.unsqueeze(1), a, b)
        if a.is_cpu and 1 < b.shape[2] < min(_NARROW, a.shape[1]):
            return torch.bmm(b.mT, a.mT).mT
        return torch.bmm(a, b)
    linear = torch.ops.mkldnn._linear_pointwise
    each = [linear(a[n], b[n].t(), None if bias is None else bias[n], "none", [], "") for n in range(len(a))]
    return torch.stack(each) if len(each) > 1 else each[0].unsqueeze(0)


class Linear(nn.Module):
    """S linear layers, or S x K of an ensemble.

    Args:
        seeds: S.
        inputs: I.
        outputs: O.
        members: K, or None for no axis of members.
        activation: applied to the result.
        precision: of the product; "bf16" returns bf16.
    """

    def __init__(
        self,
        seeds: int,
        inputs: int,
        outputs: int,
        members: int | None = None,
        *,
        activation: Activation | None = None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        lead = (seeds,) if members is None else (seeds, members)
        self.members, self.activation, self.dtype = members, activation, _DTYPES[precision]
        self.fan_in = inputs  # what `initialise` scales by
        self.weight = _parameter(*lead, outputs, inputs)
        self.bias = _parameter(*lead, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(S, [K,] B, I) -> (S, [K,] B, O); every member sees the same x where it has no axis of members."""
        x = _for_members(x, self.members)
        return _layer(x.flatten(0, -3), self.weight, self.bias, self.activation, self.dtype).unflatten(0, x.shape[:-2])


def _for_members(x: Tensor, members: int | None) -> Tensor:
    """(S, B, I) -> (S, K, B, I), the same for every member; what has all its axes stays as it is."""
    return x if members is None or x.ndim == 4 else x.unsqueeze(1).expand(-1, members, -1, -1)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with a scale and a shift for each seed (and member)."""

    def __init__(self, seeds: int, size: int, members: int | None = None) -> None:
        super().__init__()
        lead = (seeds,) if members is None else (seeds, members)
        self.weight, self.bias = _parameter(*lead, 1, size), _parameter(*lead, 1, size)

    def forward(self, x: Tensor) -> Tensor:
        """(S, [K,] B, size), any precision, to the same shape in fp32."""
        return torch.addcmul(self.bias, F.layer_norm(x.float(), x.shape[-1:]), self.weight)


class MLP(nn.Module):
    """Fully connected layers: linear, (normalisation,) activation, as often as `hidden` says, and a linear head.

    Args:
        seeds: S.
        inputs: I.
        hidden: widths of the hidden layers.
        outputs: O, or None for no head: the last hidden layer is the result.
        members: K members of an ensemble, or None for no axis of members.
        activation: relu, tanh, elu or leaky_relu.
        layer_norm: normalise before every activation.
        precision: of the products from hidden layer to hidden layer, for batches of 16 rows and more.
    """

    def __init__(
        self,
        seeds: int,
        inputs: int,
        hidden: Sequence[int],
        outputs: int | None,
        members: int | None = None,
        *,
        activation: Activation = "relu",
        layer_norm: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ConfigError(
                f"no activation is called '{activation}'.{near(activation, _ACTIVATIONS)} "
                f"There are {', '.join(_ACTIVATIONS)}."
            )
        sizes = [inputs, *hidden]
        fused = None if layer_norm else activation
        self.layers = nn.ModuleList(
            Linear(seeds, i, o, members, activation=fused, precision=precision if n else "fp32")
            for n, (i, o) in enumerate(pairwise(sizes))
        )
        self.norms = nn.ModuleList(LayerNorm(seeds, width, members) for width in hidden if layer_norm)
        self.head = None if outputs is None else Linear(seeds, sizes[-1], outputs, members)
        stack = [*self.layers, self.head] if self.head is not None else list(self.layers)
        self.plan = _Plan(
            activation,
            _DTYPES[precision],
            len(hidden),
            members is not None,
            tuple(i * o for i, o in pairwise([*sizes, *([] if outputs is None else [outputs])])),
            np.array([_SLOPES[activation]] * len(hidden) + [1.0] * (outputs is not None), np.float32)
            if activation in _SLOPES
            else None,
        )
        self.in_order = [p for layer in stack for p in (layer.weight, layer.bias)]
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        """(S, B, I) -> (S, [K,] B, O), fp32."""
        if self.norms:
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = _ACTIVATIONS[self.plan.activation][0](norm(layer(x)))
            return x if self.head is None else self.head(x)
        if torch.is_grad_enabled():
            run: Callable[..., Tensor] = _Layers.apply
        else:
            run = partial(_forward, _Forgetful())
        if self.members is None:
            return run(x, self.plan, *self.in_order).float()
        x = _for_members(x, self.members)
        return run(x.flatten(0, 1), self.plan, *self.in_order).float().unflatten(0, x.shape[:2])


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
        self.dtype = _DTYPES[precision]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for filters, width, stride in layers:
            self.weights.append(_parameter(seeds, filters, channels, width, width))
            self.biases.append(_parameter(seeds, filters))
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


class _Network(nn.Module):
    """What sees observations: an encoder where they are images, then an MLP."""

    def __init__(
        self,
        seeds: int,
        spec: Spec,
        outputs: int,
        hidden: Sequence[int] = (256, 256),
        members: int | None = None,
        *,
        beside: int = 0,
        activation: Activation = "relu",
        layer_norm: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.seeds, self.spec = seeds, spec
        self.encoder = ConvEncoder(seeds, spec.observation, precision=precision) if spec.image else None
        self.mlp = MLP(
            seeds,
            (self.encoder.features if self.encoder else math.prod(spec.observation)) + beside,
            hidden,
            outputs,
            members,
            activation=activation,
            layer_norm=layer_norm,
            precision=precision,
        )
        self.options: dict[str, Any] = {
            "hidden": list(hidden),
            "activation": activation,
            "layer_norm": layer_norm,
            "precision": precision,
        }

    @property
    def plain(self) -> bool:
        """Whether there are fully connected layers and nothing else."""
        return self.encoder is None and not self.mlp.norms

    def features(self, obs: Tensor, *beside: Tensor) -> Tensor:
        """What the MLP sees, (S, B, I)."""
        features = self.encoder(obs) if self.encoder else obs.flatten(2).float()
        return torch.cat([features, *beside], -1) if beside else features

    def outputs(self, obs: Tensor, *beside: Tensor) -> Tensor:
        """(S, [K,] B, O)."""
        return self.mlp(self.features(obs, *beside))


class Pass:
    """One pass through a network without a graph, and the gradients that belong to it, for losses with a closed form.

    The numbers are those of autograd, whose bookkeeping costs as much as the products in small networks. What is not
    fully connected layers alone (images, layer normalisation, dueling) goes through autograd.

    Args:
        network: any of this file.
        obs, beside: what its `outputs` takes.

    Attributes:
        output: (S, [K,] B, O), what `outputs` returns.
    """

    def __init__(self, network: _Network, obs: Tensor, *beside: Tensor) -> None:
        self._network, self._width = network, sum(x.shape[-1] for x in beside)
        if not network.plain:
            with torch.enable_grad():
                self._beside = [x.detach().requires_grad_() for x in beside]
                self._graph = network.outputs(obs, *self._beside)
            self.output = self._graph.detach()
            return
        mlp, x = network.mlp, network.features(obs, *beside)
        self._members = mlp.members
        if self._members is not None:
            x = _for_members(x, self._members).flatten(0, 1)
        with torch.no_grad():
            y = _forward(self, x, mlp.plan, *mlp.in_order).float()  # type: ignore[arg-type]
        self.output = y if self._members is None else y.unflatten(0, (-1, self._members))

    def parameters(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """Gradients of `network.parameters()`, in their order, from that of the output."""
        if not self._network.plain:
            return torch.autograd.grad(self._graph, list(self._network.parameters()), gradient)
        return self._backward(gradient, False)[2:]

    def beside(self, gradient: Tensor) -> Tensor:
        """Gradient (S, B, ...) of what was beside the observations, from that of the output."""
        if not self._network.plain:
            return torch.cat(torch.autograd.grad(self._graph, self._beside, gradient), -1)
        to_x = self._backward(gradient, True)[0][..., -self._width :]
        return to_x if self._members is None else to_x.unflatten(0, (-1, self._members)).sum(1)

    # What `_Layers` needs of a context

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    @torch.no_grad()
    def _backward(self, gradient: Tensor, to_inputs: bool) -> tuple[Any, ...]:
        self.needs_input_grad = (to_inputs, False, *[not to_inputs] * len(self._network.mlp.in_order))
        return _backward(self, gradient if self._members is None else gradient.flatten(0, 1))


def in_numpy(network: _Network) -> Callable[[np.ndarray], np.ndarray]:
    """A function that computes `network.outputs` of a few observations (S, B, *obs), by numpy where that can be.

    On a CPU that takes a third of the time of calls to torch, in fully connected layers without members. It reads the
    parameters where they are, so that it learns with the network.
    """
    mlp, device = network.mlp, next(network.parameters()).device
    if not network.plain or mlp.members is not None or device.type != "cpu":

        def outputs(obs: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return network.outputs(torch.from_numpy(obs).to(device)).cpu().numpy()

        return outputs
    activate, hidden = _ACTIVATIONS[mlp.plan.activation][0], mlp.plan.hidden
    arrays: list[np.ndarray] = [cast(Tensor, p).detach().numpy() for p in mlp.in_order]
    layers = [(weight.swapaxes(1, 2), bias[:, None]) for weight, bias in zip(arrays[::2], arrays[1::2], strict=True)]

    def quick(obs: np.ndarray) -> np.ndarray:
        x = obs.reshape(*obs.shape[:2], -1)
        for i, (weight, bias) in enumerate(layers):
            x = np.matmul(x, weight)
            x += bias
            if i < hidden:
                activate(torch.from_numpy(x))
        return x

    return quick


class Value(_Network):
    """V(s). `hidden`, `activation`, `layer_norm` and `precision` are those of `MLP`, here as in all that follows."""

    def __init__(self, seeds: int, spec: Spec, hidden: Sequence[int] = (256, 256), **options: Any) -> None:
        super().__init__(seeds, spec, 1, hidden, **options)

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (S, B, *obs) to values (S, B)."""
        return self.outputs(obs).squeeze(-1)


class QEnsemble(_Network):
    """K critics Q_k(s, a) of continuous actions; of images all members share one encoder."""

    def __init__(
        self, seeds: int, spec: Spec, hidden: Sequence[int] = (256, 256), members: int = 2, **options: Any
    ) -> None:
        super().__init__(seeds, spec, 1, hidden, members, beside=spec.actions, **options)
        self.options |= {"members": members}

    @property
    def config(self) -> dict[str, Any]:
        """Plain data from which it is made again, without its parameters."""
        return {"seeds": self.seeds, **self.options}

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Observations (S, B, *obs) and actions (S, B, A) to values (S, K, B)."""
        return self.outputs(obs, action).squeeze(-1)


class DiscreteQ(_Network):
    """Q(s, .) of discrete actions.

    Args:
        members: K members of an ensemble, or None for no axis of members.
        dueling: Q = V + A - mean over actions of A, the last layer giving V and A (Wang et al. 2016).
    """

    def __init__(
        self,
        seeds: int,
        spec: Spec,
        hidden: Sequence[int] = (256, 256),
        members: int | None = None,
        dueling: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(seeds, spec, spec.actions + dueling, hidden, members, **options)
        self.dueling = dueling
        self.options |= {"members": members, "dueling": dueling}

    @property
    def plain(self) -> bool:
        return super().plain and not self.dueling

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (S, B, *obs) to values (S, B, A), or (S, K, B, A) with members."""
        return self.outputs(obs)

    def outputs(self, obs: Tensor, *beside: Tensor) -> Tensor:
        q = super().outputs(obs)
        if not self.dueling:
            return q
        value, advantage = q[..., :1], q[..., 1:]
        return value + advantage - advantage.mean(-1, keepdim=True)


# Actors


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution over actions, each dimension for itself; with bounds, of a tanh between them.

        a = mean + std * noise,  or  a = centre + half * tanh(mean + std * noise)

    Attributes:
        mean: (S, B, A).
        log_std: broadcasts to `mean`.
        centre, half: of the range of squashed actions, (A,); None does not squash.
    """

    mean: Tensor
    log_std: Tensor
    centre: Tensor | None = None
    half: Tensor | None = None

    @property
    def mode(self) -> Tensor:
        """The action without noise, (S, B, A)."""
        return self._squash(self.mean)

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (S, B, A) from standard normal noise, differentiable, and their log-probs (S, B)."""
        free = self.mean + self.log_std.exp() * noise
        return self._squash(free), self._log_prob(free, noise)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probs (S, B) of actions (S, B, A); squashed ones count as at most 1 - 1e-6 of the way to a bound."""
        free = action
        if self.half is not None and self.centre is not None:
            free = torch.atanh(((action - self.centre) / self.half).clamp(-1 + 1e-6, 1 - 1e-6))
        return self._log_prob(free, (free - self.mean) * (-self.log_std).exp())

    def entropy(self) -> Tensor:
        """Entropy (S, B), before squashing if there is any: squashed, it has no closed form."""
        return (self.log_std.expand_as(self.mean) + 0.5 * (1 + _LOG_2PI)).sum(-1)

    def _squash(self, free: Tensor) -> Tensor:
        if self.half is None or self.centre is None:
            return free
        return torch.addcmul(self.centre, torch.tanh(free), self.half)

    def _log_prob(self, free: Tensor, noise: Tensor) -> Tensor:
        terms = -0.5 * noise.square() - self.log_std - 0.5 * _LOG_2PI
        if self.half is not None:  # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which no u makes infinite
            terms = terms - 2 * (math.log(2) - free - F.softplus(-2 * free)) - self.half.log()
        return terms.sum(-1)


@dataclass(frozen=True)
class Categorical:
    """A distribution over discrete actions from logits (S, B, A)."""

    logits: Tensor

    @property
    def log_probs(self) -> Tensor:
        """Log-probs of all actions, (S, B, A)."""
        return self.logits.log_softmax(-1)

    @property
    def mode(self) -> Tensor:
        """The likeliest actions, (S, B), int64."""
        return self.logits.argmax(-1)

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (S, B) from uniform noise (S, B, A), by Gumbel's trick, and their log-probs (S, B)."""
        action = (self.logits - (-noise.clamp_min(1e-20).log()).log()).argmax(-1)
        return action, self.log_prob(action)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probs (S, B) of actions (S, B)."""
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy (S, B)."""
        logs = self.log_probs
        return -(logs.exp() * logs).sum(-1)


class Actor(_Network):
    """A network that acts. `config` is plain data from which `build_actor` makes it again, without its parameters."""

    kind: ClassVar[str]

    @property
    def config(self) -> dict[str, Any]:
        return {"actor": self.kind, "seeds": self.seeds, "spec": asdict(self.spec), **self.options}

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        """Actions (S, B, A), or (S, B) where they are discrete, for observations (S, B, *obs).

        Args:
            streams: where exploration draws from, for each seed its own; None acts greedily.
        """
        raise NotImplementedError


class _ContinuousActor(Actor):
    """An actor whose actions have bounds."""

    low: Tensor
    high: Tensor

    def __init__(self, seeds: int, spec: Spec, outputs: int, hidden: Sequence[int], **options: Any) -> None:
        if spec.discrete:
            raise ConfigError(f"{type(self).__name__} acts with continuous actions, and these are discrete.")
        super().__init__(seeds, spec, outputs, hidden, **options)
        self.register_buffer("low", torch.tensor(spec.low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.high), persistent=False)

    def _require_bounds(self) -> None:
        if not all(map(math.isfinite, self.spec.low + self.spec.high)):
            raise ConfigError(
                f"{type(self).__name__} squashes actions between their bounds, and these have none: "
                f"from {self.spec.low} to {self.spec.high}."
            )

    def squashed_range(self) -> tuple[Tensor, Tensor]:
        """Centre and half width of the range of every dimension."""
        return (self.high + self.low) / 2, (self.high - self.low) / 2


class DeterministicActor(_ContinuousActor):
    """centre + half * tanh(MLP(s)), between the bounds of the actions."""

    kind = "deterministic"

    def __init__(self, seeds: int, spec: Spec, hidden: Sequence[int] = (256, 256), **options: Any) -> None:
        super().__init__(seeds, spec, spec.actions, hidden, **options)
        self._require_bounds()

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (S, B, *obs) to actions (S, B, A)."""
        centre, half = self.squashed_range()
        return torch.addcmul(centre, torch.tanh(self.outputs(obs)), half)

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        return self(obs)


class GaussianActor(_ContinuousActor):
    """A normal distribution over actions, `Gaussian`, with mean MLP(s).

    Args:
        squash: actions are a tanh of the normal variable, between their bounds; otherwise they are the variable itself,
            and `act` clips it to the bounds.
        state_dependent: the network gives the log of the standard deviation too; otherwise it is a parameter.
        bound_mean: the mean is centre + half * tanh(MLP(s)), between the bounds of the actions.
        log_std: bounds to which the log of the standard deviation is clamped.
    """

    kind = "gaussian"

    def __init__(
        self,
        seeds: int,
        spec: Spec,
        hidden: Sequence[int] = (256, 256),
        *,
        squash: bool = True,
        state_dependent: bool = True,
        bound_mean: bool = False,
        log_std: tuple[float, float] = (-5.0, 2.0),
        **options: Any,
    ) -> None:
        super().__init__(seeds, spec, spec.actions * (2 if state_dependent else 1), hidden, **options)
        self.squash, self.bound_mean, self.bounds = squash, bound_mean, log_std
        self.log_std = None if state_dependent else _parameter(seeds, 1, spec.actions)
        self.options |= {"squash": squash, "state_dependent": state_dependent}
        self.options |= {"bound_mean": bound_mean, "log_std": list(log_std)}
        if squash or bound_mean:
            self._require_bounds()

    def forward(self, obs: Tensor) -> Gaussian:
        """The distribution of actions for observations (S, B, *obs)."""
        return self.distribution(self.outputs(obs))

    def distribution(self, outputs: Tensor) -> Gaussian:
        """The distribution that `outputs` of the network stand for."""
        mean, log_std = outputs.chunk(2, -1) if self.log_std is None else (outputs, self.log_std)
        if self.bound_mean:
            centre, half = self.squashed_range()
            mean = torch.addcmul(centre, torch.tanh(mean), half)
        return Gaussian(mean, log_std.clamp(*self.bounds), *(self.squashed_range() if self.squash else ()))

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        found = self(obs)
        action = found.mode if streams is None else found.sample(streams.normal("act", *found.mean.shape[1:]))[0]
        return action if self.squash else torch.clamp(action, self.low, self.high)


class CategoricalActor(Actor):
    """A distribution over discrete actions, `Categorical`, with logits MLP(s)."""

    kind = "categorical"

    def __init__(self, seeds: int, spec: Spec, hidden: Sequence[int] = (256, 256), **options: Any) -> None:
        super().__init__(seeds, spec, spec.actions, hidden, **options)

    def forward(self, obs: Tensor) -> Categorical:
        """The distribution of actions for observations (S, B, *obs)."""
        return Categorical(self.outputs(obs))

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        found = self(obs)
        return found.mode if streams is None else found.sample(streams.uniform("act", *found.logits.shape[1:]))[0]


class GreedyQ(DiscreteQ, Actor):
    """A `DiscreteQ` that takes the best action of the mean over its members, or with probability `epsilon` any.

    Attributes:
        epsilon: of acting with streams; a number, or one for each seed (S,).
    """

    kind = "greedy-q"
    epsilon: float | Tensor = 0.0

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        q = self(obs)
        best = (q if q.ndim == 3 else q.mean(1)).argmax(-1)
        if streams is None:
            return best
        epsilon = torch.as_tensor(self.epsilon, device=best.device).view(-1, 1)
        explores = streams.uniform("explore", best.shape[1]) < epsilon
        return torch.where(explores, streams.integers("act", self.spec.actions, best.shape[1]), best)


_ACTORS: dict[str, type[Actor]] = {
    cls.kind: cls for cls in (DeterministicActor, GaussianActor, CategoricalActor, GreedyQ)
}
_ELSEWHERE = {  # modules that import this one
    "stream": ("guerdon.control.streaming.agents", "StreamActor"),
    "cost-to-go": ("guerdon.control.puzzles.networks", "CostToGo"),
}


def build_actor(config: Mapping[str, Any]) -> Actor:
    """The actor that `config` describes, its parameters still NaN.

    Raises:
        ConfigError: an actor that does not exist.
    """
    options = dict(config)
    kind, seeds, spec = options.pop("actor"), options.pop("seeds"), Spec(**options.pop("spec"))
    if kind in _ELSEWHERE:
        module, name = _ELSEWHERE[kind]
        return cast(Actor, getattr(importlib.import_module(module), name)(seeds, spec, **options))
    if kind not in _ACTORS:
        raise ConfigError(f"no actor is called '{kind}'.{near(kind, _ACTORS)} There are {', '.join(_ACTORS)}.")
    return _ACTORS[kind](seeds, spec, **options)


# Parameters


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, torch.nan))


@torch.no_grad()
def initialise(
    module: nn.Module, seeds: Sequence[int], how: How = "torch", *, head_gain: float = 1.0, name: str | None = None
) -> None:
    """Give every parameter its first value, each seed's slice from the seed's own generator.

        torch       weights and biases U(-1/sqrt(I), 1/sqrt(I)), as `nn.Linear`, `nn.Conv2d` and `nn.GRU` do
        orthogonal  orthogonal weights with gain sqrt(2), and `head_gain` in the last layer; biases 0 (PPO)
        edac        as torch, but hidden biases 0.1 and the last layer U(-3e-3, 3e-3) (An et al. 2021, in their code)

    Normalisation starts as the identity, and a log-std that is a parameter at 0.

    Args:
        module: built from the classes of this file.
        seeds: the S seeds.
        how: see above.
        head_gain: gain of the last layers of MLPs with `orthogonal`.
        name: tells modules apart that are initialised from the same seeds; None is the name of the class.
    """
    if how not in get_args(How):
        raise ConfigError(f"no initialisation is called '{how}'.{near(how, get_args(How))}")
    generators = [_torch_generator(seed, name or type(module).__name__) for seed in seeds]
    heads = {part.head for part in module.modules() if isinstance(part, MLP)}
    for part in module.modules():
        if isinstance(part, Linear):
            _fill(part.weight, part.bias, part.fan_in, generators, how, head_gain if part in heads else None)
        elif isinstance(part, ConvEncoder):
            for weight, bias in zip(part.weights, part.biases, strict=True):
                _fill(weight, bias, math.prod(weight.shape[2:]), generators, how, None)
        elif isinstance(part, LayerNorm):
            part.weight.fill_(1.0)
            part.bias.zero_()
        elif isinstance(part, GaussianActor) and part.log_std is not None:
            part.log_std.zero_()


def _fill(
    weight: Tensor, bias: Tensor, fan_in: int, generators: list[torch.Generator], how: How, head_gain: float | None
) -> None:
    """Draw the parameters of one layer, on the CPU wherever they are; `head_gain` is None in hidden layers."""
    hidden = head_gain is None
    bound = 3e-3 if how == "edac" and not hidden else 1 / math.sqrt(fan_in)
    for k, generator in enumerate(generators):
        if how == "orthogonal":
            matrix = _orthogonal(weight[k].flatten(1).shape if weight.ndim == 5 else weight[k].shape, generator)
            weight[k] = (math.sqrt(2) if head_gain is None else head_gain) * matrix.view_as(weight[k])
            bias[k] = 0.0
        else:
            weight[k] = torch.empty_like(weight[k], device="cpu").uniform_(-bound, bound, generator=generator)
            drawn = torch.empty_like(bias[k], device="cpu").uniform_(-bound, bound, generator=generator)
            bias[k] = 0.1 if how == "edac" and hidden else drawn


def _torch_generator(seed: int, name: str) -> torch.Generator:
    state = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def _orthogonal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Matrices (..., O, I) with orthonormal rows, or columns where there are more rows."""
    rows, columns = shape[-2:]
    normal = torch.randn(*shape[:-2], max(rows, columns), min(rows, columns), generator=generator)
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over the orthogonal matrices
    return q if rows >= columns else q.mT


@torch.no_grad()
def ema_(target: nn.Module, source: nn.Module, rate: float) -> None:
    """target <- (1 - rate) target + rate source, parameter by parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block gradients flow through `module` to its inputs, and none are computed for its parameters."""
    learned = [p for p in module.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)
