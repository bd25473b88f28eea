"""One process of a pair: gradients, metrics and objects of its share, written by the main one to `sys.argv[1]`."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from guerdon.training.distributed import Distribution
from guerdon.training.optim import MasterAdamW

SIZES = [5, 3, 9, 1, 1, 7, 2]


def gradients(distribution: Distribution) -> dict[str, torch.Tensor]:
    """Three steps on items of uneven sizes; in the last one there are fewer items than processes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(torch.bfloat16)
    optimizer = MasterAdamW(model.named_parameters(), lr=1e-2)
    found: dict[str, torch.Tensor] = {}
    for step, sizes in enumerate([SIZES, SIZES[::-1], [4]]):
        items = [torch.randn(size, 4, dtype=torch.bfloat16) for size in sizes]
        sums, counts = {"loss/total": 0.0}, {}
        for item in distribution.shard(items, size=len):
            out = model(item).float().square()
            loss = out.sum() / sum(sizes)
            loss.backward()
            optimizer.accumulate()
            sums["loss/total"] += float(loss.detach())
            sums["reward/mean"] = sums.get("reward/mean", 0.0) + float(out.detach().sum())
            counts["reward/mean"] = counts.get("reward/mean", 0) + len(item)
        distribution.reduce_gradients(optimizer.gradient)
        found[f"gradient.{step}"] = optimizer.gradient.clone()
        metrics = distribution.reduce_metrics(sums, counts)
        found[f"metrics.{step}"] = torch.tensor([metrics["loss/total"], metrics["reward/mean"]])
        optimizer.step()
    return found | {name: m.detach() for name, m in zip(optimizer.names, optimizer.masters, strict=True)}


def main(path: str) -> None:
    distribution = Distribution.start()
    found = gradients(distribution)
    assert distribution.any(distribution.rank == 1) and not distribution.any(False)
    mine = distribution.shard(SIZES, size=float)
    gathered = distribution.gather_objects(mine)
    assert sorted(gathered) == sorted(SIZES)
    found["gathered"] = torch.tensor(distribution.gather_objects([distribution.rank, distribution.world]))
    distribution.barrier()
    if distribution.is_main:
        save_file(found, path)


if __name__ == "__main__":
    main(sys.argv[1])
