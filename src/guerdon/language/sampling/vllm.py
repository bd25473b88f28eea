"""Sampling with vLLM, on the GPU that the policy is trained on; the weights follow after each update."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from guerdon.errors import ConfigError
from guerdon.language.models import save_model
from guerdon.language.sampling.base import Completion, Sampling
from guerdon.lazy import torch

MOST_LOGPROBS = 20  # that vLLM gives of one token
MEMORY_SHARE = 0.3  # of the GPU's memory, for vLLM's weights and cache; the rest is for training


class VLLMSampler:
    """Samples with a vLLM engine, which is started at the first call.

    The engine reads the policy from safetensors in a temporary directory, in the policy's own precision and with a LoRA
    adapter merged in; after updates they are written anew and reloaded before the next completions are drawn. A
    completion is fixed by its prompt and seed as far as vLLM's kernels round alike in batches of other sizes.

    Log-probs are vLLM's processed ones. Without top-k and top-p they are those at the sampling temperature; with
    either they would be those of what was left to draw from, and completions carry none.

    Args:
        model: the policy as a `GroupModel`.
        tokenizer: its tokenizer.
        stop_ids: token ids that end a completion.

    Raises:
        ConfigError: vLLM cannot be imported, or several processes train together.
    """

    def __init__(self, model: Any, tokenizer: Any, stop_ids: set[int]):
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"the sampler 'vllm' needs the package vllm ({error}): `pip install 'guerdon[vllm]'` brings it; "
                "`--sampler local` needs nothing."
            ) from error
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigError("the sampler 'vllm' works in one process; with several, use `--sampler local`.")
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, sorted(stop_ids)
        self._vllm = vllm
        self._engine: Any = None
        self._stale = True
        self._weights: tempfile.TemporaryDirectory[str] | None = None

    def sync(self, model: Any) -> None:
        """Take over the weights of `model`, at the next call of `sample`."""
        self.model, self._stale = model, True

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """See `Sampler.sample`."""
        work = [(prompt, seed) for prompt, own in zip(prompts, seeds, strict=True) for seed in own]
        if not work:
            return [[] for _ in prompts]
        drawn = iter(
            self._current().generate(
                [{"prompt_token_ids": list(prompt)} for prompt, _ in work],
                [self._parameters(seed, sampling) for _, seed in work],
                use_tqdm=False,
            )
        )
        whole = not sampling.top_k and sampling.top_p == 1
        return [[_completion(next(drawn).outputs[0], whole) for _ in own] for own in seeds]

    def can_rank(self, continuations: Sequence[Sequence[int]]) -> bool:
        """Whether `next_logps` can say which of these is likeliest: single tokens, and few enough."""
        return len(continuations) <= MOST_LOGPROBS and all(len(tokens) == 1 for tokens in continuations)

    def next_logps(self, prompts: Sequence[Sequence[int]], allowed: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each prompt the log-probs of some tokens as its next one, up to a constant; see `can_rank`."""
        asked = [
            self._vllm.SamplingParams(max_tokens=1, allowed_token_ids=list(ids), logprobs=len(ids)) for ids in allowed
        ]
        found = self._current().generate([{"prompt_token_ids": list(p)} for p in prompts], asked, use_tqdm=False)
        said = [output.outputs[0].logprobs[0] for output in found]
        return [np.array([at[token].logprob for token in ids]) for at, ids in zip(said, allowed, strict=True)]

    def _parameters(self, seed: int, sampling: Sampling) -> Any:
        return self._vllm.SamplingParams(
            seed=seed,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
            stop=list(sampling.stop),
            stop_token_ids=self.stop_ids,
            logprobs=0,  # of the drawn token alone
        )

    def _current(self) -> Any:
        """The engine, with the policy's latest weights."""
        if not self._stale:
            return self._engine
        weights = tempfile.TemporaryDirectory(prefix="guerdon-vllm-")
        model = self.model.model
        if hasattr(model, "merge_and_unload"):
            model = copy.deepcopy(model).merge_and_unload()
        save_model(model, self.tokenizer, weights.name)
        if self._engine is None:
            self._engine = self._vllm.LLM(
                model=weights.name,
                dtype=str(self.model.dtype).removeprefix("torch."),
                gpu_memory_utilization=MEMORY_SHARE,
                max_model_len=-1,  # as long as the model allows and the memory holds
                logprobs_mode="processed_logprobs",
            )
        else:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": weights.name})
            self._engine.reset_prefix_cache()  # its keys and values are those of the old weights
        if self._weights is not None:
            self._weights.cleanup()
        self._weights, self._stale = weights, False
        return self._engine


def _completion(output: Any, whole: bool) -> Completion:
    tokens = list(output.token_ids)
    logps = [at[token].logprob for token, at in zip(tokens, output.logprobs, strict=True)] if whole else []
    return Completion(tokens, np.asarray(logps, dtype=np.float32), output.finish_reason == "stop", output.text)
