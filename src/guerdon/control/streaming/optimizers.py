"""Optimisers with traces: gradients of the output are fed to them, and delta when they step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from guerdon.control.ingredients import Ingredients
from guerdon.control.streaming import EPS


class TraceOptimizer(torch.optim.Optimizer, ABC):
    """Keeps an eligibility trace e <- gamma lamda e + p.grad of each parameter, and moves along delta * e.

    `p.grad` is the gradient of what is learned (a value, a log-probability), never of a loss: delta comes in `step`.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, gamma: float, lamda: float, **options: float) -> None:
        super().__init__(params, {"lr": lr, "decay": gamma * lamda, "steps": 0, **options})
        self.bound, self.share = 0.0, 1.0  # M of the last step, and how much of lr it took

    @torch.no_grad()
    def step(self, delta: float, reset: bool = False) -> None:  # type: ignore[override]
        """One step for the error `delta`; the traces are forgotten after it where asked (an end, exploration)."""
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                trace = self.state[p].setdefault("trace", torch.zeros_like(p))
                trace.mul_(group["decay"])
                if p.grad is not None:
                    trace.add_(p.grad)
        self._move(delta)
        if reset:
            self.forget()

    def forget(self) -> None:
        """Set the traces to 0."""
        for state in self.state.values():
            state["trace"].zero_()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        state = {int(index): state for index, state in state_dict["state"].items()}  # JSON made text of the keys
        super().load_state_dict({**state_dict, "state": state})

    @abstractmethod
    def _move(self, delta: float) -> None: ...

    def _second(self, group: dict[str, Any], p: Tensor, delta: float, beta2: float = 0.999) -> Tensor:
        """Running mean of the squares of delta * e, unbiased."""
        second = self.state[p].setdefault("second", torch.zeros_like(p))
        second.mul_(beta2).add_((delta * self.state[p]["trace"]).square(), alpha=1 - beta2)
        return second / (1 - beta2 ** group["steps"])


class ObGD(TraceOptimizer):
    """Overshooting-bounded gradient descent: lr / max(M, 1) with M = lr kappa max(|delta|, 1) |e|_1; 0 for no bound.

    With kappa > 1 a step on a linear value of inputs in [-1, 1] never takes delta beyond 0.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1.0, gamma: float = 0.99, lamda: float = 0.8, kappa: float = 2.0
    ) -> None:
        super().__init__(params, lr, gamma, lamda, kappa=kappa)

    def _direction(self, group: dict[str, Any], p: Tensor, delta: float) -> Tensor:
        return self.state[p]["trace"]

    def _move(self, delta: float) -> None:
        moves = [(group, p, self._direction(group, p, delta)) for group in self.param_groups for p in group["params"]]
        norm = sum(float(direction.abs().sum()) for _, _, direction in moves)
        for group, p, direction in moves:
            self.bound = group["lr"] * group["kappa"] * max(abs(delta), 1.0) * norm
            self.share = 1 / max(self.bound, 1.0)
            p.add_(direction, alpha=group["lr"] * self.share * delta)


class AdaptiveObGD(ObGD):
    """ObGD along e / sqrt(v + 1e-8), v being the unbiased running mean (0.999) of (delta e)^2, also in M."""

    def _direction(self, group: dict[str, Any], p: Tensor, delta: float) -> Tensor:
        return self.state[p]["trace"] / (self._second(group, p, delta) + EPS).sqrt()


class TraceAdam(TraceOptimizer):
    """Adam (0.9, 0.999) that ascends delta * e; with lamda = 0 the usual semi-gradient step."""

    def _move(self, delta: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                first = self.state[p].setdefault("first", torch.zeros_like(p))
                first.lerp_(delta * self.state[p]["trace"], 0.1)
                unbiased = first / (1 - 0.9 ** group["steps"])
                p.add_(unbiased / (self._second(group, p, delta).sqrt() + EPS), alpha=group["lr"])


def build_optimizer(options: Ingredients, params: Iterable[Tensor], kappa: float) -> TraceOptimizer:
    """The optimiser that the options name, for one network."""
    if options.optimizer == "adam":
        return TraceAdam(params, options.lr, options.gamma, options.lamda)
    cls = AdaptiveObGD if options.optimizer == "adaptive-obgd" else ObGD
    return cls(params, options.lr, options.gamma, options.lamda, 0.0 if options.optimizer == "sgd" else kappa)
