"""Replies in a text file, to be replayed without model or network: for tests, and for exact reruns.

The first line says which model was recorded; each other one holds a request and its replies, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.llm.base import Reply, Request
from guerdon.llm.cache import FORMAT, replies_from


class Cassette:
    """Replies in a JSONL file, one process at a time; a line that a kill cut short is recorded again.

    Args:
        path: of the file.
        identity: of the model that is recorded; without it the file is only read.

    Attributes:
        identity: of the model that was recorded.

    Raises:
        ConfigError: there is no such file, or another model was recorded in it.
        DataError: a line that cannot be read.
    """

    def __init__(self, path: str | Path, identity: str | None = None):
        self.path = Path(path)
        self._replies: dict[str, list[Reply]] = {}
        if not self.path.is_file():
            if identity is None:
                raise ConfigError(f"cassette {path}: there is no such file. Record it first, with `record`.")
            self.identity = identity
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"cassette": FORMAT, "model": identity})
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        if identity is not None and lines and not lines[-1].endswith(b"\n"):
            torn = lines.pop()
            with self.path.open("rb+") as file:
                file.truncate(self.path.stat().st_size - len(torn))
        self.identity = self._read(lines)
        if identity not in (None, self.identity):
            raise ConfigError(
                f"cassette {path} was recorded with {self.identity}, not with {identity}: choose another file."
            )

    def get(self, key: str) -> list[Reply] | None:
        """The replies to a request, or None."""
        return self._replies.get(key)

    def put(self, key: str, request: Request, replies: list[Reply]) -> None:
        """Write down the replies to a request."""
        self._replies[key] = replies
        told = {"request": dataclasses.asdict(request), "replies": [dataclasses.asdict(reply) for reply in replies]}
        self._append({"key": key, **told})

    def _read(self, lines: list[bytes]) -> str:
        """The identity of the model that was recorded; fills `_replies`."""
        identity = ""
        for number, line in enumerate(lines or [b""], 1):
            try:
                if number == 1:
                    head: dict[str, Any] = json.loads(line)
                    identity = head["model"]
                    if head["cassette"] != FORMAT:
                        raise ValueError(f"it is of another format, {head['cassette']}")
                elif line.endswith(b"\n"):
                    told = json.loads(line)
                    self._replies.setdefault(told["key"], replies_from(told["replies"]))
            except (ValueError, LookupError, TypeError) as error:
                raise DataError(f"{self.path}:{number}: this is no line of a cassette ({error}).") from error
        return identity

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
