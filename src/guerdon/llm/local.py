"""A language policy in this process as a client: no server, no network; requests that wait together share a batch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Sampling, completion_seeds
from guerdon.language.templates import continued_ids, prompt_ids
from guerdon.llm.base import Client, Reply, Request, Usage
from guerdon.llm.budget import Budget, Limits
from guerdon.llm.engine import Engine


class LocalClient(Client):
    """Asks a policy; its replies to a seed are those of `Policy.answer`.

    Args:
        policy: what `guerdon.load_policy` returns for a language model.
        budget: what may be spent.
        concurrency: requests under way at a time, and so the most that share a batch.
    """

    def __init__(self, policy: Policy, *, budget: Budget | None = None, concurrency: int = 64):
        self.engine = Engine(policy)
        self.concurrency = concurrency
        self.limits = Limits(Budget() if budget is None else budget, concurrency)

    @classmethod
    def load(cls, name: str | Path, **how: Any) -> LocalClient:
        """The policy of a run directory, or any model that `load_model` takes."""
        return cls(Policy.load(name), **how)

    async def identity(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        from guerdon.language.models import fingerprint

        return f"weights {fingerprint(self.engine.policy.model.model)}"

    async def _ask(self, request: Request) -> list[Reply]:
        return await self.limits.send(request, lambda: self._reply(request))

    async def _reply(self, request: Request) -> list[Reply]:
        tokenizer = self.engine.policy.tokenizer
        if request.continuations:
            pairs = [continued_ids(str(request.prompt), text, tokenizer) for text in request.continuations]
            logps = await self.engine.score(pairs)
            usage = Usage(sum(len(before) + len(after) for before, after in pairs))
            return [
                Reply(text, "score", pieces(after, tokenizer), tuple(own.tolist()), usage if k == 0 else Usage())
                for k, (text, (_, after), own) in enumerate(zip(request.continuations, pairs, logps, strict=True))
            ]
        ids = prompt_ids(request.prompt, tokenizer)
        seed = secrets.randbits(62) if request.seed is None else request.seed
        sampling = Sampling(
            max_new_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            stop=tuple(request.stop),
        )
        completions = await self.engine.sample(ids, completion_seeds(request.n, seed, *ids), sampling)
        usage = Usage(len(ids), sum(len(c.tokens) for c in completions))
        return [
            Reply(
                completion.text,
                "stop" if completion.finished else "length",
                pieces(completion.tokens, tokenizer) if request.logprobs else (),
                tuple(completion.logps.tolist()) if request.logprobs else (),
                usage if k == 0 else Usage(),
            )
            for k, completion in enumerate(completions)
        ]


def pieces(ids: Sequence[int], tokenizer: Any) -> tuple[str, ...]:
    """The text of each token, as it reads after the one before; their concatenation is the whole text.

    Of a character that several tokens make up, the first has it and the others are empty.
    """
    found: list[str] = []
    before: list[int] = []
    part: list[int] = []
    for k, token in enumerate(ids):
        part.append(token)
        text = tokenizer.decode(before + part)[len(tokenizer.decode(before)) :]
        if k + 1 == len(ids) or not text.endswith("\ufffd"):
            found += [text, *[""] * (len(part) - 1)]
            before, part = [token], []
    return tuple(found)
