"""Models whose weights are spread over the processes (FSDP2): each holds a share and gathers a layer while it computes.

Gathering takes all processes at once, so that they must pass through a model equally often: `in_step` sees to that.
Trained weights stay in fp32, where the optimiser finds them, and are gathered in the precision of the run; gradients
are summed in fp32, not averaged, since each process's loss is a share of the global one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from guerdon.language.forward import GroupModel, Outputs
from guerdon.language.groups import Group
from guerdon.language.packing import pack

IDLE = [Group.of([0], [[0]])]  # the micro-batch of a process that has none, while others have one more


def shard(model: GroupModel, dtype: torch.dtype, device: str) -> None:
    """Leave in this process, on `device`, its share of each weight of a model that is the same in all processes.

    Args:
        dtype: of the gathered weights, and so of the matmuls.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    mesh = torch.distributed.init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    base = model.model.get_base_model() if hasattr(model.model, "get_base_model") else model.model
    layers = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
    for part in (*layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.sharded = dtype
    with torch.no_grad():  # FSDP takes what runs first for the root, and samplers run the layers alone
        model(pack(IDLE, model.device))


def in_step(model: GroupModel, batches: Iterable[list[Group]]) -> Iterator[list[Group]]:
    """These micro-batches, then `IDLE` until every process that shares the weights has had as many."""
    if model.sharded is None:
        yield from batches
        return
    mine = list(batches)
    most = torch.tensor(len(mine), device=model.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    yield from mine
    yield from [IDLE] * (int(most) - len(mine))


def idle_loss(outputs: Outputs) -> torch.Tensor:
    """0, with a backward pass through the whole model."""
    total = torch.stack([x.sum() for x in vars(outputs).values() if x is not None]).sum()
    return 0 * total


@contextmanager
def whole(model: GroupModel) -> Iterator[None]:
    """Hold all weights of a sharded model in every process, which then pass through it as often as they like."""
    if model.sharded is None:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
