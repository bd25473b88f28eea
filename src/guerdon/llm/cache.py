"""Replies that are kept on disk: what was asked once is not asked again, also by another process or after a kill.

A request without a seed that is sampled asks for something new. Its k-th repetition by one client is therefore stored,
and found again, as the k-th draw: a program that is run again gets the same replies, and never one reply twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.llm.base import Client, Reply, Request, Usage

FORMAT = 1  # of what is stored


class Store(Protocol):
    """Keeps replies by the key of their request.

    Attributes:
        identity: of the model whose replies it keeps; empty where they are of many.
    """

    path: Path
    identity: str

    def get(self, key: str) -> list[Reply] | None: ...

    def put(self, key: str, request: Request, replies: list[Reply]) -> None:
        """Keep replies; the first that are put stay."""
        ...


class Remembering(Client):
    """Replies from a store, and asks another client for what is not in it.

    Args:
        store: a `Cache` or a `Cassette`.
        client: who is asked; without one, everything has to be in the store.

    Attributes:
        found, asked: requests that were answered from the store, and by the client.
    """

    def __init__(self, store: Store, client: Client | None = None):
        self.store, self.client = store, client
        self.concurrency = 64 if client is None else client.concurrency
        self.found = self.asked = 0
        self._drawn = Counter[str]()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def identity(self) -> str:
        return self.store.identity if self.client is None else await self.client.identity()

    async def _ask(self, request: Request) -> list[Reply]:
        key = request.key(FORMAT, await self.identity())
        if request.seed is None and request.temperature and not request.continuations:
            draw = self._drawn[key]
            self._drawn[key] += 1
            key = f"{key}-{draw}" if draw else key
        async with self._locks.setdefault(key, asyncio.Lock()):  # the same request at the same time is asked once
            replies = self.store.get(key)
            if replies is not None:
                self.found += 1
                return replies
            if self.client is None:
                raise GuerdonError(
                    f"{self.store.path} holds no reply to this request; record it with the model. Its prompt: "
                    f"{json.dumps(request.prompt)[:200]}"
                )
            replies = await self.client.ask(request)
            self.asked += 1
            self.store.put(key, request, replies)
            return self.store.get(key) or replies  # another process may have been first


class Cache:
    """Replies in an SQLite file, which processes may share and which survives their being killed.

    It holds prompts and replies, and no keys. On file systems of a network SQLite's locks cannot be relied on.

    Raises:
        ConfigError: the file cannot be made.
        DataError: it is something else than a cache.
    """

    identity = ""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            if not self.path.exists():
                _create(self.path)
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA synchronous = NORMAL")
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        except (OSError, sqlite3.OperationalError) as error:
            raise ConfigError(f"cache {path} cannot be opened: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path} is no cache of replies ({error}): choose another file, or delete it.") from error
        if version != FORMAT:
            raise DataError(f"{path} is no cache of replies that this version can read: choose another file.")

    def get(self, key: str) -> list[Reply] | None:
        """The replies to a request, or None."""
        row = self._execute("SELECT replies FROM replies WHERE key = ?", key)
        return None if row is None else replies_from(json.loads(row[0]))

    def put(self, key: str, request: Request, replies: list[Reply]) -> None:
        """Keep the replies to a request; those of another process that came first stay."""
        told = [json.dumps(dataclasses.asdict(request)), json.dumps([dataclasses.asdict(reply) for reply in replies])]
        self._execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", key, *told)

    def _execute(self, statement: str, *values: str) -> Any:
        try:
            return self._connection.execute(statement, values).fetchone()
        except sqlite3.DatabaseError as error:
            raise GuerdonError(f"cache {self.path}: {error}. Delete it, or go on without it.") from error


def replies_from(plain: list[dict[str, Any]]) -> list[Reply]:
    """Replies from what `json` made of them."""
    return [
        Reply(
            **{**each, "tokens": tuple(each["tokens"]), "logps": tuple(each["logps"]), "usage": Usage(**each["usage"])}
        )
        for each in plain
    ]


def _create(path: Path) -> None:
    """An empty cache that appears whole: whoever comes second takes the first one's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".cache-") as scratch:
        made = Path(scratch) / "made"
        connection = sqlite3.connect(made, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("CREATE TABLE replies (key TEXT PRIMARY KEY, request TEXT, replies TEXT) WITHOUT ROWID")
        connection.close()
        with contextlib.suppress(FileExistsError):
            os.link(made, path)
