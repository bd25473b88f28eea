"""Processes that hold the same weights: each computes the gradient of its share of a batch, and the shares are summed.

The loss is divided by totals that are counted over the global batch, so a sum of gradients (not a mean) over processes
is the gradient of one process. What is supported is data parallelism with replicated weights, on CPU (gloo) or GPU
(nccl), on one machine or several, launched by `accelerate launch` (see recipes/accelerate) or `torchrun`. Launches that
ask accelerate to shard weights (FSDP, DeepSpeed) are refused, because these processes would replicate them.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

from guerdon.errors import ConfigError
from guerdon.lazy import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Distribution:
    """This process among its peers. With one process every method returns at once and nothing is imported.

    Attributes:
        rank: 0 to world - 1.
        world: number of processes.
        device: where this process computes, in torch's notation.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @classmethod
    def start(cls) -> Distribution:
        """Join the processes that the launcher started, or be the only one.

        Raises:
            ConfigError: the launcher was told to shard weights, or accelerate is not installed.
        """
        for kind in ("FSDP", "DEEPSPEED"):
            if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
                raise ConfigError(
                    f"accelerate was launched with {kind}, but guerdon replicates weights and cannot shard them: "
                    "launch with recipes/accelerate/ddp.yaml, and train large models with --lora-rank."
                )
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device="cuda" if torch.cuda.is_available() else "cpu")
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ConfigError(
                "several processes need accelerate: `pip install 'guerdon[distributed]'` installs it."
            ) from error
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, str(state.device))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def shard(self, items: Sequence[T], size: Callable[[T], float] = attrgetter("unique_tokens")) -> list[T]:
        """This process's items, in their order; every item goes to exactly one process.

        The largest items are dealt first, each to the process that has least, so that the processes finish together.
        """
        if self.world == 1:
            return list(items)
        loads = [(0.0, rank) for rank in range(self.world)]
        mine = []
        for index in sorted(range(len(items)), key=lambda i: -size(items[i])):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + size(items[index]), rank))
            if rank == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]

    def reduce_gradients(self, gradient: torch.Tensor) -> None:
        """Sum `MasterAdamW.gradient` over the processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(gradient)

    def reduce_metrics(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the global batch from this process's part of it.

        Args:
            sums: name -> sum of values here. Processes may have seen different names.
            counts: name -> number of values in that sum: the result is their mean. Names without a count are shares
                of a total (such as a loss): the result is their sum. Metrics of no value at all are left out.
        """
        totals: dict[str, float] = {}
        numbers: dict[str, float] = {}
        for part, count in self.gather_objects([(dict(sums), dict(counts))]):
            for into, values in ((totals, part), (numbers, count)):
                for name, value in values.items():
                    into[name] = into.get(name, 0) + value
        return {name: total / numbers.get(name, 1) for name, total in totals.items() if numbers.get(name, 1)}

    def gather_objects(self, items: list[T]) -> list[T]:
        """The items of all processes, those of rank 0 first; the same list everywhere. Items travel by pickle."""
        if self.world == 1:
            return list(items)
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(self.gather_objects([flag]))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier()
