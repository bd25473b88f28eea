"""The network that estimates costs to the goal of a puzzle: for training with the seed axis, and folded for search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.control.networks import Linear, Precision
from guerdon.control.puzzles.domains import make_puzzle
from guerdon.control.puzzles.puzzle import Tables
from guerdon.control.spaces import Spec
from guerdon.control.streams import Streams

_TOGETHER = 8192  # states in one forward pass of a search: bounds the memory, never changes a result
_FEW = 16  # states of which compiled code is sooner done than torch, whatever the widths
_EPS = 1e-5


class BatchNorm(nn.Module):
    """Batch normalisation of (S, B, F) over each seed's own batch; running statistics where not in training."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, seeds: int, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(seeds, size)), nn.Parameter(torch.zeros(seeds, size))
        self.register_buffer("running_mean", torch.zeros(seeds, size))
        self.register_buffer("running_var", torch.ones(seeds, size))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.float().transpose(0, 1).flatten(1)  # (B, S F): every feature of every seed is a feature
        statistics = self.running_mean.view(-1), self.running_var.view(-1)
        y = F.batch_norm(flat, *statistics, self.weight.view(-1), self.bias.view(-1), self.training, 0.1, _EPS)
        return y.unflatten(1, (len(self.weight), -1)).transpose(0, 1)

    def folded(self, k: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (O, I) and bias (O,) of the linear layer before it, for seed k, with the normalisation in them."""
        scale = self.weight[k] / (self.running_var[k] + _EPS).sqrt()
        return weight * scale[:, None], (bias - self.running_mean[k]) * scale + self.bias[k]


class _Layer(nn.Module):
    """Linear, then batch normalisation where asked for."""

    def __init__(self, seeds: int, inputs: int, outputs: int, batch_norm: bool, precision: Precision) -> None:
        super().__init__()
        self.linear = Linear(seeds, inputs, outputs, precision=precision)
        self.norm = BatchNorm(seeds, outputs) if batch_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x.float() if self.norm is None else self.norm(x)

    def folded(self, k: int) -> tuple[Tensor, Tensor]:
        weight, bias = self.linear.weight[k], self.linear.bias[k]
        return (weight, bias) if self.norm is None else self.norm.folded(k, weight, bias)


def _product(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """x to W x + b; on the CPU by oneDNN, which has its widest instructions where MKL has not: on AMD.

    The weight is laid out for it once, by the operators that torch.compile calls too.
    """
    mkldnn = torch.ops.mkldnn
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, weight, bias)
    if weight.dtype == torch.bfloat16 and not mkldnn._is_mkldnn_bf16_supported():
        return lambda x: F.linear(x, weight, bias)
    packed = mkldnn._reorder_linear_weight(weight)
    return lambda x: mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class CostToGo(nn.Module):
    """V(s), or Q(s, .), of a puzzle's states: the network of DeepCubeA (Agostinelli et al. 2019) with one-hot inputs.

    Fully connected layers of the widths `hidden`, then residual blocks of the last width,
    x <- relu(x + layer(relu(layer(x)))), all normalised over the batch, and a linear head. As a policy it takes the
    action that is cheapest by its estimates.

    Args:
        seeds: S.
        spec: of the puzzle's environment: one-hot observations, A actions.
        puzzle: its name.
        q: whether it estimates Q(s, .), or else V(s).
        hidden: widths of the layers before the blocks.
        blocks: residual blocks.
        batch_norm: normalise before every activation.
        precision: of the products in all layers but the head.
    """

    kind = "cost-to-go"

    def __init__(
        self,
        seeds: int,
        spec: Spec,
        puzzle: str,
        q: bool,
        hidden: Sequence[int] = (5000, 1000),
        *,
        blocks: int = 4,
        batch_norm: bool = True,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.seeds, self.spec, self.puzzle, self.q, self.precision = seeds, spec, make_puzzle(puzzle), q, precision
        how = batch_norm, precision
        sizes = [self.puzzle.places * self.puzzle.values, *hidden]
        self.layers = nn.ModuleList(_Layer(seeds, sizes[i], sizes[i + 1], *how) for i in range(len(hidden)))
        self.blocks = nn.ModuleList(_Layer(seeds, hidden[-1], hidden[-1], *how) for _ in range(2 * blocks))
        self.head = Linear(seeds, hidden[-1], self.puzzle.actions if q else 1)
        self.options: dict[str, Any] = {
            "puzzle": puzzle,
            "q": q,
            "hidden": list(hidden),
            "blocks": blocks,
            "batch_norm": batch_norm,
            "precision": precision,
        }

    @property
    def config(self) -> dict[str, Any]:
        return {"actor": self.kind, "seeds": self.seeds, "spec": asdict(self.spec), **self.options}

    def forward(self, states: Tensor) -> Tensor:
        """States (S, B, L) uint8 to V (S, B), or Q (S, B, A)."""
        x = F.one_hot(states.long(), self.puzzle.values).flatten(2).float()
        for layer in self.layers:
            x = layer(x).relu()
        for first, second in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            x = (x + second(first(x).relu())).relu()
        values = self.head(x)
        return values if self.q else values.squeeze(-1)

    @torch.no_grad()
    def inference(self, k: int) -> Callable[[Tensor], Tensor]:
        """The network of seed k as it stands, for states (N, L) alone: V (N,), or Q (N, A), at least 0.

        The statistics of batch normalisation are folded into the weights, and the first product, of which all inputs
        but L are 0, becomes a sum of L columns.
        """
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        layers = [tuple(p.to(dtype) for p in layer.folded(k)) for layer in (*self.layers, *self.blocks)]
        (first, first_bias), *rest = layers
        products = [_product(*layer) for layer in rest]
        stem, blocks = products[: len(self.layers) - 1], products[len(self.layers) - 1 :]
        columns = first.t().contiguous()
        head, head_bias = self.head.weight[k].clone(), self.head.bias[k].clone()
        offsets = torch.arange(self.puzzle.places, device=head.device, dtype=torch.int32) * self.puzzle.values

        def values(states: Tensor) -> Tensor:
            x = F.embedding_bag(states + offsets, columns, mode="sum").add_(first_bias).relu_()
            for layer in stem:
                x = layer(x).relu_()
            for one, two in zip(blocks[::2], blocks[1::2], strict=True):
                x = two(one(x).relu_()).add_(x).relu_()
            return F.linear(x.float(), head, head_bias).clamp_(min=0)

        @torch.inference_mode()
        def chunked(states: Tensor) -> Tensor:
            if len(states) > _TOGETHER:
                found = torch.cat([values(part) for part in states.split(_TOGETHER)])
            else:
                found = values(states)
            return found if self.q else found.squeeze(-1)

        return chunked

    @torch.no_grad()
    def heuristic(self, k: int = 0) -> Callable[[np.ndarray], np.ndarray]:
        """As `inference`, on arrays: what `a_star` (V) and `q_star` (Q) are guided by.

        A few states in fp32 on the CPU go through `forward`, which is compiled, where numba is installed.
        """
        inference, device = self.inference(k), self.head.weight.device

        def many(states: np.ndarray) -> np.ndarray:
            return inference(torch.from_numpy(states).to(device)).cpu().numpy()

        if device.type != "cpu" or self.precision != "fp32" or not find_spec("numba"):
            return many
        from guerdon.control.puzzles.forward import forward

        folded = [layer.folded(k) for layer in (*self.layers, *self.blocks)]
        layers = [*folded, (self.head.weight[k], self.head.bias[k])]
        few = forward([(w.numpy(), b.numpy()) for w, b in layers], len(self.layers), self.puzzle.values)

        def values(states: np.ndarray) -> np.ndarray:
            if len(states) > _FEW:
                return many(states)
            return few(states) if self.q else few(states)[:, 0]

        return values

    def act(self, obs: Tensor, streams: Streams | None = None) -> Tensor:
        """Cheapest actions (S, B) for one-hot observations (S, B, L V)."""
        self.eval()
        states = obs.unflatten(-1, (self.puzzle.places, self.puzzle.values)).argmax(-1).byte()
        if self.q:
            return self(states).argmin(-1)
        tables = Tables(self.puzzle, obs.device)
        children = tables.expand(states)
        after = self(children.flatten(1, 2)).view(children.shape[:-1]).masked_fill(tables.solved(children), 0.0)
        return (tables.costs + after).argmin(-1)
