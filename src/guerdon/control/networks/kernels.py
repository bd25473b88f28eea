"""Fully connected networks in fp32 on a CPU, compiled: one call forward and one backward, for all networks of a stack.

Layers of control networks multiply some 128 rows by some 100 x 100 weights, for which BLAS libraries are not made: MKL
stays at a third of the peak on CPUs other than Intel's, oneDNN spends longer on finding its kernel than on running it,
and calls from Python cost as much again. Here a block of the product stays in registers while its rows of the left and
its columns of the right matrix go by (Goto and van de Geijn 2008, ACM TOMS 34(3)). This module imports numba.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import carray, extending, float32, int64, intp, njit, types, void
from numba.core import cgutils
from torch import Tensor

_LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8  # of a vector
_ROWS, _WIDTH = 8, 2 * _LANES  # of a block, whose sums fill half of the registers
_NEAR = 2**17  # bytes that are read where they are, whatever their order
_FEW = 4  # columns: rather a dot product for each number than blocks that are mostly cut away
_SIZE, _LINE = 4, 16  # bytes of a number, numbers in a line of the cache
_THERE, _KEEP, _BACK = 0, 1, 2  # the ways of a job: there, there with what hidden layers say kept, back
_FLOAT, _LANE, _ADDRESS = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, _LANES)
_intrinsic: Any = extending.intrinsic  # what it returns is called without its first argument
# Sums may be reordered, so that they vectorise; what is not finite stays so.
_compiled: Any = partial(
    njit, cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"}
)


class Tape(NamedTuple):
    """What the way back needs of the way there."""

    x: Tensor
    outputs: Tensor  # of all layers, (N, B, O) one after the other
    parameters: Sequence[Tensor]
    slopes: Tensor  # of every layer below 0
    job: list[int]  # where all of them lie, for `_forward`


def forward(x: Tensor, parameters: Sequence[Tensor], slopes: Tensor, keep: bool = True) -> tuple[Tensor, Tape | None]:
    """Through all layers y <- f(y W^T + b), with f(u) = u where u is positive and slope times u elsewhere.

    Args:
        x: (S, [K,] B, I), of S, or S x K, networks.
        parameters: weights (S, [K,] O, I) and biases (S, [K,] O) of one layer after the other; those of a network are
            contiguous.
        slopes: of every layer: 0 is ReLU, 1 is no activation.
        keep: what hidden layers say; if nothing goes back, it need not leave the cache.

    Returns:
        (S, [K,] B, O), and what `backward` needs if that was kept.
    """
    *lead, rows, inputs = x.shape
    n, members = prod(lead), 1 if len(lead) == 1 else lead[1]
    widths = [inputs, *(bias.shape[-1] for bias in parameters[1::2])]
    outputs = x.new_empty(n * rows * (sum(widths) - inputs if keep else widths[-1]))
    job = [n, rows, len(slopes), members, *(_SIZE * step for step in x.stride()[-2:])]
    job += [outputs.data_ptr(), slopes.data_ptr(), *widths]
    for t in (x, *parameters):
        seed, member = (t.stride(0), 0) if len(lead) == 1 else t.stride()[:2]
        job += [t.data_ptr(), _SIZE * seed, _SIZE * member]
    _compute(np.array([_KEEP if keep else _THERE, *job]), n)
    result = outputs[-n * rows * widths[-1] :].view(*lead, rows, widths[-1])
    return result, Tape(x, outputs, parameters, slopes, job) if keep else None


def backward(gradient: Tensor, tape: Tape, learns: bool, to_x: bool) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of the parameters (none unless `learns`) and, with `to_x`, of x, from that of the output."""
    gradient = gradient.contiguous()
    found = [p.new_empty(p.shape) for p in tape.parameters] if learns else []
    result = tape.x.new_empty(tape.x.shape) if to_x else None
    wanted = [0 if result is None else result.data_ptr(), *(t.data_ptr() for t in found)]
    _compute(np.array([_BACK, *tape.job, gradient.data_ptr(), *wanted]), tape.job[0])
    return found, result


class _Team:
    """Threads that take networks off the hands of whoever calls `forward` or `backward`.

    They wait for work in a compiled loop, since waking a thread takes as long as a small network; when there has been
    none for a while, they sleep. No call waits for one that has not begun: it does what nobody has taken.
    """

    def __init__(self, helpers: int) -> None:
        self._box = np.zeros(_BOX, np.int64)
        self._free, self._closed = Lock(), False
        self._bells = [Event() for _ in range(helpers)]
        self._threads = [Thread(target=self._work, args=(bell,), daemon=True) for bell in self._bells]
        for thread in self._threads:
            thread.start()

    def compute(self, job: np.ndarray) -> bool:
        """Whether the job is done: it is not where these threads are busy with another caller's."""
        if not self._free.acquire(blocking=False):
            return False
        try:
            if self._box[_AWAKE] < len(self._bells):
                for bell in self._bells:
                    bell.set()
            _lead(self._box, job)
        finally:
            self._free.release()
        return True

    def close(self) -> None:
        self._closed = True
        for bell, thread in zip(self._bells, self._threads, strict=True):
            bell.set()
            thread.join()

    def _work(self, bell: Event) -> None:
        while bell.wait():
            bell.clear()
            if self._closed:
                return
            _help(self._box)


_team: _Team | None = None  # who shares the networks of a call


@contextmanager
def shared(threads: int) -> Iterator[None]:
    """Within the block so many threads share the networks of a call."""
    global _team
    before, team = _team, _Team(threads - 1)
    _team = team
    try:
        yield
    finally:
        _team = before
        team.close()


def _compute(job: np.ndarray, n: int) -> None:
    if n == 1 or _team is None or not _team.compute(job):
        _alone(job)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _block(rows: int, vectors: int) -> Any:
    """A function that computes a block of `rows` x (`vectors` * `_LANES`) of a product."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        """f(start + a b), the numbers of a row of b side by side; all but the slope of f are addresses and strides."""
        a, a_row, a_column, b, b_row, inner, start, result, result_row, slope = args

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
            right = places(builder.add(b, builder.mul(loop.index, b_row)))
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
    def block(typing, a, a_row, a_column, b, b_row, inner, start, result, result_row, slope):  # type: ignore[no-untyped-def]
        return void(*[intp] * 9, float32), build

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


@_intrinsic
def _pointer(typing, address):  # type: ignore[no-untyped-def]
    return types.voidptr(intp), lambda context, builder, _, args: _at(builder, args[0], ir.IntType(8))


@_intrinsic
def _see(typing, address):  # type: ignore[no-untyped-def]
    """The integer at an address, and after it whatever its writer wrote before it."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_at(builder, args[0], _ADDRESS), "acquire", 8)

    return int64(intp), build


@_intrinsic
def _set(typing, address, value):  # type: ignore[no-untyped-def]
    """Write an integer for those who `_see` it."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _at(builder, args[0], _ADDRESS), "release", 8)
        return context.get_dummy_value()

    return void(intp, int64), build


@_intrinsic
def _add(typing, address, value):  # type: ignore[no-untyped-def]
    """Add to the integer at an address in one go; returns what it was."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _at(builder, args[0], _ADDRESS), args[1], "seq_cst")

    return int64(intp, int64), build


@_intrinsic
def _wait(typing):  # type: ignore[no-untyped-def]
    """Let others have the core, where the system can be told so."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if hasattr(os, "sched_yield"):
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(_LANE, ()), "sched_yield"), ())
        return context.get_dummy_value()

    return void(), build


@_compiled()
def _numbers(address, size):  # type: ignore[no-untyped-def]
    return carray(_pointer(address), size, np.float32)


@_compiled()
def _empty(size):  # type: ignore[no-untyped-def]
    """So many numbers, from where a line of the cache begins: a vector in two of them takes twice as long."""
    numbers = np.empty(size + _LINE, np.float32)
    first = -(numbers.ctypes.data // _SIZE) % _LINE
    return numbers[first : first + size]


@_compiled()
def _up(size):  # type: ignore[no-untyped-def]
    """The next multiple of a line of the cache."""
    return (size + _LINE - 1) // _LINE * _LINE


@_compiled()
def _room(job):  # type: ignore[no-untyped-def]
    """Memory for the work on one network after the other.

    It holds what `_backward` keeps, and for `_product` columns of b, of the bias, a block that is to be cut to size,
    and a in other order.
    """
    rows, most = job[2], max(job[9 : 10 + job[3]])
    return _empty(3 * _up(rows * most) + (_WIDTH + 1) * _up(most) + (2 * max(rows, most) + 1 + _ROWS) * _WIDTH)


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
def _dots(m, k, o, a, a_row, b, b_column, bias, slope, result):  # type: ignore[no-untyped-def]
    """`_product` where the numbers of a row of a lie side by side, and so do those of a column of b."""
    for r in range(m):
        x = _numbers(a + r * a_row, k)
        for c in range(o):
            y = _numbers(b + c * b_column, k)
            u = float32(0)
            for p in range(k):
                u += x[p] * y[p]
            if bias:
                u += _get(bias + _SIZE * c)
            _put(result + _SIZE * (r * o + c), u if u > 0 else u * slope)


@_compiled()
def _product(room, m, k, o, a, a_row, a_column, b, b_row, b_column, bias, slope, result):  # type: ignore[no-untyped-def]
    """f(a b + bias): a (m, k) times b (k, o), plus bias (o,) unless its address is 0; the result is contiguous."""
    if o <= _FEW and a_column == _SIZE and b_row == _SIZE:
        _dots(m, k, o, a, a_row, b, b_column, bias, slope, result)
        return
    line = _SIZE * _WIDTH
    panel = room.ctypes.data
    start = panel + line * k
    cut = start + line
    slabs = cut + line * _ROWS
    width = min(_WIDTH, o)
    if width < _WIDTH:
        room[: (k + 1) * _WIDTH] = 0
    slab, slab_row, slab_column = _WIDTH * a_row, a_row, a_column
    if a_row == _SIZE and a_column * k > _NEAR:  # its rows are far apart: they are brought together once
        for top in range(0, m, _WIDTH):
            _pack(min(_WIDTH, m - top), k, a + top * a_row, a_row, a_column, slabs + line * k * (top // _WIDTH))
        a, slab, slab_row, slab_column = slabs, line * k, _SIZE, line
    for at in range(0, o, _WIDTH):
        j = min(at, o - width)  # the last columns may have been computed before, and so may rows
        right, right_row = b + j * b_column, b_row
        if width < _WIDTH or b_column != _SIZE or b_row * k > _NEAR:
            _pack(width, k, right, b_column, b_row, panel)
            right, right_row = panel, line
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
                    _slim(row, slab_row, slab_column, right, right_row, k, start, to, step, slope)
                elif rows == _ROWS:
                    _tall(row, slab_row, slab_column, right, right_row, k, start, to, step, slope)
                elif rows > 1:
                    _low(row, slab_row, slab_column, right, right_row, k, start, to, step, slope)
                else:
                    _line(row, slab_row, slab_column, right, right_row, k, start, to, step, slope)
                if width < _WIDTH:
                    for r in range(rows):
                        for c in range(width):
                            _put(place + _SIZE * (r * o + c), _get(cut + line * r + _SIZE * c))


@_compiled()
def _of(each, members, tensors, i):  # type: ignore[no-untyped-def]
    """Where the part of a network begins in the i-th tensor (S, [K,] ...)."""
    return tensors[3 * i] + each // members * tensors[3 * i + 1] + each % members * tensors[3 * i + 2]


@_compiled()
def _forward(job, each, room):  # type: ignore[no-untyped-def]
    n, rows, layers, members, row, column, to = job[1], job[2], job[3], job[4], job[5], job[6], job[7]
    slopes, widths, tensors = _numbers(job[8], layers), job[9 : 10 + layers], job[10 + layers :]
    seen, size = _of(each, members, tensors, 0), _up(rows * max(widths))
    for layer in range(layers):
        i, o = widths[layer], widths[layer + 1]
        weight, bias = _of(each, members, tensors, 1 + 2 * layer), _of(each, members, tensors, 2 + 2 * layer)
        if job[0] == _KEEP or layer == layers - 1:
            here, to = to + _SIZE * each * rows * o, to + _SIZE * n * rows * o
        else:
            here = room[layer % 2 * size :].ctypes.data
        _product(room[2 * size :], rows, i, o, seen, row, column, weight, _SIZE, _SIZE * i, bias, slopes[layer], here)
        seen, row, column = here, _SIZE * o, _SIZE


@_compiled()
def _through_activation(gradient, y, slope, total):  # type: ignore[no-untyped-def]
    """Multiply the gradient (B, O) by that of the activation, whose outputs are y, and sum it over B into `total`."""
    total[:] = 0
    for row in range(len(y)):
        for c in range(len(total)):
            g = gradient[row, c] * (float32(1) if y[row, c] > 0 else slope)
            gradient[row, c] = g
            total[c] += g


@_compiled()
def _backward(job, each, room):  # type: ignore[no-untyped-def]
    n, rows, layers, members, at = job[1], job[2], job[3], job[4], job[7]
    slopes, widths, tensors = _numbers(job[8], layers), job[9 : 10 + layers], job[10 + layers :]
    rest = tensors[3 + 6 * layers :]
    gradient, to_x, found = rest[0], rest[1], rest[2:]
    most = max(widths)
    size, wide = _up(rows * most), _up(most)
    here, there = room[:size], room[size : 2 * size]  # gradients by what a layer says
    flipped, total, room = room[2 * size :], room[2 * size + _WIDTH * wide :], room[2 * size + (_WIDTH + 1) * wide :]
    o = widths[layers]
    here[: rows * o] = _numbers(gradient + _SIZE * each * rows * o, rows * o)
    for layer in range(layers):
        at += _SIZE * n * rows * widths[layer + 1]
    for layer in range(layers - 1, -1, -1):
        i, o = widths[layer], widths[layer + 1]
        at -= _SIZE * n * rows * o  # where the outputs of this layer begin
        y = _numbers(at + _SIZE * each * rows * o, rows * o).reshape(rows, o)
        _through_activation(here[: rows * o].reshape(rows, o), y, slopes[layer], total[:o])
        if layer:
            seen, row, column = at + _SIZE * (each - n) * rows * i, _SIZE * i, _SIZE
        else:
            seen, row, column = _of(each, members, tensors, 0), job[5], job[6]
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
            weight = _of(each, members, tensors, 1 + 2 * layer)
            to = there.ctypes.data if layer else to_x + _SIZE * each * rows * i
            _product(room, rows, o, i, g, _SIZE * o, _SIZE, weight, _SIZE * i, _SIZE, 0, one, to)
            here, there = there, here


@_compiled()
def _network(job, each, room):  # type: ignore[no-untyped-def]
    if job[0] == _BACK:
        _backward(job, each, room)
    else:
        _forward(job, each, room)


@_compiled(void(int64[::1]))
def _alone(job):  # type: ignore[no-untyped-def]
    room = _room(job)
    for each in range(job[1]):
        _network(job, each, room)


# Where threads tell one another what is left of a job (see `_parts`: in one word, so that nobody sees one part without
# the others), where the job lies, how many networks the helpers are done with, and how many of these are awake.
_WORD, _JOB, _LENGTH, _DONE, _AWAKE, _BOX = 0, 8, 9, 16, 24, 32
_BITS = 20
_LOOKS = 2**8  # for work before a thread lets others have its core
_PATIENCE = 2**22  # looks for work, some milliseconds, before a thread goes to sleep


@_compiled()
def _parts(word):  # type: ignore[no-untyped-def]
    """How many networks a job has, and how many of them were taken from its end and from its beginning."""
    return word >> 2 * _BITS, (word >> _BITS) & (2**_BITS - 1), word & (2**_BITS - 1)


@_compiled()
def _take(word, step):  # type: ignore[no-untyped-def]
    """The number of a network that nobody has taken, the first or the last of them, or -1."""
    n, last, first = _parts(_add(word, step))
    if first + last >= n:
        return -1
    return first if step == 1 else n - 1 - last


@_compiled(void(int64[::1], int64[::1]))
def _lead(box, job):  # type: ignore[no-untyped-def]
    """Compute all networks of a job with those who are awake: here from the first on, there from the last on."""
    word, done = box.ctypes.data + 8 * _WORD, box.ctypes.data + 8 * _DONE
    box[_JOB], box[_LENGTH] = job.ctypes.data, len(job)
    _set(done, 0)
    _set(word, job[1] << 2 * _BITS)
    own, room = 0, _room(job)
    each = _take(word, 1)
    while each >= 0:
        _network(job, each, room)
        own += 1
        each = _take(word, 1)
    looks = 0
    while _see(done) + own < job[1]:
        looks += 1
        if looks % _LOOKS == 0:
            _wait()


@_compiled(void(int64[::1]))
def _help(box):  # type: ignore[no-untyped-def]
    """Take networks of whatever job is in the box, until none has been for a while."""
    start = box.ctypes.data
    word, done, awake = start + 8 * _WORD, start + 8 * _DONE, start + 8 * _AWAKE
    _add(awake, 1)
    looks = 0
    while looks < _PATIENCE:
        n, last, first = _parts(_see(word))
        if first + last < n:
            each = _take(word, 1 << _BITS)
            if each >= 0:
                job = carray(_pointer(box[_JOB]), box[_LENGTH], np.int64)
                _network(job, each, _room(job))
                _add(done, 1)
                looks = 0
        looks += 1
        if looks % _LOOKS == 0:
            _wait()
    _add(awake, -1)
