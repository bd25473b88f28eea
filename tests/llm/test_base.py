"""What every client does, whatever is behind it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.llm import make_client
from guerdon.llm.base import Client, Gathered, Reply, Request, Usage, gather
from guerdon.llm.loop import wait


class Echo(Client):
    """Replies with its prompt; fails where the prompt names an error."""

    errors = {"config": ConfigError("the key"), "data": DataError("too long"), "down": GuerdonError("it went away")}

    def __init__(self, concurrency: int = 3):
        self.concurrency = concurrency
        self.busy = self.busiest = 0
        self.seen: list[Any] = []

    async def identity(self) -> str:
        return "echo"

    async def _ask(self, request: Request) -> list[Reply]:
        self.seen.append(request.prompt)
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        await asyncio.sleep(0.002)
        self.busy -= 1
        if request.prompt in self.errors:
            raise self.errors[str(request.prompt)]
        return [Reply(str(request.prompt), "stop", usage=Usage(2, 1))]


def requests(*prompts: str) -> list[Request]:
    return [Request(prompt=prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n is 0: it must be at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0: it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop": "."}, "lists of strings"),
        ({"stop": [""]}, "no stop string"),
        ({"prompt": [{"role": "user", "content": "a"}], "continuations": ["b"]}, "after a string, not after messages"),
    ],
)
def test_requests_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(**{"prompt": "a", **fields})


def test_the_key_of_a_request_tells_every_field_apart() -> None:
    others: list[dict[str, Any]] = [
        {}, {"prompt": "b"}, {"prompt": [{"role": "user", "content": "a"}]}, {"n": 2}, {"max_tokens": 3},
        {"temperature": 0.5}, {"top_p": 0.5}, {"stop": ["x"]}, {"seed": 1}, {"logprobs": True},
        {"continuations": ["x"]},
    ]  # fmt: skip
    keys = {Request(**{"prompt": "a", **other}).key("model") for other in others}
    assert len(keys) == len(others) and Request(prompt="a").key("other") not in keys
    assert Request(prompt="a", stop=["x"]).key() == Request(prompt="a", stop=("x",)).key()


def test_the_most_that_a_request_can_take() -> None:
    assert Request(prompt="abcé", n=2, max_tokens=7).most() == Usage(5 + 32, 14)
    assert Request(prompt="ab", continuations=["x", "yz"]).most() == Usage(34 + 1 + 34 + 2)


def test_gather_keeps_the_order_and_so_many_under_way() -> None:
    client, told = Echo(), []
    prompts = [str(i) for i in range(20)]
    found = gather(client, requests(*prompts), progress=lambda done, total: told.append((done, total)))
    assert [replies[0].text for replies in found.complete()] == prompts
    assert client.busiest == 3 and told == [(k, 20) for k in range(1, 21)]
    assert found.usage() == Usage(40, 20)
    assert gather(client, []) == Gathered([])


def test_a_refused_request_does_not_stop_the_others() -> None:
    found = gather(Echo(), requests("a", "data", "b"))
    assert [replies and replies[0].text for replies in found.replies] == ["a", None, "b"]
    assert found.refused == {1: "too long"} and found.stopped == ""
    with pytest.raises(GuerdonError, match=r"2 of 3 requests were answered\. request 1: too long"):
        found.complete()


@pytest.mark.parametrize("error", ["down", "config"])
def test_what_was_gathered_comes_back_when_it_has_to_stop(error: str) -> None:
    client = Echo()
    found = gather(client, requests("a", "b", "c", "d", error, *"efghijkl"))
    answered = [replies[0].text for replies in found.replies if replies]
    assert set(answered) == set(client.seen) - {error}  # those under way were waited for
    assert len(client.seen) < 10 and found.stopped == str(Echo.errors[error])
    with pytest.raises(GuerdonError, match=found.stopped):
        found.complete()


def test_a_mistake_of_the_user_is_raised_where_nothing_could_be_asked() -> None:
    with pytest.raises(ConfigError, match="the key"):
        gather(Echo(1), requests("config", "a"))


def test_one_client_for_scripts_and_for_any_event_loop() -> None:
    client = make_client("tiny:layers=1,width=16,heads=2")

    async def both() -> list[str]:
        chats = [client.chat([{"role": "user", "content": "a"}], seed=1, max_tokens=4) for _ in range(2)]
        return [replies[0].text for replies in await asyncio.gather(*chats)]

    first, second = asyncio.run(both()), asyncio.run(both())
    assert first == second and first[0] == first[1]
    (replies,) = gather(client, [Request(prompt=[{"role": "user", "content": "a"}], seed=1, max_tokens=4)]).complete()
    assert [replies[0].text] == first[:1]


def test_a_process_may_fork() -> None:
    wait(Echo().ask(Request(prompt="a")))
    child = os.fork()
    if child == 0:
        os._exit(0 if wait(Echo().ask(Request(prompt="b")))[0].text == "b" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("cassette:nowhere.jsonl", {}, "there is no such file"),
        ("cassette:nowhere.jsonl", {"cache": "x"}, "neither cache nor record"),
        ("tiny:layers=0", {}, "'layers' has to be at least 1"),
        ("http://user:secret@localhost/v1", {}, r"http://localhost: an address holds no password"),
        ("http://localhost/v1?key=secret", {}, r"http://localhost: an address holds no password"),
        ("http://localhost:x/v1", {}, "this is no address"),
        ("http://localhost/v1", {"concurrency": 0}, "concurrency is 0"),
        ("http://localhost/v1", {"per_minute": -1}, "per_minute is -1"),
    ],
)
def test_what_cannot_be_a_client(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make_client(spec, **options)
    assert "secret" not in str(error.value)
