"""A server that speaks OpenAI's protocol: its address, its models, its errors, and when to ask again.

The key is read from OPENAI_API_KEY at each connection and goes nowhere but into the header of requests; what a server
says in an error is told without it.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from guerdon.errors import ConfigError, DataError, GuerdonError, near

if TYPE_CHECKING:
    from guerdon.llm.base import Usage

T = TypeVar("T")

RETRIES = 5  # of a request that was not answered, only in part, or with 408, 409, 429 or 5xx
BACKOFF = 0.5  # seconds before the first of them, doubled at each, unless the server says how long
PATIENCE = 120.0  # the longest wait in seconds that a server may ask for
REFUSALS = (400, 413, 422)  # statuses that say something of the request alone


class Again(Exception):
    """An attempt failed in a way that the next one may not.

    Attributes:
        error: what is raised when there is no next one.
        wait: seconds that the server asks for, or None.
        status_code: of the answer; None where no whole one came, so that the work may have been done all the same.
        taken: tokens that it took, where that is known.
    """

    def __init__(self, error: GuerdonError, status_code: int | None = None, wait: float | None = None):
        super().__init__(str(error))
        self.error, self.status_code, self.wait = error, status_code, wait
        self.taken: Usage | None = None


async def persist(attempt: Callable[[], Awaitable[T]], retries: int | None = None) -> T:
    """The result of `attempt`, made again up to `retries` times (by default `RETRIES`) while it raises `Again`."""
    for delay in [*(BACKOFF * 2**k for k in range(RETRIES if retries is None else retries)), None]:
        try:
            return await attempt()
        except Again as again:
            if delay is None or (again.wait or 0) > PATIENCE:
                raise again.error from again
            await asyncio.sleep(random.uniform(delay / 2, delay) if again.wait is None else again.wait)
    raise AssertionError("the last attempt returns or raises")


class Endpoint:
    """The server at an address.

    Args:
        address: http://host:port/v1, or http://host:port/v1#model where the server has several; without a name it is
            the first that the server lists. /v1 may be left out.
        timeout: seconds for one answer.

    Raises:
        ConfigError: no address, one that holds a password or a query, or the package openai is missing.
    """

    def __init__(self, address: str, timeout: float = 600):
        address, _, self.model = address.partition("#")
        self.address = address.rstrip("/")
        try:
            parts = urlsplit(self.address)
            _ = parts.port  # raises where it is no number
        except ValueError as error:
            raise self.error(f"this is no address: {error}.") from error
        if parts.username is not None or parts.query:
            self.address = f"{parts.scheme}://{parts.hostname}"
            raise self.error("an address holds no password, key or query: the key is read from OPENAI_API_KEY.")
        if not parts.path:
            self.address += "/v1"
        self.timeout = timeout
        self._client: Any = None
        self._meeting = asyncio.Lock()

    async def meet(self) -> None:
        """Connect and settle on a model, at the first call.

        Raises:
            ConfigError: no server there, a key that it does not accept, or a model that it does not have.
        """
        async with self._meeting:
            if self._client is not None:
                return
            try:
                import openai
            except ImportError as error:
                raise self.error("this needs the package openai: `pip install 'guerdon[openai]'` brings it.") from error
            key = _key() or "none"
            client = openai.AsyncOpenAI(base_url=self.address, api_key=key, timeout=self.timeout, max_retries=0)
            names = await persist(lambda: self._models(client))
            if not names or (self.model and self.model not in names):
                listing = ", ".join(names[:10]) or "none"
                raise self.error(f"the server has no model '{self.model}'.{near(self.model, names)} It has: {listing}.")
            self.model, self._client = self.model or names[0], client

    async def _models(self, client: Any) -> list[str]:
        listed = self._json(await self._once(lambda: client.get("/models", cast_to=object)))
        try:
            return [model["id"] for model in listed["data"]]
        except (TypeError, KeyError):
            raise self.error("/models is no list of models: this is no OpenAI-compatible server.") from None

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's answer as JSON, in one attempt.

        Raises:
            Again: what may be gone at the next one.
            ConfigError, DataError, GuerdonError: what will not.
        """
        return self._json(await self._once(lambda: self._client.post(path, body=body, cast_to=object)))

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """The events of the server's answer as JSON, as they come, in one attempt; raises what `post` does.

        `timeout` holds for each of them.
        """
        import openai

        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        how = {"cast_to": object, "stream": True, "stream_cls": openai.AsyncStream[object]}
        events = await self._once(lambda: self._client.post(path, body=body, **how))
        try:
            while (event := await self._once(lambda: anext(events, None))) is not None:
                yield self._json(event)
        finally:
            await events.close()

    async def _once(self, request: Callable[[], Awaitable[Any]]) -> Any:
        import openai

        # openai 2 lets errors of its transport, httpx, through where they break a stream.
        transport = [sys.modules["httpx"].TransportError] if "httpx" in sys.modules else []
        try:
            return await request()
        except openai.APIStatusError as error:
            failure = self._failure(error)
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise Again(failure, error.status_code, _retry_after(error.response.headers)) from None
            raise failure from None  # what it is made of may hold the key
        except (openai.APIConnectionError, *transport) as error:
            said = _without_key(str(error.__cause__ or error)) or type(error).__name__
            failure = self.error(f"no answer ({said}). Is the server running, and the address right?")
            raise Again(failure) from None
        except (ValueError, openai.OpenAIError) as error:
            if type(error) is openai.APIError:  # an event of a stream
                said = _without_key(error.message)[:300]
                raise Again(self.error(f"the server ends its stream with an error: {said}", GuerdonError)) from None
            return None

    def _json(self, answer: Any) -> Any:
        if isinstance(answer, (dict, list)):
            return answer
        raise Again(self.error("the server answers with something else than JSON.", GuerdonError))

    def _failure(self, error: Any) -> GuerdonError:
        """The one message for what a status says."""
        status, body, key = error.status_code, error.body, _key()
        said = _without_key(str((isinstance(body, dict) and body.get("message")) or error))[:300]
        if status in (401, 403):
            what = f"does not accept the key in OPENAI_API_KEY ({status})" if key else "wants a key: set OPENAI_API_KEY"
            return self.error(f"the server {what}.")
        if status == 404:
            return self.error(f"the server has no such page (404: {said}). Most addresses end in /v1.")
        if status == 429:
            return self.error(f"too many requests (429: {said}). Go on later.", GuerdonError)
        kind = DataError if status in REFUSALS else GuerdonError
        return self.error(f"the server answers with status {status}: {said}", kind)

    def error(self, what: str, kind: type[GuerdonError] = ConfigError) -> GuerdonError:
        """An error that says which server it is about."""
        return kind(f"{self.address}: {what}")


def _key() -> str | None:
    return os.environ.get("OPENAI_API_KEY")


def _without_key(said: str) -> str:
    return said.replace(key, "...") if (key := _key()) else said


def _retry_after(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date."""
    said = headers.get("retry-after") or ""
    try:
        return max(float(said), 0.0)
    except ValueError:
        date = email.utils.parsedate_tz(said)
        return max(email.utils.mktime_tz(date) - time.time(), 0.0) if date else None
