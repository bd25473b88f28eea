"""What every sampling engine takes and returns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: tokens that a completion may have.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens; 0 among all.
        top_p: draw among the likeliest tokens that together hold this probability.
        stop: strings that end a completion.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        tokens: token ids as drawn, the end-of-sequence token included.
        logps: (len(tokens),) log-probs in nats under the softmax at the sampling temperature, before top-k and top-p,
            so that they are comparable with the log-probs that a loss computes. Empty where the engine gives none.
        finished: whether it ended by itself (end of sequence or a stop string) and was not cut at max_new_tokens.
        text: the tokens as text, without special tokens and without the stop string.
    """

    tokens: list[int]
    logps: np.ndarray
    finished: bool
    text: str


class Sampler(Protocol):
    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """len(seeds[i]) completions of each prompt; a completion depends on its prompt and seed, not on the batch."""
        ...

    def sync(self, model: Any) -> None:
        """Take over the weights of `model` after an update."""
        ...


def completion_seeds(n: int, *identity: object) -> list[int]:
    """n seeds derived from what identifies a prompt within a run (seed, round, key), the same on every machine."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return [int(s) for s in np.random.default_rng(int.from_bytes(digest, "little")).integers(0, 2**63, n)]
