"""Sampling completions: one interface, three engines (in-process, vLLM, an OpenAI-compatible server)."""

from __future__ import annotations

from typing import Any

from guerdon.errors import ConfigError, near
from guerdon.language.sampling.base import Sampler


def make_sampler(name: str, model: Any, tokenizer: Any, stop_ids: set[int]) -> Sampler:
    """The engine called `local` or `vllm`, or the server at an http(s) address.

    Args:
        model: the policy as a `GroupModel`.
        stop_ids: token ids that end a completion.

    Raises:
        ConfigError: for any other name, or where the engine's package is not installed.
    """
    if name == "local":
        from guerdon.language.sampling.local import LocalSampler

        return LocalSampler(model, tokenizer, stop_ids)
    if name == "vllm":
        from guerdon.language.sampling.vllm import VLLMSampler

        return VLLMSampler(model, tokenizer, stop_ids)
    if name.startswith(("http://", "https://")):
        from guerdon.language.sampling.server import ServerSampler

        return ServerSampler(name, tokenizer)
    raise ConfigError(
        f"no sampler is called '{name}'.{near(name, ['local', 'vllm'])} "
        "It is local, vllm, or the address of an OpenAI-compatible server (http://...)."
    )
