"""The first values of parameters, and what is done to all of them at once."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from guerdon.control.networks.actors import GaussianActor
from guerdon.control.networks.encoders import ConvEncoder
from guerdon.control.networks.layers import MLP, LayerNorm, Linear, one_thread_each
from guerdon.errors import ConfigError, near

How = Literal["torch", "orthogonal", "edac"]


@torch.no_grad()
@one_thread_each(1)  # factorisations round by the number of threads
def initialise(
    module: nn.Module, seeds: Sequence[int], how: How = "torch", *, head_gain: float = 1.0, name: str | None = None
) -> None:
    """Give every parameter its first value, each seed's slice from the seed's own generator.

        torch       weights and biases U(-1/sqrt(I), 1/sqrt(I)), as `nn.Linear`, `nn.Conv2d` and `nn.GRU` do
        orthogonal  orthogonal weights with gain sqrt(2), and `head_gain` in the last layer; biases 0 (PPO)
        edac        as torch, but hidden biases 0.1 and the last layer U(-3e-3, 3e-3) (An et al. 2021, in their code)

    Normalisation starts as the identity, and a log-std that is a parameter at 0.

    Args:
        module: built from the classes of this package.
        seeds: the S seeds.
        how: see above.
        head_gain: gain of the last layers of MLPs with `orthogonal`.
        name: tells modules apart that are initialised from the same seeds; None is the name of the class.
    """
    if how not in get_args(How):
        raise ConfigError(f"no initialisation is called '{how}'.{near(how, get_args(How))}")
    generators = [_torch_generator(seed, name or type(module).__name__) for seed in seeds]
    heads = {part.head for part in module.modules() if isinstance(part, MLP)}
    for part in module.modules():
        if isinstance(part, Linear):
            _fill(part.weight, part.bias, part.fan_in, generators, how, head_gain if part in heads else None)
        elif isinstance(part, ConvEncoder):
            for weight, bias in zip(part.weights, part.biases, strict=True):
                _fill(weight, bias, math.prod(weight.shape[2:]), generators, how, None)
        elif isinstance(part, LayerNorm):
            part.weight.fill_(1.0)
            part.bias.zero_()
        elif isinstance(part, GaussianActor) and part.log_std is not None:
            part.log_std.zero_()


def _fill(
    weight: Tensor, bias: Tensor, fan_in: int, generators: list[torch.Generator], how: How, head_gain: float | None
) -> None:
    """Draw the parameters of one layer, on the CPU wherever they are; `head_gain` is None in hidden layers."""
    hidden = head_gain is None
    bound = 3e-3 if how == "edac" and not hidden else 1 / math.sqrt(fan_in)
    for k, generator in enumerate(generators):
        if how == "orthogonal":
            matrix = _orthogonal(weight[k].flatten(1).shape if weight.ndim == 5 else weight[k].shape, generator)
            weight[k] = (math.sqrt(2) if head_gain is None else head_gain) * matrix.view_as(weight[k])
            bias[k] = 0.0
        else:
            weight[k] = torch.empty_like(weight[k], device="cpu").uniform_(-bound, bound, generator=generator)
            drawn = torch.empty_like(bias[k], device="cpu").uniform_(-bound, bound, generator=generator)
            bias[k] = 0.1 if how == "edac" and hidden else drawn


def _torch_generator(seed: int, name: str) -> torch.Generator:
    state = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def _orthogonal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Matrices (..., O, I) with orthonormal rows, or columns where there are more rows."""
    rows, columns = shape[-2:]
    normal = torch.randn(*shape[:-2], max(rows, columns), min(rows, columns), generator=generator)
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over the orthogonal matrices
    return q if rows >= columns else q.mT


@torch.no_grad()
def ema_(target: nn.Module, source: nn.Module, rate: float) -> None:
    """target <- (1 - rate) target + rate source, parameter by parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)
