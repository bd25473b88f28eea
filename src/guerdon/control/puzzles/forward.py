"""The network of `CostToGo` on few states, compiled: torch takes longer to be called than these products take.

Every layer's input is a list of what is not zero in it: the places of a state's ones, and then what a relu let through.
This module imports numba.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numba import njit

_compiled = njit(cache=True, error_model="numpy", fastmath={"contract"})
_ROWS = 4  # of a weight that are added at once


def forward(
    layers: Sequence[tuple[np.ndarray, np.ndarray]], stem: int, values: int
) -> Callable[[np.ndarray], np.ndarray]:
    """States (N, L) uint8 below `values` to outputs (N, O) float32, at least 0.

    Args:
        layers: weight (O, I) and bias (O,) of each. The first `stem` come one after another, the last is the head, and
            those between are residual blocks of two.
    """
    parameters = np.concatenate([part.ravel() for weight, bias in layers for part in (weight.T, bias)])
    widths = np.array([weight.shape[::-1] for weight, _ in layers])

    def found(states: np.ndarray) -> np.ndarray:
        out = np.empty((len(states), widths[-1, 1]), np.float32)
        _forward(states, values, parameters, widths, stem, out)
        return out

    return found


@_compiled
def _forward(states, values, parameters, widths, stem, out):
    x, y = np.empty(widths[:, 1].max(), np.float32), np.empty(widths[:, 1].max(), np.float32)
    room = max(states.shape[1], len(x)) + _ROWS
    places, numbers = np.empty(room, np.int64), np.empty(room, np.float32)
    for n in range(len(states)):
        count, at = states.shape[1], 0
        for j in range(count):
            places[j], numbers[j] = j * values + states[n, j], 1
        for k in range(stem):
            x[:] = 0
            at, count = _add(places, numbers, count, parameters, at, widths[k, 0], x[: widths[k, 1]])
        width = widths[stem - 1, 1]
        for _ in range(stem, len(widths) - 1, 2):
            y[:] = 0
            at, count = _add(places, numbers, count, parameters, at, width, y[:width])
            at, count = _add(places, numbers, count, parameters, at, width, x[:width])
        out[n] = 0
        _add(places, numbers, count, parameters, at, width, out[n])


@_compiled
def _add(places, numbers, count, parameters, at, inputs, y):
    """y <- relu(y + W x + b), for x with so many numbers at these places, which are then told of y.

    Returns where the next layer's parameters begin, and the count.
    """
    width = len(y)
    bias = at + inputs * width
    for o in range(width):
        y[o] += parameters[bias + o]
    places[count : count + _ROWS], numbers[count : count + _ROWS] = 0, 0
    for k in range(0, count, _ROWS):
        a, b, c, d = numbers[k], numbers[k + 1], numbers[k + 2], numbers[k + 3]
        w0, w1 = _row(parameters, at, width, places[k]), _row(parameters, at, width, places[k + 1])
        w2, w3 = _row(parameters, at, width, places[k + 2]), _row(parameters, at, width, places[k + 3])
        for o in range(width):
            y[o] += a * w0[o] + b * w1[o] + c * w2[o] + d * w3[o]
    count = 0
    for o in range(width):
        if y[o] < 0:  # nan is not, and goes on
            y[o] = 0
        places[count], numbers[count] = o, y[o]
        count += y[o] != 0
    return bias + width, count


@_compiled
def _row(parameters, at, width, place):
    return parameters[at + place * width : at + (place + 1) * width]
