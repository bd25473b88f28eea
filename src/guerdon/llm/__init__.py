"""Black-box language models: one small client, three back ends (a server, a policy in this process, a recording)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError
from guerdon.llm.base import Client, Gathered, Reply, Request, Usage, gather
from guerdon.llm.budget import Budget, BudgetSpent
from guerdon.llm.loop import wait
from guerdon.llm.parsing import Parser

__all__ = [
    "Budget",
    "BudgetSpent",
    "Client",
    "Gathered",
    "Parser",
    "Reply",
    "Request",
    "Usage",
    "gather",
    "make_client",
    "wait",
]


def make_client(
    spec: str,
    *,
    cache: str | Path | None = None,
    record: str | Path | None = None,
    budget: Budget | None = None,
    concurrency: int | None = None,
    per_minute: float = 0,
    timeout: float = 600,
    stream: Callable[[Request, int, str], None] | None = None,
) -> Client:
    """The client that a name stands for.

    Args:
        spec: `http://host:port/v1` or `https://...`, with `#model` behind it where the server has several; a run
            directory or any model that `load_model` takes, which answers in this process; or `cassette:PATH`.
        cache: SQLite file that keeps every reply; see `guerdon.llm.cache`.
        record: cassette to write; what stands in it is replayed.
        budget: what may be spent; no limit without it.
        concurrency: requests under way at a time; by default 8 at a server, and 64 in this process, where they share
            batches.
        per_minute: requests begun in a minute, evenly spaced; 0 for no limit.
        timeout: seconds that a server may take to answer, or to go on with a stream.
        stream: has the replies of a server streamed, and is told of each as it grows: the request, which of its
            replies, and the text so far. What comes from a cache or a cassette is not told.

    Raises:
        ConfigError: an address, model or cassette that does not exist, or options that it cannot take.
    """
    from guerdon.llm.cache import Cache, Remembering
    from guerdon.llm.cassette import Cassette

    client: Client
    if spec.startswith("cassette:"):
        if cache is not None or record is not None:
            raise ConfigError(f"{spec}: a cassette is replayed as it is; it takes neither cache nor record.")
        return Remembering(Cassette(spec.removeprefix("cassette:")))
    how: dict[str, Any] = {"budget": budget} | ({} if concurrency is None else {"concurrency": concurrency})
    if spec.startswith(("http://", "https://")):
        from guerdon.llm.http import HTTPClient

        client = HTTPClient(spec, per_minute=per_minute, timeout=timeout, stream=stream, **how)
    elif stream is not None:
        raise ConfigError(f"{spec}: only a server's replies are streamed, and this is no address (http://...).")
    else:
        from guerdon.llm.local import LocalClient

        client = LocalClient.load(spec, **how)
    if cache is not None:
        client = Remembering(Cache(cache), client)
    if record is not None:
        client = Remembering(Cassette(record, wait(client.identity())), client)
    return client
