"""The client of servers: against our own, which is the policy in this process, and against one that misbehaves."""

from __future__ import annotations

import email.utils
import itertools
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import guerdon
from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Sampling
from guerdon.language.sampling.local import LocalSampler
from guerdon.llm import endpoint, make_client
from guerdon.llm.base import Reply, Request, gather
from guerdon.llm.budget import Budget
from guerdon.llm.cache import Remembering
from guerdon.llm.http import HTTPClient
from guerdon.llm.local import LocalClient
from guerdon.llm.loop import wait
from openai_server import OpenAIServer

CHAT = [{"role": "user", "content": "1 + 1 ="}]
REQUESTS = [Request(prompt=f"{i} + 1 =", seed=i, max_tokens=6) for i in range(12)]


def close(ours: list[Reply], theirs: list[Reply]) -> bool:
    """Whether replies are equal; what else was in the batch moves the last bits of log-probs."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a.text, a.finish, a.tokens, a.usage) == (b.text, b.finish, b.tokens, b.usage)
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)
    return True


def test_our_own_server_replies_as_the_policy_in_this_process(served: str, policy: Policy) -> None:
    http, local = HTTPClient(served), LocalClient(policy)
    requests = [
        Request(prompt=CHAT, n=3, seed=4, max_tokens=9, temperature=0.7, top_p=0.9, stop=["5", "e"], logprobs=True),
        Request(prompt="1 + 1 =", n=2, seed=5, max_tokens=9, logprobs=True),
        Request(prompt="1 + 1 =", temperature=0, max_tokens=9),
        Request(prompt="1 + 1 =", continuations=[" 2", " 33", "é"]),
    ]
    for request in requests:
        assert close(wait(http.ask(request)), wait(local.ask(request)))
    for ours, theirs in zip(gather(http, REQUESTS).complete(), gather(local, REQUESTS).complete(), strict=True):
        assert close(ours, theirs)
    assert wait(http.identity()) == f"{served}#tiny"
    assert http.limits.budget.spent == local.limits.budget.spent


def test_what_our_server_refuses_is_refused(served: str) -> None:
    found = gather(HTTPClient(served), [Request(prompt="a" * 600), *REQUESTS[:2]])
    assert "status 400: the prompt has 601 tokens" in found.refused[0] and all(found.replies[1:])
    with pytest.raises(ConfigError, match=r"no model 'tony'\. Did you mean 'tiny'\? It has: tiny"):
        wait(HTTPClient(f"{served}#tony").ask(REQUESTS[0]))


@pytest.fixture(scope="module")
def local(policy: Policy) -> LocalSampler:
    return policy.sampler


@pytest.fixture(scope="module")
def expected(local: LocalSampler) -> list[str]:
    """What the server behind replies to `REQUESTS`."""
    how = Sampling(max_new_tokens=6)
    prompts = [local.tokenizer(str(request.prompt)).input_ids for request in REQUESTS]
    return [local.sample([p], [[i]], how)[0][0].text for i, p in enumerate(prompts)]


def texts(replies: list[list[Reply] | None]) -> list[str | None]:
    return [None if each is None else each[0].text for each in replies]


FAULTS: list[int | str] = [500, "close", "text", 429, "stream", "list", 503, "empty", 408, 529, 500]


def test_no_fault_loses_anything(local: LocalSampler, expected: list[str], tmp_path: Path) -> None:
    """All faults at once, then a budget that ends in the middle, and the rest by a client that is made anew."""
    with OpenAIServer(local, faults=list(FAULTS)) as host:
        budget = Budget(requests=len(FAULTS) + 8)
        client = make_client(host.address, cache=tmp_path / "c", budget=budget, concurrency=3)
        first = gather(client, REQUESTS)
        assert host.faults == [] and host.asked == budget.sent == len(FAULTS) + 8
        answered = [i for i, text in enumerate(texts(first.replies)) if text == expected[i]]
        assert len(answered) == 8 == sum(replies is not None for replies in first.replies)
        assert first.stopped.startswith("the budget is spent: requests are at 19 of 19")
        second = gather(make_client(host.address, cache=tmp_path / "c"), REQUESTS)
        assert texts(second.replies) == expected and host.asked == len(FAULTS) + 12  # nothing was asked twice


def test_streams_of_our_own_server_are_the_replies_of_the_policy(served: str, policy: Policy) -> None:
    told: dict[int, list[str]] = {}
    client = HTTPClient(served, stream=lambda request, k, text: told.setdefault(k, []).append(text))
    for prompt in (CHAT, "1 + 1 ="):
        for logprobs in (True, False):
            told.clear()
            request = Request(prompt=prompt, n=3, seed=4, max_tokens=9, temperature=0.7, stop=["5"], logprobs=logprobs)
            streamed = wait(client.ask(request))
            assert close(streamed, wait(LocalClient(policy).ask(request)))
            for k, reply in enumerate(streamed):
                assert told[k][-1] == reply.text and all(b.startswith(a) for a, b in itertools.pairwise(told[k]))
                assert len(told[k]) > 2
    scored = Request(prompt="1 + 1 =", continuations=[" 2"])
    assert close(wait(client.ask(scored)), wait(HTTPClient(served).ask(scored)))


@pytest.mark.parametrize("fault", ["cut", "stall", "ends", "error"])
def test_a_stream_that_breaks_is_begun_again_and_costs_what_had_come(
    fault: str, local: LocalSampler, expected: list[str]
) -> None:
    told: list[str] = []
    with OpenAIServer(local, faults=[fault]) as host:
        client = HTTPClient(host.address, timeout=1, stream=lambda request, k, text: told.append(text))
        (reply,) = wait(client.ask(REQUESTS[0]))
        assert reply.text == expected[0] == told[-1] and host.asked == client.limits.budget.sent == 2
        begins = [at for at, text in enumerate(told) if len(text) == 2]
        assert len(begins) == 2 and begins[1] == 2  # two pieces, and then all of them
        broken = client.limits.budget.spent - reply.usage
        assert (broken.prompt, broken.completion) == (REQUESTS[0].most().prompt, 2)


def test_no_broken_stream_loses_anything(local: LocalSampler, expected: list[str], tmp_path: Path) -> None:
    """As above, streamed: faults, a budget that ends in the middle, and the rest by a client that is made anew."""
    faults: list[int | str] = ["cut", 500, "ends", "close", "error", "cut", "text", 429, "cut", "ends"]
    ignore = lambda request, k, text: None  # noqa: E731
    with OpenAIServer(local, faults=list(faults)) as host:
        budget = Budget(requests=len(faults) + 8)
        client = make_client(host.address, cache=tmp_path / "c", budget=budget, concurrency=3, stream=ignore)
        first = gather(client, REQUESTS)
        assert host.faults == [] and host.asked == budget.sent == len(faults) + 8
        assert sum(replies is not None for replies in first.replies) == 8 and "budget is spent" in first.stopped
        second = gather(make_client(host.address, cache=tmp_path / "c", stream=ignore), REQUESTS)
        assert texts(second.replies) == expected and host.asked == len(faults) + 12  # nothing was asked twice


def test_what_a_listener_raises_is_not_a_fault_of_the_server(local: LocalSampler) -> None:
    def fails(request: Request, k: int, text: str) -> None:
        raise ValueError("mine")

    with OpenAIServer(local) as host:
        with pytest.raises(ValueError, match="mine"):
            wait(HTTPClient(host.address, stream=fails).ask(REQUESTS[0]))
        assert host.asked == 1
    with pytest.raises(ConfigError, match="only a server's replies are streamed"):
        make_client("smollm2-135m", stream=fails)


def test_who_waits_too_long_asks_again(local: LocalSampler, expected: list[str]) -> None:
    with OpenAIServer(local, faults=["hang"]) as host:
        client = HTTPClient(host.address, timeout=1)
        assert wait(client.ask(REQUESTS[0]))[0].text == expected[0] and host.asked >= 2
        assert client.limits.budget.spent.completion >= 6 + 1  # the server may have answered the first time


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (500, GuerdonError, "the server answers with status 500: out of order"),
        (429, GuerdonError, r"too many requests \(429: out of order\)"),
        ("close", ConfigError, "no answer"),
        ("stream", ConfigError, "no answer"),
        ("text", GuerdonError, "something else than JSON"),
        ("empty", GuerdonError, "something else"),
    ],
)
def test_a_server_that_stays_broken_stops_with_what_was_gathered(
    fault: int | str, kind: type[GuerdonError], message: str, local: LocalSampler, expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(endpoint, "RETRIES", 2)
    with OpenAIServer(local) as host:
        client = HTTPClient(host.address, concurrency=2)
        wait(client.ask(REQUESTS[0]))
        host.faults = [fault] * 1000
        with pytest.raises(kind, match=message):
            wait(client.ask(REQUESTS[0]))
        host.faults, host.asked = [], 0
        answer = host.answer

        def breaks_down(body: dict[str, Any]) -> tuple[int, Any]:
            if len(host.seen) == 5:
                host.faults = [fault] * 1000
            return answer(body)

        monkeypatch.setattr(host, "answer", breaks_down)
        found = gather(client, REQUESTS)
    assert 4 <= sum(text is not None for text in texts(found.replies)) < 12 and host.asked < 20
    assert all(text in (None, right) for text, right in zip(texts(found.replies), expected, strict=True))
    assert host.address in found.stopped


def test_the_server_says_when_to_come_back(local: LocalSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenAIServer(local, faults=[429], retry_after="1") as host:
        begun = time.monotonic()
        wait(HTTPClient(host.address).ask(REQUESTS[0]))
        assert time.monotonic() - begun >= 1
        host.retry_after, host.faults, host.asked = "3600", [429], 0
        with pytest.raises(GuerdonError, match="too many requests"):
            wait(HTTPClient(host.address).ask(REQUESTS[0]))
        assert host.asked == 1
    ahead = email.utils.formatdate(time.time() + 50, usegmt=True)
    for said, least, most in (("7", 7, 7), ("0.5", 0.5, 0.5), ("-3", 0, 0), (ahead, 20, 50)):
        assert least <= (endpoint._retry_after({"retry-after": said}) or 0) <= most
    assert endpoint._retry_after({}) is None is endpoint._retry_after({"retry-after": "soon"})


def test_a_server_that_cannot_do_it_is_refused_with_the_reason(local: LocalSampler) -> None:
    with OpenAIServer(local, style="none") as host:
        client = HTTPClient(host.address)
        for request, message in [
            (Request(prompt="a", n=2, max_tokens=2), "gives 1 replies where 2 were asked for"),
            (Request(prompt="a", logprobs=True, max_tokens=2), "the server gives no log-probs"),
        ]:
            with pytest.raises(DataError, match=message):
                wait(client.ask(request))
        before = client.limits.budget.spent
        wait(client.ask(Request(prompt="abcd", max_tokens=5)))  # it says nothing of the prompt's tokens
        spent = client.limits.budget.spent - before
        assert (spent.prompt, spent.completion) == (36, 5)


def test_a_model_may_call_max_tokens_by_its_newer_name(
    local: LocalSampler, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with OpenAIServer(local) as host:
        answer = host.answer

        def strictly(body: dict[str, Any]) -> tuple[int, Any]:
            if "max_tokens" in body:
                return 400, {"error": {"message": refused}}
            return answer({**body, "max_tokens": body.pop("max_completion_tokens")})

        monkeypatch.setattr(host, "answer", strictly)
        client = HTTPClient(host.address, concurrency=2)
        assert texts(list(gather(client, REQUESTS).complete())) == expected
        assert 13 <= host.asked == client.limits.budget.sent <= 14
        refused = "It is about max_completion_tokens, but what?"
        monkeypatch.setattr(host, "answer", lambda body: (400, {"error": {"message": refused}}))
        with pytest.raises(DataError, match="but what"):
            wait(client.ask(REQUESTS[0]))


def test_a_key_goes_to_the_server_and_nowhere_else(
    local: LocalSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    key, told = "sk-very-secret-1234567890", []
    caplog.set_level(logging.DEBUG)
    with OpenAIServer(local, key=key) as host:
        for value in (None, "sk-wrong"):
            if value:
                monkeypatch.setenv("OPENAI_API_KEY", value)
            with pytest.raises(
                ConfigError, match="does not accept the key" if value else "set OPENAI_API_KEY"
            ) as error:
                wait(HTTPClient(host.address).ask(REQUESTS[0]))
            told.append(str(error.value))
        monkeypatch.setenv("OPENAI_API_KEY", key)
        client = make_client(host.address, cache=tmp_path / "cache", record=tmp_path / "tape")
        found = gather(client, REQUESTS[:4])
        assert all(found.replies) and host.seen
        answer = host.answer
        monkeypatch.setattr(host, "answer", lambda body: (400, {"error": {"message": f"you sent {key}"}}))
        refused = gather(client, REQUESTS[4:6])
        assert refused.refused[0].endswith("status 400: you sent ...")
        with pytest.raises(DataError) as raised:
            wait(client.ask(REQUESTS[4]))
        told.append("".join(traceback.format_exception(raised.value)))
        long = "x" * 290 + key
        monkeypatch.setattr(host, "answer", lambda body: (400, {"error": {"message": long}}))
        told.append(repr(gather(client, REQUESTS[4:5])))
        monkeypatch.setattr(host, "answer", lambda body: (429, {"error": {"message": f"slow down, {key}"}}))
        stopped = gather(make_client(host.address, concurrency=1), REQUESTS[4:6])
        monkeypatch.setattr(host, "answer", answer)
        host.faults = ["close"]
        wait(client.ask(REQUESTS[6]))
    told += [repr(vars(each)) for each in (client, found, refused, stopped)]
    told += [caplog.text, *capfd.readouterr()]
    told += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert "slow down" in repr(stopped) and len(told) > 8
    assert all("sk-" not in each for each in told)


def test_requests_run_side_by_side_up_to_a_limit(local: LocalSampler) -> None:
    with OpenAIServer(local, delay=0.02) as host:
        gather(HTTPClient(host.address, concurrency=3), REQUESTS).complete()
        assert host.busiest == 3


GATHERER = """
import sys
from guerdon.llm import make_client
from guerdon.llm.base import Request, gather

client = make_client(sys.argv[1] + "#tiny-one", cache=sys.argv[2], concurrency=2)
gather(client, [Request(prompt=f"{i} + 1 =", seed=i, max_tokens=6) for i in range(12)]).complete()
"""


def test_a_killed_program_goes_on_where_it_was(local: LocalSampler, expected: list[str], tmp_path: Path) -> None:
    with OpenAIServer(local, delay=0.05) as host:
        env = {**os.environ, "PYTHONPATH": str(Path(guerdon.__file__).parent.parent)}
        command = [sys.executable, "-c", GATHERER, host.address, str(tmp_path / "cache")]
        program = subprocess.Popen(command, env=env)
        while len(host.seen) < 6:
            assert program.poll() is None
            time.sleep(0.005)
        program.send_signal(signal.SIGKILL)
        program.wait()
        while host.busy:
            time.sleep(0.005)
        before = len(host.seen)
        client = make_client(f"{host.address}#tiny-one", cache=tmp_path / "cache")
        assert texts(list(gather(client, REQUESTS).complete())) == expected
        assert isinstance(client, Remembering) and client.asked == len(host.seen) - before
        assert client.found >= before - 2  # at most those under way were lost
