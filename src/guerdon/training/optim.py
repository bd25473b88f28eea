"""AdamW on fp32 master weights, with fp32 gradient sums over micro-batches and processes, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

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
    matrices and embeddings, not on norms and biases (parameters with fewer than two dimensions). Of parameters that
    processes share (DTensors of `fully_shard`, in fp32), each process optimises its own rows.

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
        self.sharded = hasattr(self.parameters[0], "device_mesh")
        self.masters = [_master(p) for p in self.parameters]
        spans = [math.ceil(m.numel() / _ALIGN) * _ALIGN for m in self.masters]
        self.gradient = torch.zeros(sum(spans), device=self.parameters[0].device)
        self._gradients = [
            span[: m.numel()].view(m.shape) for span, m in zip(self.gradient.split(spans), self.masters, strict=True)
        ]
        # Where parameter and master are one, backward adds straight into the flat tensor; elsewhere `accumulate` does.
        self._targets = [
            _shared(p, gradient) if self.sharded else gradient if p is master else None
            for p, master, gradient in zip(self.parameters, self.masters, self._gradients, strict=True)
        ]
        for parameter, target, master, gradient in zip(
            self.parameters, self._targets, self.masters, self._gradients, strict=True
        ):
            master.grad = gradient
            parameter.grad = target
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
        for parameter, target, total in zip(self.parameters, self._targets, self._gradients, strict=True):
            if parameter.grad is not None and parameter.grad is not target:
                parts = parameter.grad.reshape(-1).split(_CHUNK)
                for sum_, part in zip(total.view(-1).split(_CHUNK), parts, strict=True):
                    sum_.add_(part.float())
            parameter.grad = target

    def step(self, lr: float | None = None) -> float:
        """Clip, update, set the gradient sums to 0; returns the global gradient norm before clipping.

        Raises:
            NonFiniteError: the norm is NaN or infinite; weights, moments and gradient sums are left as they are.
        """
        norm = torch.nn.utils.get_total_norm(self._gradients)
        if self.sharded:
            squares = norm.square()
            torch.distributed.all_reduce(squares)
            norm = squares.sqrt()
        size = norm.item()
        if not math.isfinite(size):
            raise NonFiniteError(f"the gradient norm is {size}.")
        if 0 < self.max_grad_norm < size:
            torch.nn.utils.clip_grads_with_norm_(self.masters, self.max_grad_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        self._adamw.step()
        self._round()
        self.gradient.zero_()
        return size

    def state_dict(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """Everything that a later `load_state_dict` needs, by flat names for safetensors; not copies.

        `step`, `master.NAME` (the weights in fp32), `exp_avg.NAME` and `exp_avg_sq.NAME`. What processes share is
        gathered, whole and on the CPU, which takes all of them at once: those that need no result do not `keep` it.
        """
        tensors = {"step": torch.zeros((), dtype=torch.int64)}
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            for key, value in {"master": master.detach(), **self._adamw.state[master]}.items():
                if key == "step":
                    tensors["step"] = value.to("cpu", torch.int64)
                    continue
                full = _shared(parameter, value).full_tensor() if self.sharded else value
                if keep:
                    tensors[f"{key}.{name}"] = full.cpu() if self.sharded else full
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, bit for bit; `GuerdonError` where it belongs to another model."""
        steps, moments = float(tensors["step"]), ("exp_avg", "exp_avg_sq")
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            mine = {}
            for key in ("master", *(moments if steps else ())):
                found = tensors.get(f"{key}.{name}")
                if found is None or found.shape != parameter.shape:
                    raise GuerdonError(
                        f"the checkpoint is of another model: {key}.{name} is missing or has another shape."
                    )
                mine[key] = _rows(parameter, found) if self.sharded else found
            master.detach().copy_(mine.pop("master"))
            if steps:
                state = {key: tensor.to(master.device, copy=True) for key, tensor in mine.items()}
                self._adamw.state[master] = {"step": torch.tensor(steps, device=master.device), **state}
        self._round()

    def _round(self) -> None:
        triples = zip(self.parameters, self.masters, self._targets, strict=True)
        pairs = [(p.detach(), master) for p, master, target in triples if target is None]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])


def _master(parameter: Any) -> torch.Tensor:
    """What is optimised in fp32: the parameter itself, a copy of it, or this process's rows of it."""
    if hasattr(parameter, "device_mesh"):
        return parameter.detach().to_local()
    return parameter if parameter.dtype == torch.float32 else parameter.detach().to(torch.float32, copy=True)


def _shared(parameter: Any, rows: torch.Tensor) -> Any:
    """A tensor that processes share as they do the parameter, from this process's rows of it."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _rows(parameter: Any, full: torch.Tensor) -> torch.Tensor:
    """This process's rows of a whole tensor, by the rule of `fully_shard`, which is that of `torch.chunk`."""
    mesh = parameter.device_mesh
    size = math.ceil(len(full) / mesh.size())
    return full[mesh.get_local_rank() * size :][:size]


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
