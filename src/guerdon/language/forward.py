"""The group forward: every shared segment computed once, logits at learned positions only. The one hot path."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from guerdon.errors import ConfigError
from guerdon.language import attention
from guerdon.language.groups import Group
from guerdon.language.logprobs import token_logps
from guerdon.language.packing import Batch, pack


@dataclass
class Outputs:
    """What a forward pass returns for a batch of N learned tokens and C completions; None where it was not asked for.

    Attributes:
        logps: (N,) fp32 log-probs of the learned tokens at the stated temperature.
        entropy: (N,) entropy in nats of the distribution that each learned token was drawn from.
        scores: (C,) reward head at the last token of each completion.
        values: (N,) value head at the state before each learned token.
    """

    logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    values: torch.Tensor | None = None


class GroupModel(nn.Module):
    """A causal language model that computes on packed groups.

    Dropout is switched off: the log-prob of a token under a policy is one number, not a random one.

    Args:
        model: a transformers causal LM, or a peft model around one.
        head: None, "scores" (reward) or "values" (value), a linear map that starts at zero.
        padded: compute separate padded rows instead. The reference that the group forward is tested against, and the
            way for architectures whose attention cannot be told who sees whom.

    Attributes:
        sharded: where processes share the weights (`sharding.shard`), the dtype that they are gathered in, else None.

    Raises:
        ConfigError: where `padded` is False and the architecture cannot compute on groups (see `supports_groups`).
    """

    def __init__(self, model: Any, head: str | None = None, padded: bool = False):
        super().__init__()
        why_not = supports_groups(model)
        if why_not and not padded:
            raise ConfigError(f"{type(model).__name__} cannot compute on packed groups: {why_not}; use padded rows")
        self.model = model
        self.padded = padded
        self.sharded: torch.dtype | None = None
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if not padded:
            attention.register()
            self._base.set_attn_implementation(attention.NAME)
        if head is not None:
            self.head = nn.Linear(self._base.config.get_text_config().hidden_size, 1, bias=False)
            nn.init.zeros_(self.head.weight)
            self.head.to(next(model.parameters()))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the matmuls run in."""
        return self.sharded or next(self.model.parameters()).dtype

    def forward(self, batch: Batch, wants: Collection[str] = ("logps",), temperature: float = 1.0) -> Outputs:
        """Compute what `wants` names among logps, entropy, scores, values."""
        states, last = self._padded_states(batch) if self.padded else self._group_states(batch, set(wants))
        outputs = Outputs()
        if "logps" in wants or "entropy" in wants:
            weight = self.model.get_output_embeddings().weight
            outputs.logps, outputs.entropy = token_logps(
                states.to(weight.dtype), weight, batch.target, temperature, "entropy" in wants
            )
        if "values" in wants:
            outputs.values = self.head(states).float().sum(-1)  # over one number: FSDP warns of views, as of squeeze
        if "scores" in wants:
            outputs.scores = self.head(last).float().sum(-1)
        return outputs

    @torch.no_grad()
    def group_error(self, group: Group, temperature: float = 1.0) -> float:
        """Largest difference of log-probs between the group forward and separate padded rows, on one group."""
        batch = pack([group], self.device)
        grouped = self(batch, temperature=temperature).logps
        with self.plain():
            self.padded = True
            try:
                separate = self(batch, temperature=temperature).logps
            finally:
                self.padded = False
        return float((grouped - separate).abs().max()) if len(separate) else 0.0

    @contextmanager
    def plain(self) -> Iterator[Any]:
        """The transformers model as others know it, whose attention takes masks and caches."""
        if self.padded:
            yield self.model
            return
        self._base.set_attn_implementation("sdpa")
        try:
            yield self.model
        finally:
            self._base.set_attn_implementation(attention.NAME)

    @property
    def _base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def body(self) -> nn.Module:
        """The decoder without its output embedding."""
        body: nn.Module = getattr(self._base, self._base.base_model_prefix)
        return body

    def _group_states(self, batch: Batch, wants: set[str]) -> tuple[torch.Tensor, torch.Tensor]:
        read = [batch.last] * ("scores" in wants) + [batch.source] * bool(wants - {"scores"})
        with self._last_mlp_on(torch.cat(read).unique(), batch.tokens.shape[1]):
            hidden = self.body(
                input_ids=batch.tokens, position_ids=batch.positions, use_cache=False, layout=batch.layout
            ).last_hidden_state[0]
        return hidden.index_select(0, batch.source), hidden.index_select(0, batch.last)

    @contextmanager
    def _last_mlp_on(self, rows: torch.Tensor, total: int) -> Iterator[None]:
        """Compute the last layer's MLP for these rows of `total` alone, as nothing reads the others.

        Not under gradient checkpointing, which computes it once more when nobody says which rows.
        """
        layers: Any = getattr(self.body, "layers", None) or getattr(self.body, "h", None)
        mlp = getattr(layers[-1], "mlp", None) if layers else None
        if mlp is None or getattr(layers[-1], "gradient_checkpointing", False):
            yield
            return

        def narrow(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (args[0].index_select(1, rows),)

        def widen(_: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            return out.new_zeros(1, total, out.shape[-1]).index_copy(1, rows, out)

        hooks = mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _padded_states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The same states from one padded row per completion."""
        rows = [group.sequence(c)[0] for group in batch.groups for c in range(len(group))]
        width = max(map(len, rows))
        tokens, mask = np.zeros((len(rows), width), dtype=np.int64), np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, 1
        device = batch.tokens.device
        hidden = self.body(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            use_cache=False,
        ).last_hidden_state
        owner = batch.completion
        ends = torch.from_numpy(mask.sum(1) - 1).to(device)
        before = batch.positions[0].new_tensor(_predictor_positions(batch.groups))
        return hidden[owner, before], hidden[torch.arange(len(rows), device=device), ends]


def _predictor_positions(groups: Sequence[Group]) -> np.ndarray:
    """(N,) position, within its own row, of the token before each learned token."""
    found = []
    for group in groups:
        depth: list[int] = []
        for s in group.segments:
            depth.append(0 if s.parent < 0 else depth[s.parent] + len(group.segments[s.parent]))
            found.append(depth[-1] + np.flatnonzero(s.learn) - 1)
    return np.concatenate(found)


def supports_groups(model: Any) -> str:
    """Why this architecture cannot compute on packed groups; an empty string where it can."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    if not base._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of other kinds than full attention ({', '.join(sorted(kinds - {'full_attention'}))})"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "its attention has a sliding window"
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale", "alibi"):
        if getattr(config, name, None) not in (None, False, 1.0):
            return f"its configuration sets {name}"
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return "its output embedding is not a plain linear map"
    return ""
