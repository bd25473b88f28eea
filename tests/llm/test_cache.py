"""The cache on disk: what was asked once is not asked again, by whichever process, and whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

import guerdon
from guerdon.errors import ConfigError, DataError
from guerdon.llm.base import Client, Reply, Request, Usage, gather
from guerdon.llm.cache import Cache, Remembering
from guerdon.llm.loop import wait

WRITER = """
import sys
from guerdon.llm.base import Reply, Request
from guerdon.llm.cache import Cache

path, who = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
cache = Cache(path)
for i in range(10**6):
    cache.put(f"{who}-{i}", Request(prompt=str(i)), [Reply(f"{who} says {i} " + "x" * 500, "stop")])
    cache.put(f"both-{i}", Request(prompt=str(i)), [Reply(f"{who} says {i}", "stop")])
    print(i, flush=True)
"""


class Counting(Client):
    """Replies with how often it was asked."""

    concurrency = 4

    def __init__(self, name: str = "counting"):
        self.name, self.asked = name, 0

    async def identity(self) -> str:
        return self.name

    async def _ask(self, request: Request) -> list[Reply]:
        self.asked += 1
        return [Reply(str(self.asked), "stop", ("é", "\n"), (-0.5, float("-inf")), Usage(3, 4))]


def texts(client: Client, *requests: Request) -> list[str]:
    return [replies[0].text for replies in gather(client, requests).complete()]


def test_what_comes_back_is_what_was_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "cache.sqlite")
    replies = [Reply("a", "stop", ("é", "\n"), (-0.5, float("-inf")), Usage(3, 4)), Reply("", "length")]
    assert cache.get("k") is None
    cache.put("k", Request(prompt="p"), replies)
    cache.put("k", Request(prompt="p"), [Reply("late", "stop")])
    assert cache.get("k") == Cache(tmp_path / "deep" / "cache.sqlite").get("k") == replies


def test_a_request_with_a_seed_or_without_chance_is_asked_once(tmp_path: Path) -> None:
    inner = Counting()
    client = Remembering(Cache(tmp_path / "c"), inner)
    for how in ({"seed": 1}, {"temperature": 0}, {"continuations": ["b"]}):
        fixed = Request(prompt="a", **how)
        assert len(set(texts(client, fixed, fixed, fixed))) == 1
    assert (inner.asked, client.asked, client.found) == (3, 3, 6)
    assert texts(Remembering(Cache(tmp_path / "c"), inner), Request(prompt="a", seed=1)) == ["1"]
    assert texts(Remembering(Cache(tmp_path / "c"), Counting("other")), Request(prompt="a", seed=1)) == ["1"]
    assert texts(Remembering(Cache(tmp_path / "c"), inner), Request(prompt="a", seed=2)) == ["4"]


def test_a_request_without_a_seed_is_something_new_each_time_and_the_same_in_the_next_run(tmp_path: Path) -> None:
    again = [Request(prompt="a")] * 3
    inner = Counting()
    first = texts(Remembering(Cache(tmp_path / "c"), inner), *again)
    assert sorted(first) == ["1", "2", "3"]
    rerun = Remembering(Cache(tmp_path / "c"), inner)
    assert texts(rerun, *again) == first and inner.asked == 3
    assert texts(rerun, *again[:1]) == ["4"]


def test_replies_of_another_model_are_not_taken(tmp_path: Path) -> None:
    request = Request(prompt="a", seed=1)
    inner = Counting("two")
    assert texts(Remembering(Cache(tmp_path / "c"), Counting("one")), request) == ["1"]
    assert texts(Remembering(Cache(tmp_path / "c"), inner), request) == ["1"] and inner.asked == 1


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Any]:
    """Starts processes that write into one cache and say what they have written; they begin at a line of input."""
    begun: list[subprocess.Popen[str]] = []

    def start(who: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": str(Path(guerdon.__file__).parent.parent)}
        command = [sys.executable, "-c", WRITER, str(tmp_path / "cache"), who]
        begun.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def go(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout


def test_processes_that_are_killed_leave_everything_that_they_had_kept(writers: Any, tmp_path: Path) -> None:
    moments = random.Random(3)
    lives = [writers(who) for who in "abcd"]
    for life in lives:
        assert life.stdout.readline() == "ready\n"
    written: dict[str, int] = {}
    for pair in (lives[:2], lives[2:]):  # two at a time; the first two also make the file at the same moment
        for life in pair:
            go(life)
        for life in pair:
            for _ in range(20):
                assert life.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        for life in pair:
            life.send_signal(signal.SIGKILL)
        for life, who in zip(pair, "abcd"[lives.index(pair[0]) :], strict=False):
            written[who] = 20 + sum(line.endswith("\n") for line in life.stdout)
            assert life.wait() == -signal.SIGKILL
    cache = Cache(tmp_path / "cache")
    for who, count in written.items():
        for i in range(count):
            assert cache.get(f"{who}-{i}") == [Reply(f"{who} says {i} " + "x" * 500, "stop")]
    for i in range(min(written.values())):  # whoever came first
        (reply,) = cache.get(f"both-{i}") or []
        assert reply.text.removesuffix(f" says {i}") in ("a", "b")
    with sqlite3.connect(tmp_path / "cache") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_what_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(DataError, match="is no cache of replies"):
        Cache(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE replies (x)")
    with pytest.raises(DataError, match="is no cache of replies"):
        Cache(tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Cache(tmp_path / "text" / "cache")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Cache(tmp_path)


def test_the_same_request_at_the_same_time_is_asked_once(tmp_path: Path) -> None:
    inner = Counting()
    client = Remembering(Cache(tmp_path / "c"), inner)
    assert texts(client, *[Request(prompt="a", seed=1)] * 8) == ["1"] * 8
    assert wait(client.ask(Request(prompt="a", seed=1)))[0].text == "1" and inner.asked == 1
