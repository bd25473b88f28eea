"""Log-probs and entropies of given tokens, without ever holding a (tokens, vocabulary) matrix."""

from __future__ import annotations

import torch

ROWS, COLUMNS = 2048, 4096  # one tile of logits: 32 MiB in fp32 whatever the vocabulary


def token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at `target`, and the entropy of that softmax.

    The vocabulary is walked tile by tile with a running log-sum-exp; the backward pass computes each tile again.
    Matmuls run in the dtype of `hidden`, sums in fp32. The target's logit is an fp32 dot product that replaces its
    rounded twin inside the sum, so that log-probs of confident tokens stay exact and never exceed 0.

    Args:
        hidden: (N, D) states that predict the tokens.
        weight: (V, D) output embedding.
        target: (N,) token ids.
        temperature: divides the logits.
        entropy: whether to return entropies too; they carry gradients as well.

    Returns:
        fp32 log-probs (N,) and entropies (N,) in nats, or None.
    """
    logps, entropies = _TokenLogps.apply(hidden, weight, target, temperature, entropy)
    return logps, entropies if entropy else None


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, entropy):  # type: ignore[no-untyped-def, override]
        n = len(hidden)
        logps, lse, entropies = (hidden.new_empty(n, dtype=torch.float32) for _ in range(3))
        for rows in _slices(n, ROWS):
            h, t = hidden[rows], target[rows]
            own = torch.linalg.vecdot(h.float(), weight[t].float()) / temperature
            maximum, total, weighted = own.clone(), torch.ones_like(own), own.clone()
            for columns in _slices(len(weight), COLUMNS):
                logits = _logits(h, weight[columns], temperature)
                _at_target(logits, t, columns, torch.full_like(own, float("-inf")))
                higher = torch.maximum(maximum, logits.amax(-1))
                shrink = (maximum - higher).exp()
                if entropy:
                    p = (logits - higher[:, None]).exp_()
                    weighted = weighted * shrink + torch.linalg.vecdot(p, logits.clamp_(min=torch.finfo(p.dtype).min))
                else:
                    p = logits.sub_(higher[:, None]).exp_()
                total = total * shrink + p.sum(-1)
                maximum = higher
            lse[rows] = maximum + total.log()
            logps[rows] = own - lse[rows]
            entropies[rows] = lse[rows] - weighted / total
        ctx.save_for_backward(hidden, weight, target, lse, logps, entropies)
        ctx.temperature, ctx.entropy = temperature, entropy
        return logps, entropies

    @staticmethod
    def backward(ctx, grad_logps, grad_entropies):  # type: ignore[no-untyped-def, override]
        hidden, weight, target, lse, logps, entropies = ctx.saved_tensors
        learns_weight = ctx.needs_input_grad[1]
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(weight) if learns_weight else None
        for rows in _slices(len(hidden), ROWS):
            h, t, g = hidden[rows], target[rows], grad_logps[rows, None]
            for columns in _slices(len(weight), COLUMNS):
                logits = _logits(h, weight[columns], ctx.temperature).sub_(lse[rows, None])
                _at_target(logits, t, columns, logps[rows])
                if ctx.entropy:
                    # d entropy / d logit_j = -p_j (log p_j + entropy)
                    slope = (logits + entropies[rows, None]).mul_(grad_entropies[rows, None]).add_(g)
                    d = slope.mul_(logits.exp_()).neg_()
                else:
                    d = logits.exp_().mul_(-g)
                _at_target(d, t, columns, grad_logps[rows], accumulate=True)
                d = d.div_(ctx.temperature).to(h.dtype)
                d_hidden[rows] += d @ weight[columns]
                if d_weight is not None:
                    d_weight[columns] += d.T @ h
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _at_target(
    x: torch.Tensor, target: torch.Tensor, columns: slice, value: torch.Tensor, accumulate: bool = False
) -> None:
    """Set (or add to) the entries of a tile that belong to the target tokens."""
    rows = torch.nonzero((target >= columns.start) & (target < columns.stop)).squeeze(-1)
    x.index_put_((rows, target[rows] - columns.start), value[rows], accumulate=accumulate)
