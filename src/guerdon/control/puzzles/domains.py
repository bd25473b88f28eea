"""The puzzles by name: `cube3`, `lightsout7`, `puzzle15`, `pancake8`, and with meta-actions `cube3?meta=3`."""

from __future__ import annotations

import itertools
import math
import re
from functools import cache

import numpy as np

from guerdon.control.puzzles.puzzle import Puzzle
from guerdon.errors import ConfigError, near

PREFIX = "puzzle:"
_NAMES = ("cube2", "cube3", "lightsout3", "lightsout7", "puzzle8", "puzzle15", "puzzle24", "pancake8")


@cache
def make_puzzle(name: str) -> Puzzle:
    """A puzzle by name, with or without `puzzle:` before it.

        cubeN       Rubik's cube of 2 or 3 layers, by quarter turns: 12 moves of cube3; the 6 of cube2 leave one corner
                    in its place, which takes away the turns of the whole cube
        lightsoutN  N x N lamps; a press flips a lamp and its neighbours, and all are to be off
        puzzleN     N tiles and a blank in a square (N = 8, 15, 24, ...); the blank moves up, down, left or right, and
                    against a wall it stays where it is
        pancakeN    a stack of N that is to be sorted by flips of its first 2 to N

    `?meta=D` adds all sequences of up to D moves as moves of their own (`Puzzle.with_meta`).

    Raises:
        ConfigError: no such puzzle (with a near name), or a size that it cannot have.
    """
    plain, _, query = name.removeprefix(PREFIX).partition("?")
    depth = re.fullmatch(r"meta=([1-9])", query) if query else None
    if query and depth is None:
        raise ConfigError(f"{name}: after the ? of a puzzle comes meta=D, D from 1 to 9, and not '{query}'.")
    found = re.fullmatch(r"(cube|lightsout|puzzle|pancake)(\d+)", plain)
    if found is None:
        raise ConfigError(f"no puzzle is called '{plain}'.{near(plain, _NAMES)} There are {', '.join(_NAMES)}, ...")
    family, size = found[1], int(found[2])
    if family == "puzzle" and math.isqrt(size + 1) ** 2 == size + 1 and 3 <= size < 256:
        puzzle = _sliding(math.isqrt(size + 1))
    elif family == "cube" and size in (2, 3):
        puzzle = _cube(size)
    elif family == "lightsout" and 2 <= size <= 15:
        puzzle = _lights_out(size)
    elif family == "pancake" and 2 <= size <= 255:
        puzzle = _pancakes(size)
    else:
        sizes = {"cube": "2 or 3 layers", "lightsout": "2 to 15 rows", "pancake": "2 to 255 pancakes"}
        raise ConfigError(f"there is no {plain}: it has {sizes.get(family, '3, 8, 15, 24, 35, 48, ... tiles')}.")
    return puzzle if depth is None or depth[1] == "1" else puzzle.with_meta(int(depth[1]))


def _cube(n: int) -> Puzzle:
    """Stickers in the order of the faces +x, -x, +y, -y, +z, -z, each with its face's number as colour."""
    ends = range(1 - n, n, 2)  # coordinates of the layers, twice as far from each other as they are wide
    faces = [tuple(sign * e for e in row) for row in np.eye(3, dtype=int).tolist() for sign in (1, -1)]
    stickers = [
        (position, face)
        for face in faces
        for position in itertools.product(ends, repeat=3)
        if sum(p * f for p, f in zip(position, face, strict=True)) == n - 1
    ]
    number = {sticker: i for i, sticker in enumerate(stickers)}
    moves, names = [], []
    for face, letter in list(zip(faces, "RLUDFB", strict=True))[:: 1 if n == 3 else 2]:
        for turn, prime in ((1, "'"), (-1, "")):  # seen from outside a turn by the right hand is anticlockwise
            names.append(letter + prime)
            move = np.arange(len(stickers))
            for (position, normal), i in number.items():
                if np.dot(position, face) == n - 1:
                    move[number[_turned(position, face, turn), _turned(normal, face, turn)]] = i
            moves.append(move)
    colours = np.repeat(np.arange(6), n * n)
    inverse = [a ^ 1 for a in range(len(moves))]
    return Puzzle.of(f"cube{n}", colours, np.array(moves)[None], inverse, 30 if n == 3 else 20, names=names)


def _turned(vector: tuple[int, ...], axis: tuple[int, ...], turn: int) -> tuple[int, ...]:
    """A vector after a quarter turn about an axis: what is along the axis stays, the rest goes to axis x vector."""
    return tuple(turn * np.cross(axis, vector) + np.multiply(axis, np.dot(axis, vector)))


def _lights_out(n: int) -> Puzzle:
    row, column = np.divmod(np.arange(n * n), n)
    distance = np.abs(row[:, None] - row) + np.abs(column[:, None] - column)
    flips = (distance <= 1)[None]
    moves = np.broadcast_to(np.arange(n * n), flips.shape)
    names = [f"{r + 1},{c + 1}" for r, c in zip(row, column, strict=True)]
    return Puzzle.of(f"lightsout{n}", np.zeros(n * n), moves, range(n * n), n * n, flips=flips, names=names)


def _sliding(n: int) -> Puzzle:
    """Tiles 1, 2, ... and the blank 0, at last in the last place."""
    count = n * n
    moves = np.tile(np.arange(count), (count, 4, 1))
    for z in range(count):
        row, column = divmod(z, n)
        for a, (down, right) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            if 0 <= row + down < n and 0 <= column + right < n:
                tile = z + down * n + right
                moves[z, a, [z, tile]] = tile, z
    goal = np.append(np.arange(1, count), 0)
    names = ("up", "down", "left", "right")
    return Puzzle.of(f"puzzle{count - 1}", goal, moves, [1, 0, 3, 2], 500 if n > 3 else 100, names=names)


def _pancakes(n: int) -> Puzzle:
    moves = np.array([[*range(k - 1, -1, -1), *range(k, n)] for k in range(2, n + 1)])[None]
    return Puzzle.of(f"pancake{n}", np.arange(n), moves, range(n - 1), n + 3, names=[str(k) for k in range(2, n + 1)])
