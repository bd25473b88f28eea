"""What is asked of a language model, what it replies, and the one interface of all clients.

    client = make_client("http://127.0.0.1:8000/v1", budget=Budget(tokens=100_000))
    replies = await client.chat([{"role": "user", "content": "1 + 1 ="}], n=4)
    found = gather(client, [Request(prompt=p, max_tokens=8) for p in prompts])

A prompt that is a string is completed; one that is a list of messages is answered. Left out are tool calls and images:
what a model may do is written in its prompt. Methods read whole replies; who wants to see one grow has it streamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.feedback.records import Message, Text
from guerdon.fields import check_range
from guerdon.llm.loop import each, in_loop, wait


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.completion + other.completion)

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.prompt - other.prompt, self.completion - other.completion)

    @property
    def total(self) -> int:
        """Both together."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and what is wanted of it: n replies, or the log-probs of given continuations.

    Attributes:
        prompt: a string to be continued, or a list of messages to be answered.
        n: replies.
        max_tokens: tokens that a reply may have.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together hold this probability.
        stop: strings that end a reply and are not part of it.
        seed: the same replies for the same seed, as far as the model behind keeps its word; None for new ones.
        logprobs: whether replies carry tokens with log-probs.
        continuations: of a string; they are scored and nothing is sampled.

    Raises:
        ConfigError: a value out of its range.
    """

    prompt: Text
    n: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None
    logprobs: bool = False
    continuations: Sequence[str] = ()

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        check_range(values, "n", "max_tokens", low=1)
        check_range(values, "temperature")
        check_range(values, "top_p", high=1, above=True)
        if isinstance(self.stop, str) or isinstance(self.continuations, str):
            raise ConfigError("stop and continuations are lists of strings, not one string.")
        if "" in (*self.stop, *self.continuations):
            raise ConfigError("an empty string is no stop string and no continuation.")
        if self.continuations and not isinstance(self.prompt, str):
            raise ConfigError("continuations are scored after a string, not after messages.")

    def key(self, *identity: object) -> str:
        """A hash of the whole request and of what else tells its replies apart."""
        content = json.dumps([*identity, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def most(self) -> Usage:
        """The most tokens that it can take: one for each byte of the prompt, a header for each message, all replies."""
        turns = [self.prompt] if isinstance(self.prompt, str) else [json.dumps(turn) for turn in self.prompt]
        size = sum(len(turn.encode()) + 32 for turn in turns)
        if self.continuations:
            return Usage(sum(size + len(text.encode()) for text in self.continuations))
        return Usage(size, self.n * self.max_tokens)


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply.

    Attributes:
        text: without special tokens and without the stop string; of a score the continuation.
        finish: `stop` where it ended by itself or at a stop string, `length` where it was cut at `max_tokens`, or
            another word of the server's; `score` for a continuation.
        tokens: as text, those that end it included where the back end gives them; empty unless log-probs are asked for.
        logps: log-prob in nats of each of them, under the softmax at temperature 1 or, in this process, at the sampling
            temperature, before top-p.
        usage: tokens of the whole request, on the first of its replies; on the others nothing, so that sums are right.
    """

    text: str
    finish: str
    tokens: tuple[str, ...] = ()
    logps: tuple[float, ...] = ()
    usage: Usage = Usage()


class Client:
    """Asks one language model. Back ends implement `_ask` and `identity`; everything else is here.

    Attributes:
        concurrency: requests that `gather` keeps under way.
    """

    concurrency: int

    async def identity(self) -> str:
        """What tells the model behind from all others, for caches and cassettes."""
        raise NotImplementedError

    async def _ask(self, request: Request) -> list[Reply]:
        raise NotImplementedError

    async def ask(self, request: Request) -> list[Reply]:
        """The replies to a request, from any event loop.

        Raises:
            ConfigError: a model, address or key that the user has to mend.
            DataError: the request is refused (too long a prompt, for one); others may be answered.
            GuerdonError: the budget is spent (`BudgetSpent`), or the server fails after all retries.
        """
        return await in_loop(self._ask(request))

    async def chat(self, messages: Sequence[Message], **how: Any) -> list[Reply]:
        """Answers to a conversation; `how` are the other fields of `Request`."""
        return await self.ask(Request(prompt=list(messages), **how))

    async def complete(self, prompt: str, **how: Any) -> list[Reply]:
        """Continuations of a text; `how` are the other fields of `Request`."""
        return await self.ask(Request(prompt=prompt, **how))

    async def score(self, prompt: str, continuations: Sequence[str]) -> list[np.ndarray]:
        """Log-probs (nats, temperature 1) of each continuation's tokens after the prompt.

        A token that straddles the boundary belongs to the continuation.
        """
        if not continuations:
            return []
        replies = await self.ask(Request(prompt=prompt, continuations=continuations))
        return [np.array(reply.logps) for reply in replies]


@dataclass
class Gathered:
    """What came of many requests.

    Attributes:
        replies: of each request in turn; None where there are none.
        refused: request -> what the model's side has against it (its number, from 0).
        stopped: why the rest was not asked: a spent budget, a server that went away; empty where all were.
    """

    replies: list[list[Reply] | None]
    refused: dict[int, str] = field(default_factory=dict)
    stopped: str = ""

    def usage(self) -> Usage:
        """Tokens of all requests that were answered."""
        return sum((reply.usage for replies in self.replies for reply in replies or []), Usage())

    def complete(self) -> list[list[Reply]]:
        """All replies; raises `GuerdonError` where one is missing, saying why and how many there are."""
        found = [replies for replies in self.replies if replies is not None]
        if len(found) < len(self.replies):
            why = self.stopped or "; ".join(f"request {i}: {what}" for i, what in list(self.refused.items())[:3])
            raise GuerdonError(f"{len(found)} of {len(self.replies)} requests were answered. {why}")
        return found


def gather(
    client: Client, requests: Sequence[Request], progress: Callable[[int, int], None] = lambda done, total: None
) -> Gathered:
    """Ask many requests, `client.concurrency` at a time; what was gathered comes back also where it has to stop early.

    Args:
        progress: is told after each request how many of how many were dealt with; it may not ask the client itself.

    Raises:
        ConfigError: nothing could be asked at all.
    """
    found = Gathered([None] * len(requests))
    done = 0

    async def one(item: tuple[int, Request]) -> None:
        nonlocal done
        if found.stopped:
            return
        at, request = item
        try:
            found.replies[at] = await client.ask(request)
        except DataError as error:
            found.refused[at] = str(error)
        except GuerdonError as error:
            if isinstance(error, ConfigError) and not any(found.replies):
                raise
            found.stopped = found.stopped or str(error)
            return
        done += 1
        progress(done, len(requests))

    wait(each(enumerate(requests), one, client.concurrency))
    return found
