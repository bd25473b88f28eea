"""Sampling from any server that speaks OpenAI's completions protocol: vLLM, llama.cpp, or a service."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from guerdon.errors import ConfigError, GuerdonError, near
from guerdon.language.sampling.base import Completion, Sampling

RETRIES = 5  # of a request that was not answered, or answered with 408, 409, 429 or 5xx; 0.5, 1, 2, ... seconds apart
REFUSALS = (400, 422, 500)  # some servers fail at a prompt of token ids instead of refusing it
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
        address, _, self.model = address.partition("#")
        self.address = address.rstrip("/")
        try:
            parts = urlsplit(self.address)
            _ = parts.port  # raises where it is no number
        except ValueError as error:
            raise self._error(f"this is no address: {error}.") from error
        if not parts.path:
            self.address += "/v1"
        self.tokenizer, self.at_once = tokenizer, at_once
        self._client: Any = None
        self._by_ids = self._extras = True

    def sync(self, model: Any) -> None:
        """Raise `ConfigError`: nobody can give the server new weights."""
        raise self._error(
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
        if self._client is None:
            self._meet(work[0][0])
        if sampling.top_k and not self._extras:
            raise self._error("the server knows no top_k; use top_k 0, and top_p instead.")
        with ThreadPoolExecutor(self.at_once) as pool:
            done = pool.map(lambda job: self._complete(job[0], job[1], sampling), work)
            return [[next(done) for _ in own] for own in seeds]

    def _meet(self, prompt: Sequence[int]) -> None:
        """Connect, settle on a model, and find out by short greedy answers what the server can do."""
        try:
            import openai
        except ImportError as error:
            raise self._error("this needs the package openai: `pip install 'guerdon[openai]'` brings it.") from error
        key = os.environ.get("OPENAI_API_KEY") or "none"
        client = openai.OpenAI(base_url=self.address, api_key=key, max_retries=RETRIES)
        try:
            listed: Any = client.get("/models", cast_to=object)
            names = [model["id"] for model in listed["data"]]
        except openai.OpenAIError as error:
            raise self._failure(error) from error
        except (ValueError, TypeError, KeyError) as error:
            raise self._error("/models is no list of models: this is no OpenAI-compatible server.") from error
        if not names or (self.model and self.model not in names):
            listing = ", ".join(names[:10]) or "none"
            raise self._error(f"the server has no model '{self.model}'.{near(self.model, names)} It has: {listing}.")
        self.model = self.model or names[0]
        for self._by_ids, self._extras in ((True, True), (False, True), (False, False)):
            try:
                answer = self._ask(client.with_options(max_retries=2), prompt, 0, PROBE)
            except GuerdonError as error:
                if getattr(error.__cause__, "status_code", None) not in REFUSALS or not self._extras:
                    raise
            else:
                if not self._by_ids or self._means_the_same(answer):
                    break
        self._client = client

    def _means_the_same(self, answer: dict[str, Any]) -> bool:
        """Whether the drawn ids came with an answer, and are its text in our tokenizer too."""
        tokens, _ = _drawn(answer)
        ours = self.tokenizer.decode(tokens or [], skip_special_tokens=True)
        return tokens is not None and ours.strip(" \ufffd") == answer["choices"][0]["text"].strip(" \ufffd")

    def _complete(self, prompt: Sequence[int], seed: int, sampling: Sampling) -> Completion:
        answer = self._ask(self._client, prompt, seed, sampling)
        choice = answer["choices"][0]
        tokens, logps = _drawn(answer) if self._by_ids else (None, [])
        if tokens is None:
            tokens, logps = self.tokenizer(choice["text"], add_special_tokens=False).input_ids, []
        if sampling.temperature not in (0, 1) or sampling.top_k or sampling.top_p < 1 or len(logps) != len(tokens):
            logps = []
        return Completion(
            tokens, np.asarray(logps, dtype=np.float32), choice.get("finish_reason") == "stop", choice["text"]
        )

    def _ask(self, client: Any, prompt: Sequence[int], seed: int, sampling: Sampling) -> dict[str, Any]:
        import openai

        body: dict[str, Any] = {
            "model": self.model,
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
        try:
            answer: Any = client.post("/completions", body=body, cast_to=object)
            if isinstance(answer["choices"][0]["text"], str):
                return answer  # type: ignore[no-any-return]
        except openai.OpenAIError as error:
            raise self._failure(error) from error
        except (ValueError, TypeError, KeyError, IndexError):
            pass
        raise self._error("the server answers /completions with something else.", GuerdonError)

    def _text(self, prompt: Sequence[int]) -> str:
        """The prompt as the text that the server's tokenizer makes it of, which may add its first token by itself."""
        short: str = self.tokenizer.decode(prompt[1:])
        return short if self.tokenizer(short).input_ids == list(prompt) else self.tokenizer.decode(prompt)

    def _failure(self, error: Any) -> GuerdonError:
        """The one message for what went wrong with a request."""
        status, body = getattr(error, "status_code", None), getattr(error, "body", None)
        key = os.environ.get("OPENAI_API_KEY")
        said = str((isinstance(body, dict) and body.get("message")) or error.__cause__ or error)[:300]
        said = said.replace(key, "...") if key else said
        if status in (401, 403):
            what = f"does not accept the key in OPENAI_API_KEY ({status})" if key else "wants a key: set OPENAI_API_KEY"
            return self._error(f"the server {what}.")
        if status is None:
            return self._error(f"no answer ({said}). Is the server running, and the address right?")
        if status == 404:
            return self._error(f"the server has no such page (404: {said}). Most addresses end in /v1.")
        if status == 429:
            return self._error(f"too many requests (429: {said}). Go on later.", GuerdonError)
        return self._error(f"the server answers with status {status}: {said}", GuerdonError)

    def _error(self, what: str, kind: type[GuerdonError] = ConfigError) -> GuerdonError:
        return kind(f"sampler {self.address}: {what}")


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
