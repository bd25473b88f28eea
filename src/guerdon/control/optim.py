"""Adam over parameters with the seed axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from guerdon.errors import GuerdonError


class Adam:
    """Adam (Kingma and Ba 2015), with decoupled weight decay AdamW (Loshchilov and Hutter 2019), for S seeds at once.

    The numbers are those of `torch.optim.Adam` and `AdamW`; one fused call moves all parameters, and none of the seeds
    sees another: Adam works number by number, and gradients are clipped by the norm over each seed's own parameters. A
    parameter without a gradient counts as having the gradient 0.

        optimizer.minimise(loss)        # or, as in torch: zero_grad(), loss.sum().backward(), step()

    Args:
        parameters: of one or more modules, each (S, ...).
        lr: learning rate; the attribute may be set at any time.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay; 0 is Adam.
        max_grad_norm: each seed's gradient is scaled down to this 2-norm over all parameters; 0 does not clip.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
    ) -> None:
        self.parameters = list(parameters)
        self._moved = [p.detach() for p in self.parameters]  # the same memory, as the fused step takes it
        self.betas, self.eps, self.weight_decay, self.max_grad_norm = betas, eps, weight_decay, max_grad_norm
        device = self.parameters[0].device
        self.steps = torch.zeros((), device=device)
        # a tensor, so that a captured graph follows the schedule
        self._rate = torch.zeros((), device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
        self.lr = lr
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    @property
    def lr(self) -> float:
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = lr
        self._rate.fill_(lr)

    @torch.compiler.disable
    def minimise(self, loss: torch.Tensor) -> None:
        """One step down the gradient of `loss` (S,), or a sum over seeds; gradients of other parameters are left."""
        self.apply(torch.autograd.grad(loss.sum(), self.parameters))

    def apply(self, gradients: Iterable[torch.Tensor]) -> None:
        """One step along gradients of the parameters, in their order."""
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient.contiguous()  # the fused step reads memory, not strides
        self.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        """Move the parameters by their gradients, which stay as they are but for the clipping."""
        (self._step_untraced if torch.compiler.is_compiling() else self._step)()

    def _step(self) -> None:
        gradients = self._gradients()
        if self.max_grad_norm:
            norms = self.gradient_norms()
            if norms.is_cuda or (norms > self.max_grad_norm).any():
                scale = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_(gradients, [scale.view(-1, *[1] * (g.ndim - 1)) for g in gradients])
        self.steps += 1
        fused = torch._fused_adamw_ if self.weight_decay else torch._fused_adam_
        fused(
            self._moved,
            gradients,
            self.first,
            self.second,
            [],
            [self.steps] * len(gradients),
            lr=self._rate,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )

    _step_untraced = torch.compiler.disable(_step)  # the fused step is one call already, and cannot be traced

    def gradient_norms(self) -> torch.Tensor:
        """2-norm of each seed's gradient over all parameters, (S,); after a step with clipping, of the clipped one."""
        return torch.linalg.vector_norm(torch.cat([g.flatten(1) for g in self._gradients()], 1), dim=1)

    def _gradients(self) -> list[torch.Tensor]:
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.parameters]  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """Moments, step count and learning rate; tensors are not copies."""
        return {"steps": self.steps, "lr": self.lr, "first": list(self.first), "second": list(self.second)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` stood, bit for bit.

        Raises:
            GuerdonError: the state belongs to other networks.
        """
        if [tuple(t.shape) for t in state["first"]] != [tuple(p.shape) for p in self.parameters]:
            raise GuerdonError("the optimiser's checkpoint is of other networks: their parameters have other shapes.")
        torch._foreach_copy_(
            [self.steps, *self.first, *self.second], [state["steps"], *state["first"], *state["second"]]
        )
        self.lr = state["lr"]
