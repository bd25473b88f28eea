"""Groups as a sampler leaves them, and a method's loss on log-probs that ride along in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from guerdon.language.forward import Outputs
from guerdon.language.groups import Group
from guerdon.language.packing import pack, unpack


def sampled_groups(scores: list[list[float]], seed: int = 0, drift: float = 0.3, longest: int = 6) -> list[Group]:
    """One group for each list of scores; `drift` is how far the policy (`new_logps`) has moved from the sampler."""
    rng = np.random.default_rng(seed)
    groups = []
    for index, row in enumerate(scores):
        completions = [rng.integers(4, 30, size=rng.integers(1, longest + 1)) for _ in row]
        values = {"score": np.array(row, np.float32), "finished": np.ones(len(row), np.float32)}
        group = Group.of(rng.integers(4, 30, size=3), completions, values=values, key=f"prompt {index}")
        for segment in group.segments[1:]:
            old = rng.uniform(-3, -0.1, len(segment)).astype(np.float32)
            noise = rng.normal(size=(2, len(segment))).astype(np.float32)
            segment.values = {
                "old_logps": old,
                "ref_logps": old + 0.3 * noise[0],
                "new_logps": old + drift * noise[1],
                "new_entropy": rng.uniform(0, 2, len(segment)).astype(np.float32),
                "values": rng.normal(size=len(segment)).astype(np.float32),
                "new_values": rng.normal(size=len(segment)).astype(np.float32),
            }
        groups.append(group)
    return groups


def loss_on(
    method: Any, groups: list[Group], totals: dict[str, float] | None = None, loss: Any = None
) -> tuple[float, list[np.ndarray], dict[str, torch.Tensor]]:
    """The loss at `new_logps`, its gradient for each completion's tokens, and the metrics."""
    batch = pack(groups, totals=totals or method.totals(groups))
    inputs = {
        name: batch.token_values[f"new_{name}"].clone().requires_grad_() for name in ("logps", "entropy", "values")
    }
    value, metrics = (loss or method.loss)(Outputs(**inputs), batch)
    value.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs.values()]
    unpack(batch, "gradient", torch.stack(gradients).sum(0))
    return value.item(), [g.segments[leaf].values.pop("gradient") for g in groups for leaf in g.leaves], metrics


@pytest.fixture
def sampled() -> Callable[..., list[Group]]:
    return sampled_groups


@pytest.fixture
def on() -> Callable[..., tuple[float, list[np.ndarray], dict[str, torch.Tensor]]]:
    return loss_on
