"""A language policy that can be asked: for answers, for log-probs, for rewards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guerdon.feedback.records import Text
from guerdon.language.groups import Group, micro_batches
from guerdon.language.packing import pack, unpack
from guerdon.language.sampling.base import Completion, Sampling, completion_seeds
from guerdon.language.templates import prompt_ids, stop_ids
from guerdon.lazy import torch

if TYPE_CHECKING:
    from guerdon.language.forward import GroupModel
    from guerdon.language.sampling.local import LocalSampler

DEFAULT = Sampling()
HEAD = "head.safetensors"  # a reward or value head beside the weights


class Policy:
    """A model on groups with its tokenizer.

    Attributes:
        model: the `GroupModel`; its `head`, where it has one, scores completions.
        tokenizer: transformers' tokenizer.
    """

    def __init__(self, model: GroupModel, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, name: str | Path, precision: str = "auto", **how: Any) -> Policy:
        """The policy of a run directory, or any model that `load_model` takes (whose `seed` and `texts` are `how`).

        Raises:
            ConfigError: the name leads to no model.
        """
        from guerdon.language.forward import GroupModel, supports_groups
        from guerdon.language.models import load_model

        directory = Path(name) / "policy" if (Path(name) / "policy").is_dir() else Path(name)
        model, tokenizer = load_model(str(directory) if directory.is_dir() else str(name), **how)
        head = directory / HEAD
        grouped = GroupModel(model, "scores" if head.is_file() else None, padded=bool(supports_groups(model)))
        if head.is_file():
            from safetensors.torch import load_file

            grouped.head.load_state_dict(load_file(head))
        cast(grouped, resolve_precision(precision, model))
        grouped.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
        return cls(grouped, tokenizer)

    @cached_property
    def sampler(self) -> LocalSampler:
        from guerdon.language.sampling.local import LocalSampler

        return LocalSampler(self.model, self.tokenizer, stop_ids(self.tokenizer, self.model.model))

    def answer(
        self, prompts: Sequence[Text], n: int = 1, sampling: Sampling = DEFAULT, seed: int = 0
    ) -> list[list[Completion]]:
        """n completions of each prompt; the same ones for the same prompt and seed, whatever else is asked.

        Args:
            prompts: strings, or lists of messages where the tokenizer has a chat template.
        """
        ids = [prompt_ids(prompt, self.tokenizer) for prompt in prompts]
        return self.sampler.sample(ids, [completion_seeds(n, seed, *p) for p in ids], sampling)

    def rewards(self, groups: Sequence[Group], max_tokens: int = 4096) -> list[list[float]]:
        """What the head of a reward model says of each completion of each group."""
        from guerdon.language.sharding import in_step

        found: dict[int, list[float]] = {}
        with torch.no_grad():
            for part in in_step(self.model, micro_batches(groups, max_tokens)):
                scores = iter(self.model(pack(part, self.model.device), {"scores"}).scores.tolist())
                for group in part:
                    found[id(group)] = [next(scores) for _ in range(len(group))]
        return [found[id(group)] for group in groups]

    def annotate(
        self,
        groups: Sequence[Group],
        name: str,
        wants: str = "logps",
        *,
        temperature: float = 1.0,
        max_tokens: int = 4096,
    ) -> None:
        """Store `logps`, `entropy` or `values` of every learned token in the groups' segments as `name`."""
        annotate(self.model, groups, name, wants, temperature, max_tokens)


def annotate(
    model: GroupModel, groups: Sequence[Group], name: str, wants: str, temperature: float, max_tokens: int
) -> None:
    """Compute a per-token output of `model` without gradients and store it in the groups' segments as `name`."""
    from guerdon.language.sharding import in_step

    model.eval()
    with torch.no_grad():
        for part in in_step(model, micro_batches(groups, max_tokens)):
            batch = pack(part, model.device)
            unpack(batch, name, getattr(model(batch, {wants}, temperature), wants))


def cast(model: Any, precision: str) -> None:
    """Round the parameters of a model to bf16, or widen them to fp32; buffers (rotary frequencies) stay as they are."""
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)


def resolve_precision(precision: str, model: Any) -> str:
    """`auto` is bf16 where the hardware multiplies it natively and the model is large enough to gain from it."""
    if precision != "auto":
        return precision
    large = sum(p.numel() for p in model.parameters()) > 2e7
    native = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if large and native else "fp32"
