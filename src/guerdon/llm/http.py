"""Any server that speaks OpenAI's protocol as a client: `guerdon serve`, vLLM, llama.cpp, or a service."""

from __future__ import annotations

import itertools
import math
from typing import Any

from guerdon.errors import DataError, GuerdonError
from guerdon.llm.base import Client, Reply, Request, Usage
from guerdon.llm.budget import Budget, Limits
from guerdon.llm.endpoint import Again, Endpoint

NEWER = "max_completion_tokens"  # what some models call max_tokens; they say so when they refuse the older name


class HTTPClient(Client):
    """Asks the model behind an address; see `Endpoint` for the address, its key and its errors.

    Scores need a server that gives log-probs of an echoed prompt: `guerdon serve` and vLLM do.

    Args:
        address: http://host:port/v1, with #model behind it where the server has several.
        budget: what may be spent.
        concurrency: requests under way at a time.
        per_minute: requests begun in a minute, evenly spaced; 0 for no limit.
        timeout: seconds for one answer.
    """

    def __init__(
        self,
        address: str,
        *,
        budget: Budget | None = None,
        concurrency: int = 8,
        per_minute: float = 0,
        timeout: float = 600,
    ):
        self.endpoint = Endpoint(address, timeout)
        self.concurrency = concurrency
        self.limits = Limits(Budget() if budget is None else budget, concurrency, per_minute)
        self._most = "max_tokens"

    async def identity(self) -> str:
        if not self.endpoint.model:
            await self.endpoint.meet()
        return f"{self.endpoint.address}#{self.endpoint.model}"

    async def _ask(self, request: Request) -> list[Reply]:
        await self.endpoint.meet()
        return await self.limits.send(request, lambda: self._reply(request))

    async def _reply(self, request: Request) -> list[Reply]:
        path, body = _body(request, self._most)
        try:
            answer = await self.endpoint.post(path, {"model": self.endpoint.model, **body})
        except DataError as error:
            if NEWER not in str(error) or NEWER in body:
                raise
            self._most = NEWER
            raise Again(error, 400) from None
        try:
            first, *rest = answer["choices"]
            choices = sorted([first, *rest], key=lambda choice: choice.get("index", 0))
            usage = _usage(answer, request)
            replies = [_reply(choice, usage if k == 0 else Usage()) for k, choice in enumerate(choices)]
        except (LookupError, TypeError, ValueError, AttributeError):
            what = f"the server answers {path} with something else."
            raise Again(self.endpoint.error(what, GuerdonError)) from None
        if len(replies) != (wanted := len(request.continuations) or request.n):
            what = f"the server gives {len(replies)} replies where {wanted} were asked for: ask for one at a time."
            raise self.endpoint.error(what, DataError)
        if request.continuations:
            return [self._scored(request, k, reply) for k, reply in enumerate(replies)]
        if request.logprobs and not all(reply.tokens or not reply.text for reply in replies):
            raise self.endpoint.error("the server gives no log-probs.", DataError)
        return replies

    def _scored(self, request: Request, k: int, echo: Reply) -> Reply:
        """The continuation's part of an echoed prompt: the tokens that hold one of its characters."""
        text = request.continuations[k]
        ends = list(itertools.accumulate(map(len, echo.tokens)))
        if not ends or ends[-1] < len(request.prompt) + len(text):
            raise self.endpoint.error(
                "the server gives no log-probs of an echoed prompt, so it cannot score.", DataError
            )
        first = next(at for at, end in enumerate(ends) if end > ends[-1] - len(text))
        return Reply(text, "score", echo.tokens[first:], echo.logps[first:], echo.usage)


def _body(request: Request, most: str) -> tuple[str, dict[str, Any]]:
    """The page that answers a request, and what it wants to be told; `most` is its name for `max_tokens`."""
    if request.continuations:
        prompts = [f"{request.prompt}{text}" for text in request.continuations]
        return "/completions", {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    body: dict[str, Any] = {
        "n": request.n,
        most: request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
    }
    if request.stop:
        body["stop"] = list(request.stop)
    if request.seed is not None:
        body["seed"] = request.seed
    if isinstance(request.prompt, str):
        return "/completions", body | {"prompt": request.prompt} | ({"logprobs": 1} if request.logprobs else {})
    return "/chat/completions", body | {"messages": request.prompt} | ({"logprobs": True} if request.logprobs else {})


def _usage(answer: dict[str, Any], request: Request) -> Usage:
    """What the server says that it took, or the most that it can have."""
    said = answer.get("usage") or {}
    if "prompt_tokens" not in said:
        return request.most()
    return Usage(int(said["prompt_tokens"]), int(said.get("completion_tokens") or 0))


def _reply(choice: dict[str, Any], usage: Usage) -> Reply:
    text = choice["message"].get("content") or "" if "message" in choice else choice["text"]
    if not isinstance(text, str):
        raise TypeError
    tokens, logps = _tokens(choice.get("logprobs") or {})
    return Reply(text, choice.get("finish_reason") or "stop", tokens, logps, usage)


def _tokens(logprobs: dict[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Tokens and their log-probs, as chats give them or as completions do."""
    if listed := logprobs.get("content"):
        return tuple(each["token"] for each in listed), tuple(float(each["logprob"]) for each in listed)
    known = (math.nan if logp is None else float(logp) for logp in logprobs.get("token_logprobs") or ())
    return tuple(logprobs.get("tokens") or ()), tuple(known)  # of the first token of an echo nothing is known
