"""Linear layers and stacks of them, S or S x K at once: where the time of all networks goes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.errors import ConfigError, near

Activation = Literal["relu", "tanh", "elu", "leaky_relu"]
Precision = Literal["fp32", "bf16"]

_aten = torch.ops.aten

# name -> (in place, its gradient from the gradient of the output and the output)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu_, lambda g, y: _aten.threshold_backward(g, y, 0)),
    "tanh": (torch.tanh_, _aten.tanh_backward),
    "elu": (F.elu_, lambda g, y: _aten.elu_backward(g, 1.0, 1.0, 1.0, True, y)),
    "leaky_relu": (F.leaky_relu_, lambda g, y: _aten.leaky_relu_backward(g, y, 0.01, True)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# From so many rows on, bf16 is worth casting the weights: acting with a few observations stays fp32.
_BF16_FROM = 16

# Above so many multiplications one oneDNN call for each matrix is worth its 12 microseconds: where torch's fp32 goes to
# MKL and the CPU is not Intel's, that has half of oneDNN's speed.
_ONEDNN_FROM = 2**21 if torch.backends.mkldnn.is_available() else math.inf

# A product with fewer columns than this takes MKL twice as long as its transpose.
_NARROW = 64

# What compiled layers are faster for: from so many rows on, and up to so many multiplications where torch has more
# threads than there are networks, each of which is computed by one thread.
_COMPILED_FROM, _COMPILED_UP_TO = 16, 2**22
_SLOPES = {"relu": 0.0, "leaky_relu": 0.01}  # of activations that are straight lines


def _layer(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation | None, dtype: torch.dtype) -> Tensor:
    """activation(x W^T + b) of N networks: (N, B, I) to (N, B, O) in `dtype`, composed of torch's own operations.

    Weights are (..., O, I) and biases (..., O), with N leading entries in all.
    """
    weight, bias = weight.flatten(0, -3).to(dtype), bias.flatten(0, -2).to(dtype)
    y = torch.baddbmm(bias.unsqueeze(1), x.to(dtype), weight.transpose(1, 2))
    return y if activation is None else ACTIVATIONS[activation][0](y)


class _Plan(NamedTuple):
    """What `_Layers` knows of an MLP before it sees a batch, so that a call does little beside the products."""

    activation: Activation
    dtype: torch.dtype  # from hidden layer to hidden layer
    hidden: int  # their number; one more layer is a head
    members: bool  # whether parameters have an axis of members
    sizes: tuple[int, ...]  # inputs x outputs of every layer
    slopes: Tensor | None  # of every layer below 0, where that is all there is to its activation


@cache
def _kernels() -> Any:
    """The module of compiled layers, where numba is installed."""
    return importlib.import_module("guerdon.control.networks.kernels") if find_spec("numba") else None


def _compiled(plan: _Plan, x: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether layers are faster compiled."""
    *lead, rows, _ = x.shape
    n = math.prod(lead)
    return (
        not torch.compiler.is_compiling()
        and plan.slopes is not None
        and x.is_cpu
        and rows >= _COMPILED_FROM
        and (n >= torch.get_num_threads() or n * rows * sum(plan.sizes) <= _COMPILED_UP_TO)
        and parameters[0].dtype == torch.float32
        and _kernels() is not None
    )


@contextmanager
def one_thread_each(threads: int) -> Iterator[None]:
    """Within the block torch has one thread, and compiled networks of different seeds and members share `threads`.

    Torch's threads wait for one another longer than a small product takes: with two of them most updates take longer
    than with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1 or _kernels() is None:
            yield
        else:
            with _kernels().shared(threads):
                yield
    finally:
        torch.set_num_threads(before)


class _Layers(torch.autograd.Function):
    """`_layer` after `_layer` as one node of the graph: from hidden to hidden in `dtype`, first and head in fp32.

    What is observed keeps its digits so, and a value of 100 is no multiple of 1/2 as in bf16; both layers are small.

    Fewer nodes, no saved pre-activations, each weight cast once for both passes, and compiled layers or oneDNN where
    these are faster. The gradient of a gradient is left to the composed form.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *parameters: Tensor) -> Tensor:
        activate, _ = ACTIVATIONS[plan.activation]
        dtype = plan.dtype if x.shape[-2] >= _BF16_FROM else torch.float32
        cast = dtype != torch.float32
        ctx.plan, ctx.dtype, ctx.tape = plan, dtype, None
        if not cast and _compiled(plan, x, parameters):
            y, ctx.tape = _kernels().forward(x.float(), parameters, plan.slopes, not isinstance(ctx, _Forgetful))
            ctx.save_for_backward(x, *parameters, None)
            return y
        rows = 0 if cast or not x.is_cpu else x.shape[-2]
        seen, weights, large = [], [], []  # what every layer sees and multiplies it with, and how
        y = (x if cast else x.float()).flatten(0, -3)
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
        return y.unflatten(0, x.shape[:-2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parameters, last = ctx.saved_tensors
        plan, dtype, wanted = ctx.plan, ctx.dtype, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _Layers._again(plan, dtype, wanted, gradient, x, parameters)
        learns = any(wanted[2:])
        if ctx.tape is not None:
            found, to_x = _kernels().backward(gradient, ctx.tape, learns, wanted[0])
            return (None if to_x is None else to_x.to(x.dtype), None, *(found or [None] * len(parameters)))
        _, derivative = ACTIVATIONS[plan.activation]
        cast = dtype != torch.float32
        result: list[Tensor | None] = [None] * len(wanted)
        gradient = gradient.flatten(0, -3)
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
            result[0] = gradient.to(x.dtype).view(x.shape)
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
        y = x.flatten(0, -3)
        for i in range(len(plan.sizes)):
            kind = dtype if 0 < i < plan.hidden else torch.float32
            activation = plan.activation if i < plan.hidden else None
            y = _layer(y, parameters[2 * i], parameters[2 * i + 1], activation, kind)
        inputs = [t for t, want in zip((x, *parameters), (wanted[0], *wanted[2:]), strict=True) if want]
        found = iter(torch.autograd.grad(y, inputs, gradient.flatten(0, -3), create_graph=True))
        return tuple(next(found) if want else None for want in wanted)


forward, backward = _Layers.forward, _Layers.backward  # plain functions, which torch.compile can follow


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


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, torch.nan))


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
        self.members, self.activation, self.dtype = members, activation, DTYPES[precision]
        self.fan_in = inputs  # what `initialise` scales by
        self.weight = parameter(*lead, outputs, inputs)
        self.bias = parameter(*lead, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(S, [K,] B, I) -> (S, [K,] B, O); every member sees the same x where it has no axis of members."""
        x = for_members(x, self.members)
        return _layer(x.flatten(0, -3), self.weight, self.bias, self.activation, self.dtype).unflatten(0, x.shape[:-2])


def for_members(x: Tensor, members: int | None) -> Tensor:
    """(S, B, I) -> (S, K, B, I), the same for every member; what has all its axes stays as it is."""
    return x if members is None or x.ndim == 4 else x.unsqueeze(1).expand(-1, members, -1, -1)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with a scale and a shift for each seed (and member)."""

    def __init__(self, seeds: int, size: int, members: int | None = None) -> None:
        super().__init__()
        lead = (seeds,) if members is None else (seeds, members)
        self.weight, self.bias = parameter(*lead, 1, size), parameter(*lead, 1, size)

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
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"no activation is called '{activation}'.{near(activation, ACTIVATIONS)} "
                f"There are {', '.join(ACTIVATIONS)}."
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
            DTYPES[precision],
            len(hidden),
            members is not None,
            tuple(i * o for i, o in pairwise([*sizes, *([] if outputs is None else [outputs])])),
            torch.tensor([_SLOPES[activation]] * len(hidden) + [1.0] * (outputs is not None))
            if activation in _SLOPES
            else None,
        )
        self.in_order = [p for layer in stack for p in (layer.weight, layer.bias)]
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        """(S, B, I) -> (S, [K,] B, O), fp32."""
        if self.norms:
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = ACTIVATIONS[self.plan.activation][0](norm(layer(x)))
            return x if self.head is None else self.head(x)
        if torch.is_grad_enabled():
            run: Callable[..., Tensor] = _Layers.apply
        else:
            run = partial(forward, _Forgetful())
        return run(for_members(x, self.members), self.plan, *self.in_order).float()
