"""Any server that speaks OpenAI's protocol as a client: `guerdon serve`, vLLM, llama.cpp, or a service."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from guerdon.errors import DataError, GuerdonError
from guerdon.llm.base import Client, Reply, Request, Usage
from guerdon.llm.budget import Budget, Limits
from guerdon.llm.endpoint import Again, Endpoint

Listener = Callable[[Request, int, str], None]
MALFORMED = (LookupError, TypeError, ValueError, AttributeError)  # what an answer of another shape gives rise to
NEWER = "max_completion_tokens"  # what some models call max_tokens; they say so when they refuse the older name


class HTTPClient(Client):
    """Asks the model behind an address; see `Endpoint` for the address, its key and its errors.

    Scores need a server that gives log-probs of an echoed prompt: `guerdon serve` and vLLM do.

    Args:
        address: http://host:port/v1, with #model behind it where the server has several.
        budget: what may be spent.
        concurrency: requests under way at a time.
        per_minute: requests begun in a minute, evenly spaced; 0 for no limit.
        timeout: seconds for one answer, or for the next event of a stream.
        stream: has replies streamed, and is told of each as it grows: the request, which of its replies, and the text
            so far, which begins anew where the stream broke and the request is made again. It is called in the thread
            of `guerdon.llm.loop`.
    """

    def __init__(
        self,
        address: str,
        *,
        budget: Budget | None = None,
        concurrency: int = 8,
        per_minute: float = 0,
        timeout: float = 600,
        stream: Listener | None = None,
    ):
        self.stream = stream
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
            answer = await self._answer(request, path, {"model": self.endpoint.model, **body})
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
        except MALFORMED:
            raise self._strange(path) from None
        if len(replies) != (wanted := len(request.continuations) or request.n):
            what = f"the server gives {len(replies)} replies where {wanted} were asked for: ask for one at a time."
            raise self.endpoint.error(what, DataError)
        if request.continuations:
            return [self._scored(request, k, reply) for k, reply in enumerate(replies)]
        if request.logprobs and not all(reply.tokens or not reply.text for reply in replies):
            raise self.endpoint.error("the server gives no log-probs.", DataError)
        return replies

    async def _answer(self, request: Request, path: str, body: dict[str, Any]) -> Any:
        if self.stream is None or request.continuations:
            return await self.endpoint.post(path, body)
        whole = _Whole()
        try:
            async with aclosing(self.endpoint.stream(path, body)) as events:
                async for event in events:
                    try:
                        grown = whole.add(event)
                    except MALFORMED:
                        raise self._strange(path) from None
                    for k in grown:
                        self.stream(request, k, whole.choices[k]["text"])
            if not whole.finished:
                raise Again(self.endpoint.error("the stream ends before its replies do.", GuerdonError))
        except Again as again:
            if whole.pieces:
                again.taken = Usage(request.most().prompt, whole.pieces)
            raise
        return {"choices": list(whole.choices.values()), "usage": whole.usage}

    def _strange(self, path: str) -> Again:
        return Again(self.endpoint.error(f"the server answers {path} with something else.", GuerdonError))

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


class _Whole:
    """A reply put together of the events of a stream.

    Attributes:
        choices: as in an answer that is not streamed, with their text.
        usage: what the server says that it took.
        pieces: of text that came: a token each, as servers stream.
    """

    def __init__(self) -> None:
        self.choices: dict[int, dict[str, Any]] = {}
        self.usage: dict[str, int] | None = None
        self.pieces = 0

    @property
    def finished(self) -> bool:
        """Whether there are replies, and all have come to their end."""
        return bool(self.choices) and all(choice["finish_reason"] for choice in self.choices.values())

    def add(self, event: dict[str, Any]) -> list[int]:
        """Which replies it has made grow."""
        grown = []
        self.usage = event.get("usage") or self.usage
        for part in event["choices"]:
            k = part.get("index", 0)
            choice = self.choices.setdefault(k, {"index": k, "text": "", "finish_reason": None, "logprobs": {}})
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            for name, values in (part.get("logprobs") or {}).items():
                if values and name in ("content", "tokens", "token_logprobs"):
                    choice["logprobs"].setdefault(name, []).extend(values)
            if text := (part["delta"].get("content") if "delta" in part else part["text"]):
                choice["text"] += text
                self.pieces += 1
                grown.append(k)
        return grown


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
