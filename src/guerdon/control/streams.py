"""Random numbers with the seed axis: every seed has its own streams, so that none depends on who trains beside it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from guerdon.lazy import torch

_BLOCK = 8192  # numbers drawn at once for each seed: a draw of 256 costs a slice of it, and one in 32 a call of numpy

_DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda generator, n: generator.standard_normal(n, dtype=np.float32),
    "uniform": lambda generator, n: generator.random(n, dtype=np.float32),
    "integers": lambda generator, n: generator.random(n),  # float64 in [0, 1), so that no range outgrows it
}


def generator_of(seed: int, name: str) -> np.random.Generator:
    """The generator that belongs to one seed and one purpose, at its start."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


class Streams:
    """Named random streams, one for each seed and name.

    A stream is a function of its seed, its name and the sizes that were asked of it before, and of nothing else: not of
    the other seeds, nor of the other streams. Numbers are drawn in blocks; what a draw returns is a slice of a block
    that is never used again, so it may be changed in place.

    Args:
        seeds: of the S policies.
        device: where the numbers are wanted; blocks are copied there, not draws.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds, self.device = list(seeds), torch.device(device)
        self._blocks: dict[str, _Block] = {}
        self._generators: dict[tuple[str, int], np.random.Generator] = {}

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """Standard normal numbers (S, *shape), float32."""
        return self._draw("normal", name, shape)

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        """Numbers from [0, 1), (S, *shape), float32."""
        return self._draw("uniform", name, shape)

    def integers(self, name: str, high: int | Sequence[int] | torch.Tensor, *shape: int) -> torch.Tensor:
        """Whole numbers from [0, high), (S, *shape), int64; `high` may be one number for each seed."""
        unit = self._draw("integers", name, shape)
        if not isinstance(high, int):
            high = torch.as_tensor(high, device=unit.device).view(-1, *[1] * len(shape))
        return (unit * high).long()

    def generator(self, name: str, index: int) -> np.random.Generator:
        """numpy's generator of one seed (by its position), for draws that are rare or of another kind."""
        key = (name, index)
        if key not in self._generators:
            self._generators[key] = generator_of(self.seeds[index], f"generator/{name}")
        return self._generators[key]

    def _draw(self, kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        key = f"{kind}/{name}"
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(kind, [generator_of(seed, key) for seed in self.seeds], self.device)
        return block.take(prod(shape)).reshape(len(self.seeds), *shape)

    def state_dict(self) -> dict[str, Any]:
        """Where every stream stands, in plain data (JSON keeps it bit for bit)."""
        return {
            "seeds": self.seeds,
            "blocks": {key: block.state_dict() for key, block in self._blocks.items()},
            "generators": [[*key, g.bit_generator.state] for key, g in self._generators.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` stood, bit for bit."""
        self.seeds = list(state["seeds"])
        self._blocks, self._generators = {}, {}
        for key, stands in state["blocks"].items():
            block = _Block(key.partition("/")[0], [np.random.default_rng() for _ in self.seeds], self.device)
            block.load_state_dict(stands)
            self._blocks[key] = block
        for name, index, stands in state["generators"]:
            self.generator(name, index).bit_generator.state = stands


class _Block:
    """The numbers of one stream that are drawn already, (S, size), and how many of them are used."""

    def __init__(self, kind: str, generators: list[np.random.Generator], device: torch.device) -> None:
        self.draw, self.generators, self.device = _DRAWS[kind], generators, device
        self.size = self.used = 0
        self.fill()

    def fill(self) -> None:
        self.before = [generator.bit_generator.state for generator in self.generators]
        rows = [self.draw(generator, self.size) for generator in self.generators]
        self.numbers = torch.from_numpy(np.stack(rows)).to(self.device)

    def take(self, n: int) -> torch.Tensor:
        if self.used + n > self.size:
            self.size, self.used = max(_BLOCK, n), 0
            self.fill()
        self.used += n
        return self.numbers[:, self.used - n : self.used]

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "size": self.size, "used": self.used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for generator, stands in zip(self.generators, state["before"], strict=True):
            generator.bit_generator.state = stands
        self.size, self.used = state["size"], state["used"]
        self.fill()
