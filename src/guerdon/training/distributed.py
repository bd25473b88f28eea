"""Processes that share the work: each computes the gradient of its share of a batch, and the shares are summed.

The loss is divided by totals that are counted over the global batch, so a sum of gradients (not a mean) over processes
is the gradient of one process. Processes hold the same weights, or each a shard of the weights and of the optimiser's
state where `accelerate launch` was told to use FSDP2; on CPU (gloo) or GPU (nccl), on one machine or several (see
recipes/accelerate; `torchrun` works as well).
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from guerdon.errors import ConfigError
from guerdon.lazy import torch

if TYPE_CHECKING:
    from guerdon.language.forward import GroupModel

T = TypeVar("T")

FSDP = {  # options of an FSDP launch that would change something, and the value that describes what guerdon does
    "version": "2",
    "reshard_after_forward": "true",
    "offload_params": "false",
    "cpu_ram_efficient_loading": "false",
    "activation_checkpointing": "false",
}


@dataclass(frozen=True)
class Distribution:
    """This process among its peers. With one process every method returns at once and nothing is imported.

    Attributes:
        rank: 0 to world - 1.
        world: number of processes.
        device: where this process computes, in torch's notation.
        sharded: whether processes hold shards of the models and optimisers in training, and not copies.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    sharded: bool = False

    @classmethod
    def start(cls) -> Distribution:
        """Join the processes that the launcher started, or be the only one.

        Raises:
            ConfigError: the launcher was told to shard weights in a way that guerdon cannot, or accelerate is not
                installed.
        """
        if _asked("DEEPSPEED"):
            raise ConfigError(
                "accelerate was launched with DeepSpeed, which guerdon does not run: FSDP2 shards weights, gradients "
                "and optimiser state like its ZeRO 3; launch with recipes/accelerate/fsdp2.yaml."
            )
        if sharded := _asked("FSDP"):
            _check_fsdp()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device="cuda" if torch.cuda.is_available() else "cpu")
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ConfigError(
                "several processes need accelerate: `pip install 'guerdon[distributed]'` installs it."
            ) from error
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, str(state.device), sharded)

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

    def place(self, model: GroupModel, precision: str) -> GroupModel:
        """The model on this process's device in the precision of a run: a copy, or this process's shard of it."""
        if not self.sharded:
            from guerdon.language.policy import cast

            cast(model, precision)
            return model.to(self.device)
        from guerdon.language.sharding import shard

        shard(model, torch.bfloat16 if precision == "bf16" else torch.float32, self.device)
        return model

    def reduce_gradients(self, gradient: torch.Tensor) -> None:
        """Sum `MasterAdamW.gradient` over the processes, in place; shards are summed by the backward pass already."""
        if self.world > 1 and not self.sharded:
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


def _asked(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def _check_fsdp() -> None:
    for name, ours in FSDP.items():
        found = os.environ.get(f"FSDP_{name.upper()}", ours).lower()
        if found != ours:
            raise ConfigError(
                f"accelerate was launched with fsdp_{name}: {found}, and guerdon shards with fsdp_{name}: {ours}: "
                "launch with recipes/accelerate/fsdp2.yaml. --gradient-checkpointing recomputes activations."
            )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        raise ConfigError(f"sharded training needs torch 2.13, and this is {torch.__version__}: upgrade torch.")
