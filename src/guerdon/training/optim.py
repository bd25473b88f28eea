"""AdamW on fp32 master weights, with fp32 gradient sums over micro-batches and processes, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from guerdon.errors import GuerdonError
from guerdon.lazy import torch

_CHUNK = 2**18  # numbers; a cast to fp32 that stays in cache is seven times faster than torch's mixed-type addition
_ALIGN = 16  # numbers; each parameter's gradient starts on a cache line


class NonFiniteError(GuerdonError):
    """The gradient is not finite. Nothing was changed by the step that would have used it."""


class MasterAdamW:
    """AdamW (Loshchilov and Hutter 2019) for models in fp32 or bf16.

    Trainable parameters that are not fp32 get fp32 master copies, which are what is optimised; the parameters are
    their rounded images. Gradients are summed in fp32 in one flat tensor, `gradient`, so that a sum over processes is
    one collective. A parameter that a step gives no gradient counts as having the gradient 0. Weight decay acts on
    matrices and embeddings, not on norms and biases (parameters with fewer than two dimensions).

        optimizer = MasterAdamW(model.named_parameters(), lr=1e-5, ...)
        for batch in micro_batches:
            loss(batch).backward()          # the batch's share of the loss
            optimizer.accumulate()
        distribution.reduce_gradients(optimizer.gradient)
        grad_norm = optimizer.step(lr)

    Args:
        named_parameters: of the model; those that do not require a gradient are left alone.
        lr: learning rate until `step` is given another.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        max_grad_norm: gradients are scaled down to this global 2-norm; 0 does not clip.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        if not named:
            raise GuerdonError("there is nothing to train: no parameter of the model requires a gradient.")
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.max_grad_norm = max_grad_norm
        single = torch.float32
        self.masters = [p if p.dtype == single else p.detach().to(single, copy=True) for p in self.parameters]
        spans = [math.ceil(p.numel() / _ALIGN) * _ALIGN for p in self.parameters]
        self.gradient = torch.zeros(sum(spans), dtype=single, device=self.parameters[0].device)
        self._gradients = [
            span[: p.numel()].view(p.shape) for span, p in zip(self.gradient.split(spans), self.parameters, strict=True)
        ]
        for parameter, master, gradient in zip(self.parameters, self.masters, self._gradients, strict=True):
            parameter.grad = None
            master.grad = gradient  # where parameter and master are one, backward adds straight into the flat tensor
        decayed = [m for m in self.masters if m.ndim >= 2]
        others = [m for m in self.masters if m.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=lr,
            betas=betas,
            eps=eps,
            fused=True,
        )

    def accumulate(self) -> None:
        """Add the gradients of the last backward pass to the fp32 sums and free them."""
        for parameter, master, total in zip(self.parameters, self.masters, self._gradients, strict=True):
            if parameter.grad is not None and parameter.grad is not total:
                parts = parameter.grad.reshape(-1).split(_CHUNK)
                for sum_, part in zip(total.view(-1).split(_CHUNK), parts, strict=True):
                    sum_.add_(part.float())
            parameter.grad = total if parameter is master else None

    def step(self, lr: float | None = None) -> float:
        """Clip, update, set the gradient sums to 0; returns the global gradient norm before clipping.

        Raises:
            NonFiniteError: the norm is NaN or infinite; weights, moments and gradient sums are left as they are.
        """
        norm = torch.nn.utils.get_total_norm(self._gradients)
        size = norm.item()
        if not math.isfinite(size):
            raise NonFiniteError(f"the gradient norm is {size}.")
        if self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.masters, self.max_grad_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        self._adamw.step()
        self._round()
        self.gradient.zero_()
        return size

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that a later `load_state_dict` needs, by flat names for safetensors; not copies.

        `step`, `master.NAME` (the weights in fp32), `exp_avg.NAME` and `exp_avg_sq.NAME`.
        """
        tensors = {"step": torch.zeros((), dtype=torch.int64)}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master.{name}"] = master.detach()
            for key, value in self._adamw.state[master].items():
                if key == "step":
                    tensors["step"] = value.to("cpu", torch.int64)
                else:
                    tensors[f"{key}.{name}"] = value
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, bit for bit; `GuerdonError` where it belongs to another model."""
        steps, moments = float(tensors["step"]), ("exp_avg", "exp_avg_sq")
        for name, master in zip(self.names, self.masters, strict=True):
            for key in ("master", *(moments if steps else ())):
                found = tensors.get(f"{key}.{name}")
                if found is None or found.shape != master.shape:
                    raise GuerdonError(
                        f"the checkpoint is of another model: {key}.{name} is missing or has another shape."
                    )
            master.detach().copy_(tensors[f"master.{name}"])
            if steps:
                state = {key: tensors[f"{key}.{name}"].to(master.device, copy=True) for key in moments}
                self._adamw.state[master] = {"step": torch.tensor(steps, device=master.device), **state}
        self._round()

    def _round(self) -> None:
        pairs = [(p.detach(), m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])


def learning_rate(
    progress: float, peak: float, schedule: Literal["linear", "cosine", "constant"], warmup: float
) -> float:
    """Learning rate at `progress` through the run.

        progress < warmup:   peak * progress / warmup
        otherwise, with x = (progress - warmup) / (1 - warmup):
            linear           peak * (1 - x)
            cosine           peak * (1 + cos(pi x)) / 2
            constant         peak

    Args:
        progress: in [0, 1]. The middle of an update, (k + 1/2) / n, gives neither the first nor the last the rate 0.
        peak: the highest rate.
        schedule: what follows the warm-up.
        warmup: share of the run over which the rate rises linearly from 0.
    """
    if progress < warmup:
        return peak * progress / warmup
    x = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    return {"linear": peak * (1 - x), "cosine": peak * (1 + math.cos(math.pi * x)) / 2, "constant": peak}[schedule]
