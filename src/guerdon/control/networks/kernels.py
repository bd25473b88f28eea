"""Fully connected networks in fp32 on a CPU, compiled: one call forward and one backward, for all networks of a stack.

Layers of control networks multiply some 128 rows by some 100 x 100 weights, for which BLAS libraries are not made: MKL
stays at a third of the peak on CPUs other than Intel's, oneDNN spends longer on finding its kernel than on running it,
and calls from Python cost as much again. Here a block of the product stays in registers while its rows of the left and
its columns of the right matrix go by (Goto and van de Geijn 2008, ACM TOMS 34(3)). This module imports numba.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import binding, ir
from numba import extending, float32, int64, intp, njit, void
from numba.core import cgutils
from torch import Tensor

_LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8  # of a vector
_ROWS, _WIDTH = 8, 2 * _LANES  # of a block, whose sums fill half of the registers
_SIZE = 4  # bytes of a number
_SHARED_FROM = 2**26  # multiplications that are worth waking other threads for
threads = 1  # in which different networks may be computed
_FLOAT, _LANE, _ADDRESS = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, _LANES)
_intrinsic: Any = extending.intrinsic  # what it returns is called without its first argument
# Sums may be reordered, so that they vectorise; what is not finite stays so.
_compiled: Any = partial(
    njit, cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"}
)


class Tape(NamedTuple):
    """What the way back needs of the way there; addresses are good as long as the tensors live."""

    x: Tensor
    outputs: np.ndarray  # of all layers, (N, B, O) one after the other
    widths: list[int]  # inputs of the first layer, outputs of every layer
    addresses: np.ndarray  # of every weight and bias: where it begins, and bytes from network to network
    slopes: np.ndarray  # of every layer below 0


def forward(x: Tensor, parameters: Sequence[Tensor], slopes: np.ndarray) -> tuple[Tensor, Tape]:
    """Through all layers y <- f(y W^T + b), with f(u) = u where u is positive and slope times u elsewhere.

    Args:
        x: (N, B, I).
        parameters: weights (N, O, I) and biases (N, O) of one layer after the other, each contiguous but for N.
        slopes: of every layer: 0 is ReLU, 1 is no activation.

    Returns:
        (N, B, O), and what `backward` needs.
    """
    n, rows, inputs = x.shape
    widths = [inputs, *(bias.shape[1] for bias in parameters[1::2])]
    outputs = np.empty(n * rows * (sum(widths) - inputs), np.float32)
    addresses = np.array([number for p in parameters for number in (p.data_ptr(), _SIZE * p.stride(0))]).reshape(-1, 2)
    strides = (_SIZE * step for step in x.stride())
    _share(_forward, n, rows, np.array(widths), x.data_ptr(), *strides, addresses, slopes, outputs)
    result = torch.from_numpy(outputs[-n * rows * widths[-1] :]).view(n, rows, -1)
    return result, Tape(x, outputs, widths, addresses, slopes)


def backward(gradient: Tensor, tape: Tape, learns: bool, to_x: bool) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of the parameters (none unless `learns`) and, with `to_x`, of x, from that of the output (N, B, O)."""
    x, widths = tape.x, tape.widths
    n, rows, inputs = x.shape
    shapes = [shape for i, o in pairwise(widths) for shape in ((n, o, i), (n, o))] if learns else []
    found = [x.new_empty(shape) for shape in shapes]
    result = x.new_empty(n, rows, inputs) if to_x else None
    _share(
        _backward,
        n,
        rows,
        np.array(widths),
        x.data_ptr(),
        *(_SIZE * s for s in x.stride()),
        tape.addresses,
        tape.slopes,
        tape.outputs,
        gradient.contiguous().view(-1).numpy(),
        np.array([t.data_ptr() for t in found], np.int64),
        0 if result is None else result.data_ptr(),
    )
    return found, result


def _share(compute: Callable[..., None], n: int, rows: int, widths: np.ndarray, *arguments: Any) -> None:
    """`compute` all n networks, in several threads where these may be used and there is enough to do for them."""
    parts = min(n, threads)
    if parts == 1 or n * rows * int(widths[1:] @ widths[:-1]) < _SHARED_FROM:
        compute(0, n, n, rows, widths, *arguments)
        return
    bounds = [n * part // parts for part in range(parts + 1)]
    others = [_pool().submit(compute, *some, n, rows, widths, *arguments) for some in pairwise(bounds[1:])]
    compute(0, bounds[1], n, rows, widths, *arguments)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "networks")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _block(rows: int, vectors: int) -> Any:
    """A function that computes a block of `rows` x (`vectors` * `_LANES`) of a product."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        """f(start + a b), the rows of b `_WIDTH` numbers apart; all but the slope of f are addresses and strides."""
        a, a_row, a_column, b, inner, start, result, result_row, slope = args

        def places(address: Any) -> list[Any]:
            return [_at(builder, builder.add(address, _ADDRESS(_SIZE * _LANES * i)), _VECTOR) for i in range(vectors)]

        def everywhere(x: Any) -> Any:
            nothing = ir.Constant(_VECTOR, ir.Undefined)
            one = builder.insert_element(nothing, x, _LANE(0))
            return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_LANE, _LANES), [0] * _LANES))

        sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(vectors)] for _ in range(rows)]  # registers
        for row in sums:
            for place, own in zip(places(start), row, strict=True):
                builder.store(builder.load(place, align=_SIZE), own)
        with cgutils.for_range(builder, inner) as loop:
            right = places(builder.add(b, builder.mul(loop.index, _ADDRESS(_SIZE * _WIDTH))))
            right = [builder.load(place, align=_SIZE) for place in right]
            column = builder.add(a, builder.mul(loop.index, a_column))
            for r, row in enumerate(sums):
                x = _at(builder, builder.add(column, builder.mul(_ADDRESS(r), a_row)), _FLOAT)
                x = everywhere(builder.load(x, align=_SIZE))
                for own, y in zip(row, right, strict=True):
                    term = builder.fmul(x, y, flags=("contract",))
                    builder.store(builder.fadd(builder.load(own), term, flags=("contract",)), own)
        zero, slope = ir.Constant(_VECTOR, [0.0] * _LANES), everywhere(slope)
        for r, row in enumerate(sums):
            for own, place in zip(row, places(builder.add(result, builder.mul(_ADDRESS(r), result_row))), strict=True):
                u = builder.load(own)
                below = builder.fcmp_ordered("<", u, zero)
                builder.store(builder.select(below, builder.fmul(u, slope), u), place, align=_SIZE)
        return context.get_dummy_value()

    @_intrinsic
    def block(typing, a, a_row, a_column, b, inner, start, result, result_row, slope):  # type: ignore[no-untyped-def]
        return void(*[intp] * 8, float32), build

    return block


_tall, _low, _line, _slim = _block(_ROWS, 2), _block(_ROWS // 2, 2), _block(1, 2), _block(_ROWS, 1)


@_intrinsic
def _transpose(typing, source, step, target):  # type: ignore[no-untyped-def]
    """Write `_LANES` rows of `_LANES` numbers, `step` bytes apart, as columns of what has `_WIDTH` numbers in a row."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, step, target = args
        places = [_at(builder, builder.add(source, builder.mul(_ADDRESS(r), step)), _VECTOR) for r in range(_LANES)]
        rows = [builder.load(place, align=_SIZE) for place in places]
        for d in (1 << bit for bit in range(_LANES.bit_length() - 1)):  # blocks of d x d change their places
            low = [j if not j & d else _LANES + j - d for j in range(_LANES)]
            high = [j + d if not j & d else _LANES + j for j in range(_LANES)]
            low, high = (ir.Constant(ir.VectorType(_LANE, _LANES), order) for order in (low, high))
            for r in (r for r in range(_LANES) if not r & d):
                a, b = rows[r], rows[r + d]
                rows[r], rows[r + d] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
        for c, row in enumerate(rows):
            place = _at(builder, builder.add(target, _ADDRESS(_SIZE * _WIDTH * c)), _VECTOR)
            builder.store(row, place, align=_SIZE)
        return context.get_dummy_value()

    return void(intp, intp, intp), build


@_intrinsic
def _get(typing, address):  # type: ignore[no-untyped-def]
    """The number at an address."""
    return float32(intp), lambda context, builder, _, args: builder.load(_at(builder, args[0], _FLOAT), align=_SIZE)


@_intrinsic
def _put(typing, address, value):  # type: ignore[no-untyped-def]
    """Write a number to an address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _at(builder, args[0], _FLOAT), align=_SIZE)
        return context.get_dummy_value()

    return void(intp, float32), build


@_intrinsic
def _copy(typing, source, target):  # type: ignore[no-untyped-def]
    """Copy `_WIDTH` numbers from address to address."""
    kind = ir.VectorType(_FLOAT, _WIDTH)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (_at(builder, address, kind) for address in args)
        builder.store(builder.load(source, align=_SIZE), target, align=_SIZE)
        return context.get_dummy_value()

    return void(intp, intp), build


@_compiled()
def _room(m, k):  # type: ignore[no-untyped-def]
    """Where `_product` keeps columns of b, of the bias, a block that is to be cut to size, and a in other order."""
    return np.empty((k + 1 + _ROWS + k * (m // _WIDTH + 1)) * _WIDTH, np.float32)


@_compiled()
def _pack(m, k, x, step, along, to):  # type: ignore[no-untyped-def]
    """Of x (m, k), at most `_WIDTH` of the m side by side for each of the k; `step` and `along` are its strides."""
    line = _SIZE * _WIDTH
    if step == _SIZE and m == _WIDTH:
        for p in range(k):
            _copy(x + p * along, to + line * p)
    elif along == _SIZE and m >= _LANES and k >= _LANES:
        for left in range(0, m, _LANES):
            r = min(left, m - _LANES)
            for top in range(0, k, _LANES):
                p = min(top, k - _LANES)
                _transpose(x + r * step + p * along, step, to + line * p + _SIZE * r)
    else:
        for p in range(k):
            for r in range(m):
                _put(to + line * p + _SIZE * r, _get(x + p * along + r * step))


@_compiled()
def _product(room, m, k, o, a, a_row, a_column, b, b_row, b_column, bias, slope, result):  # type: ignore[no-untyped-def]
    """f(a b + bias): a (m, k) times b (k, o), plus bias (o,) unless its address is 0; the result is contiguous."""
    line = _SIZE * _WIDTH
    panel = room.ctypes.data
    start = panel + line * k
    cut = start + line
    slabs = cut + line * _ROWS
    width = min(_WIDTH, o)
    if width < _WIDTH:
        room[: (k + 1) * _WIDTH] = 0
    slab, slab_row, slab_column = _WIDTH * a_row, a_row, a_column
    if a_row == _SIZE and a_column != _SIZE:  # its rows are apart: they are brought together once
        for top in range(0, m, _WIDTH):
            _pack(min(_WIDTH, m - top), k, a + top * a_row, a_row, a_column, slabs + line * k * (top // _WIDTH))
        a, slab, slab_row, slab_column = slabs, line * k, _SIZE, line
    for at in range(0, o, _WIDTH):
        j = min(at, o - width)  # the last columns may have been computed before, and so may rows
        _pack(width, k, b + j * b_column, b_column, b_row, panel)
        for c in range(width):
            _put(start + _SIZE * c, _get(bias + _SIZE * (j + c)) if bias else float32(0))
        for top in range(0, m, _WIDTH):
            height = min(_WIDTH, m - top)
            rows = _ROWS if height >= _ROWS else _ROWS // 2 if height >= _ROWS // 2 else 1
            for down in range(0, height, rows):
                i = min(down, height - rows)
                place = result + _SIZE * ((top + i) * o + j)
                to, step = (place, _SIZE * o) if width == _WIDTH else (cut, line)
                row = a + top // _WIDTH * slab + i * slab_row
                if rows == _ROWS and width <= _LANES:
                    _slim(row, slab_row, slab_column, panel, k, start, to, step, slope)
                elif rows == _ROWS:
                    _tall(row, slab_row, slab_column, panel, k, start, to, step, slope)
                elif rows > 1:
                    _low(row, slab_row, slab_column, panel, k, start, to, step, slope)
                else:
                    _line(row, slab_row, slab_column, panel, k, start, to, step, slope)
                if width < _WIDTH:
                    for r in range(rows):
                        for c in range(width):
                            _put(place + _SIZE * (r * o + c), _get(cut + line * r + _SIZE * c))


@_compiled(void(*[intp] * 4, int64[::1], *[intp] * 4, int64[:, ::1], float32[::1], float32[::1]))
def _forward(begin, end, n, rows, widths, x, x_each, x_row, x_column, parameters, slopes, outputs):  # type: ignore[no-untyped-def]
    room = _room(rows, max(widths))
    for each in range(begin, end):
        seen, row, column, to = x + each * x_each, x_row, x_column, outputs.ctypes.data
        for layer in range(len(slopes)):
            i, o = widths[layer], widths[layer + 1]
            weight, weight_each = parameters[2 * layer]
            bias, bias_each = parameters[2 * layer + 1]
            weight, bias, here = weight + each * weight_each, bias + each * bias_each, to + _SIZE * each * rows * o
            _product(room, rows, i, o, seen, row, column, weight, _SIZE, _SIZE * i, bias, slopes[layer], here)
            seen, row, column, to = here, _SIZE * o, _SIZE, to + _SIZE * n * rows * o


@_compiled()
def _through_activation(gradient, y, slope, total):  # type: ignore[no-untyped-def]
    """Multiply the gradient (B, O) by that of the activation, whose outputs are y, and sum it over B into `total`."""
    total[:] = 0
    for row in range(len(y)):
        for c in range(len(total)):
            g = gradient[row, c] * (float32(1) if y[row, c] > 0 else slope)
            gradient[row, c] = g
            total[c] += g


@_compiled(
    void(
        *[intp] * 4, int64[::1], *[intp] * 4, int64[:, ::1], float32[::1], float32[::1], float32[::1], int64[::1], intp
    )
)
def _backward(  # type: ignore[no-untyped-def]
    begin, end, n, rows, widths, x, x_each, x_row, x_column, parameters, slopes, outputs, gradient, found, to_x
):
    layers, most = len(slopes), max(widths)
    room = _room(max(most, rows), max(most, rows))
    here, there = np.empty(rows * most, np.float32), np.empty(rows * most, np.float32)  # gradients by what a layer says
    flipped = np.empty(_WIDTH * most, np.float32)
    total = np.empty(most, np.float32)
    for each in range(begin, end):
        o, at = widths[layers], len(outputs)
        here[: rows * o] = gradient[each * rows * o : (each + 1) * rows * o]
        for layer in range(layers - 1, -1, -1):
            i, o = widths[layer], widths[layer + 1]
            at -= n * rows * o  # where the outputs of this layer begin
            y = outputs[at + each * rows * o : at + (each + 1) * rows * o].reshape(rows, o)
            _through_activation(here[: rows * o].reshape(rows, o), y, slopes[layer], total[:o])
            if layer:
                seen = outputs[at + (each - n) * rows * i :].ctypes.data
                row, column = _SIZE * i, _SIZE
            else:
                seen, row, column = x + each * x_each, x_row, x_column
            g, one = here.ctypes.data, float32(1)
            if len(found):
                weight, bias = found[2 * layer] + _SIZE * each * o * i, found[2 * layer + 1] + _SIZE * each * o
                if i < _WIDTH <= o:  # a block would be wider than the product: rather its transpose
                    _product(room, i, rows, o, seen, column, row, g, _SIZE * o, _SIZE, 0, one, flipped.ctypes.data)
                    for r in range(o):
                        for c in range(i):
                            _put(weight + _SIZE * (r * i + c), flipped[c * o + r])
                else:
                    _product(room, o, rows, i, g, _SIZE, _SIZE * o, seen, row, column, 0, one, weight)
                for c in range(o):
                    _put(bias + _SIZE * c, total[c])
            if layer or to_x:
                weight = parameters[2 * layer, 0] + each * parameters[2 * layer, 1]
                to = there.ctypes.data if layer else to_x + _SIZE * each * rows * i
                _product(room, rows, o, i, g, _SIZE * o, _SIZE, weight, _SIZE * i, _SIZE, 0, one, to)
                here, there = there, here
