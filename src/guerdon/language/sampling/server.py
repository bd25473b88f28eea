"""Sampling from any server that speaks OpenAI's completions protocol: vLLM, llama.cpp, or a service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from guerdon.errors import DataError, GuerdonError
from guerdon.language.sampling.base import Completion, Sampling
from guerdon.llm.endpoint import Again, Endpoint, persist
from guerdon.llm.loop import each, wait

SEEDS = 2**31  # what every server can take as a seed
PROBE = Sampling(max_new_tokens=16, temperature=0)


class ServerSampler:
    """Samples by requests to `ADDRESS/completions`, one for each completion, `at_once` of them at a time.

    Prompts go as token ids where the server gives the drawn ids back (vLLM, llama.cpp) and they mean the same in
    `tokenizer`. Otherwise they go as text, the answer's text is tokenised again, without the token that ended it, and
    completions carry no log-probs. The same holds of single answers that come without all of their ids. Log-probs are
    kept at temperatures 1 and 0 without top-k and top-p, where servers agree on what they report.

    The first call of `sample` finds out what the server can do. OPENAI_API_KEY is sent where it is set.

    Args:
        address: http://host:port/v1, or http://host:port/v1#model where the server has several; without a name it is
            the first that the server lists. /v1 may be left out.
        tokenizer: of the model that the server is asked for.
        at_once: requests under way at a time.

    Raises:
        ConfigError: no server there, a key that it does not accept, a model that it does not have, or an option that
            it does not know.
        GuerdonError: it fails, or answers something else than a completion.
    """

    def __init__(self, address: str, tokenizer: Any, at_once: int = 16):
        self.endpoint = Endpoint(address)
        self.tokenizer, self.at_once = tokenizer, at_once
        self._met = False
        self._by_ids = self._extras = True

    def sync(self, model: Any) -> None:
        """Raise `ConfigError`: nobody can give the server new weights."""
        raise self.endpoint.error(
            "a server's weights cannot follow the policy in training; use `--sampler local` or vllm. `guerdon collect` "
            "can sample from the server, and methods can learn from what it writes."
        )

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """See `Sampler.sample`."""
        work = [(prompt, seed) for prompt, own in zip(prompts, seeds, strict=True) for seed in own]
        if not work:
            return [[] for _ in prompts]
        done = iter(wait(self._sample(work, sampling)))
        return [[next(done) for _ in own] for own in seeds]

    async def _sample(self, work: list[tuple[Sequence[int], int]], sampling: Sampling) -> list[Completion]:
        if not self._met:
            await self._meet(work[0][0])
        if sampling.top_k and not self._extras:
            raise self.endpoint.error("the server knows no top_k; use top_k 0, and top_p instead.")
        done: dict[int, Completion] = {}

        async def one(item: tuple[int, tuple[Sequence[int], int]]) -> None:
            at, (prompt, seed) = item
            done[at] = await self._complete(prompt, seed, sampling)

        await each(enumerate(work), one, self.at_once)
        return [done[at] for at in range(len(work))]

    async def _meet(self, prompt: Sequence[int]) -> None:
        """Connect, settle on a model, and find out by short greedy answers what the server can do."""
        await self.endpoint.meet()
        for self._by_ids, self._extras in ((True, True), (False, True), (False, False)):
            try:
                answer = await self._ask(prompt, 0, PROBE, retries=2)
            except GuerdonError as error:
                # Some servers fail at a prompt of token ids instead of refusing it.
                failed = getattr(error.__cause__, "status_code", None) == 500
                if not (failed or isinstance(error, DataError)) or not self._extras:
                    raise
            else:
                if not self._by_ids or self._means_the_same(answer):
                    break
        self._met = True

    def _means_the_same(self, answer: dict[str, Any]) -> bool:
        """Whether the drawn ids came with an answer, and are its text in our tokenizer too."""
        tokens, _ = _drawn(answer)
        ours = self.tokenizer.decode(tokens or [], skip_special_tokens=True)
        return tokens is not None and ours.strip(" \ufffd") == answer["choices"][0]["text"].strip(" \ufffd")

    async def _complete(self, prompt: Sequence[int], seed: int, sampling: Sampling) -> Completion:
        answer = await self._ask(prompt, seed, sampling)
        choice = answer["choices"][0]
        tokens, logps = _drawn(answer) if self._by_ids else (None, [])
        if tokens is None:
            tokens, logps = self.tokenizer(choice["text"], add_special_tokens=False).input_ids, []
        if sampling.temperature not in (0, 1) or sampling.top_k or sampling.top_p < 1 or len(logps) != len(tokens):
            logps = []
        return Completion(
            tokens, np.asarray(logps, dtype=np.float32), choice.get("finish_reason") == "stop", choice["text"]
        )

    async def _ask(
        self, prompt: Sequence[int], seed: int, sampling: Sampling, retries: int | None = None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "prompt": list(prompt) if self._by_ids else self._text(prompt),
            "seed": seed % SEEDS,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if self._extras:  # the server's own defaults may not be neutral
            body |= {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
            body |= {"logprobs": 1, "return_token_ids": True}
        return await persist(lambda: self._answer(body), retries)

    async def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.endpoint.post("/completions", body)
        try:
            if isinstance(answer["choices"][0]["text"], str):
                return answer  # type: ignore[no-any-return]
        except (TypeError, LookupError):
            pass
        raise Again(self.endpoint.error("the server answers /completions with something else.", GuerdonError))

    def _text(self, prompt: Sequence[int]) -> str:
        """The prompt as the text that the server's tokenizer makes it of, which may add its first token by itself."""
        short: str = self.tokenizer.decode(prompt[1:])
        return short if self.tokenizer(short).input_ids == list(prompt) else self.tokenizer.decode(prompt)


def _drawn(answer: dict[str, Any]) -> tuple[list[int] | None, list[float]]:
    """The drawn token ids of an answer and their log-probs; None where it does not hold all of the ids."""
    choice = answer["choices"][0]
    logprobs = choice.get("logprobs") or {}
    if choice.get("token_ids") is not None:  # vLLM
        return choice["token_ids"], logprobs.get("token_logprobs") or []
    listed = logprobs.get("content") or []  # llama.cpp; it leaves out halves of characters and stop strings
    if not listed or len(listed) != (answer.get("usage") or {}).get("completion_tokens"):
        return None, []
    return [token["id"] for token in listed], [token["logprob"] for token in listed]
