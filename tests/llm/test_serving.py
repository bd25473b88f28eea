"""The server of a policy: OpenAI's client gets what the policy says, as a whole and in streams, or a clear error."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest

import guerdon
from guerdon.cli import main
from guerdon.errors import ConfigError
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Completion, Sampling, completion_seeds
from guerdon.language.sampling.server import ServerSampler
from guerdon.language.templates import prompt_ids
from guerdon.llm.engine import Engine
from guerdon.llm.serving import _Growing

CHAT: list[Any] = [{"role": "user", "content": "1 + 1 ="}]


@pytest.fixture
def client(served: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=served, api_key="none", max_retries=0)


def answers(policy: Policy, prompt: Any, n: int, seed: int, **how: Any) -> list[Completion]:
    return policy.answer([prompt], n, Sampling(**how), seed=seed)[0]


def test_answers_are_those_of_the_policy(client: openai.OpenAI, policy: Policy) -> None:
    expected = answers(policy, CHAT, 3, 4, max_new_tokens=9, temperature=0.7, top_p=0.9, stop=("5", "e"))
    asked: dict[str, Any] = {"n": 3, "seed": 4, "temperature": 0.7, "top_p": 0.9, "stop": ["5", "e"]}
    found = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=9, logprobs=True, **asked)
    assert [choice.message.content for choice in found.choices] == [c.text for c in expected]
    assert [choice.finish_reason for choice in found.choices] == ["stop" if c.finished else "length" for c in expected]
    for choice, completion in zip(found.choices, expected, strict=True):
        assert choice.logprobs is not None and choice.logprobs.content is not None
        logps = [each.logprob for each in choice.logprobs.content]
        np.testing.assert_allclose(logps, completion.logps, atol=1e-5)
        assert "".join(each.token for each in choice.logprobs.content) == policy.tokenizer.decode(completion.tokens)
    assert found.usage is not None and found.usage.prompt_tokens == len(prompt_ids(CHAT, policy.tokenizer))
    assert found.usage.completion_tokens == sum(len(c.tokens) for c in expected)
    parts: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1 ="}]}
    ]
    newer = client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=9, **asked)
    assert [choice.message.content for choice in newer.choices] == [c.text for c in expected]


def test_completions_of_texts_and_of_token_ids(client: openai.OpenAI, policy: Policy) -> None:
    prompts = ["1 + 1 =", "abc"]
    expected = [c for prompt in prompts for c in answers(policy, prompt, 2, 7, max_new_tokens=16)]
    ids = [prompt_ids(prompt, policy.tokenizer) for prompt in prompts]
    for given in (prompts, ids):
        found = client.completions.create(
            model="tiny", prompt=given, n=2, seed=7, logprobs=1, extra_body={"return_token_ids": True}
        )
        assert [choice.text for choice in found.choices] == [c.text for c in expected]
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        assert [choice.token_ids for choice in found.choices] == [c.tokens for c in expected]  # type: ignore[attr-defined]
    one = client.completions.create(model="tiny", prompt=ids[1], seed=7)
    assert one.choices[0].text == expected[2].text and one.choices[0].logprobs is None


def test_an_echo_holds_the_log_probs_of_the_prompt(client: openai.OpenAI, policy: Policy) -> None:
    found = client.completions.create(
        model="tiny", prompt=["one and two", "one and three"], max_tokens=0, echo=True, logprobs=1
    )
    for choice, text in zip(found.choices, ("one and two", "one and three"), strict=True):
        assert choice.text == text and choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or []) == text
        assert choice.logprobs.text_offset == list(range(len(text)))
        assert choice.logprobs.token_logprobs is not None and max(choice.logprobs.token_logprobs) < 0
    longer = client.completions.create(model="tiny", prompt="ab", max_tokens=3, echo=True, logprobs=1, seed=1).choices[
        0
    ]
    (completion,) = answers(policy, "ab", 1, 1, max_new_tokens=3)
    assert longer.text == "ab" + completion.text and longer.logprobs is not None
    np.testing.assert_allclose((longer.logprobs.token_logprobs or [])[2:], completion.logps, atol=1e-5)


@pytest.mark.parametrize("stop", [[], ["5", "e"]])
def test_a_stream_adds_up_to_the_whole(stop: list[str], client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"n": 3, "seed": 4, "stop": stop, "max_tokens": 12, "model": "tiny"}
    whole = client.chat.completions.create(messages=CHAT, logprobs=True, **asked)
    usage = {"include_usage": True}
    stream = client.chat.completions.create(messages=CHAT, logprobs=True, stream=True, stream_options=usage, **asked)
    chunks = list(stream)
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert own[0].delta.role == "assistant" and own[0].finish_reason is None
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
        logps = [each.logprob for c in own if c.logprobs for each in c.logprobs.content or []]
        np.testing.assert_allclose(logps, [each.logprob for each in choice.logprobs.content or []], atol=1e-5)  # type: ignore[union-attr]
    assert [chunk.usage for chunk in chunks if chunk.usage] == [whole.usage]
    assert len(chunks) > 20 and len({chunk.id for chunk in chunks}) == 1
    text = client.completions.create(prompt=["1 +", "2 +"], **asked)
    parts = list(client.completions.create(prompt=["1 +", "2 +"], stream=True, **asked))
    for choice in text.choices:
        own_text = "".join(c.text for chunk in parts for c in chunk.choices if c.index == choice.index)
        assert own_text == choice.text


def test_what_may_be_a_stop_string_or_half_a_character_is_not_sent_yet() -> None:
    class Bytes:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    growing = _Growing(Bytes(), ("</s>", "ab"))
    sent = [growing.add(token)[0] for token in "né<</sx a".encode()]
    assert sent == ["n", "", "é", "", "<", "", "", "</sx", " ", ""][: len(sent)] and growing.sent == "né<</sx "
    assert growing.add(ord("b"))[0] == "" and growing.sent == "né<</sx "


REFUSED: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    (
        "chat",
        {"model": "tony"},
        404,
        r"there is no model 'tony'. Did you mean 'tiny'? This server has 'tiny'.",
        "model",
    ),
    ("chat", {"model": None}, 400, "model: Field required", "model"),
    ("chat", {"messages": []}, 400, "messages: List should have at least 1 item", "messages"),
    ("chat", {"messages": "hello"}, 400, "messages: Input should be a valid list", "messages"),
    ("chat", {"messages": [{"role": "user"}]}, 400, "messages.0.content: Field required", "messages"),
    ("chat", {"messages": [{"role": "user", "content": "a" * 600}]}, 400, "more than the context of 512", None),
    ("chat", {"max_tokens": 600}, 400, "600 may follow", None),
    ("chat", {"max_tokens": "many"}, 400, "max_tokens: Input should be a valid integer", "max_tokens"),
    ("chat", {"temperature": "hot"}, 400, "temperature: Input should be a valid number", "temperature"),
    ("chat", {"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0", "temperature"),
    ("chat", {"n": 1000}, 400, "n: Input should be less than or equal to 128", "n"),
    ("chat", {"stop": [""]}, 400, "an empty string is no stop string", "stop"),
    ("chat", {"frequency_penalty": 0.5}, 400, "'frequency_penalty' can only be 0 here", None),
    ("chat", {"top_logprobs": 3}, 400, "'top_logprobs' can only be 0 here", None),
    ("chat", {"tools": [{}]}, 400, "'tools' can only be [] here", None),
    ("chat", {"temprature": 1}, 400, "temprature: Extra inputs are not permitted", "temprature"),
    ("text", {"prompt": ""}, 400, "a prompt is empty", "prompt"),
    ("text", {"prompt": [1, 10**6]}, 400, "token ids beyond the 108 there are", "prompt"),
    ("text", {"prompt": 7}, 400, "prompt", "prompt"),
    ("text", {"logprobs": 5}, 400, "logprobs: Input should be less than or equal to 1", "logprobs"),
    ("text", {"max_tokens": 0}, 400, "max_tokens can only be 0 with echo", "max_tokens"),
    ("text", {"echo": True, "stream": True}, 400, "a stream cannot echo its prompt", "echo"),
    ("text", {"echo": True, "logprobs": 1, "prompt": "a" * 511, "max_tokens": 2}, 400, "context of 512", None),
]


def test_requests_that_cannot_be_answered_are_told_why(served: str) -> None:
    for page, wrong, status, message, param in REFUSED:
        body = {"model": "tiny", "messages": CHAT} if page == "chat" else {"model": "tiny", "prompt": "a"}
        got, error = post(served, "/chat/completions" if page == "chat" else "/completions", {**body, **wrong})
        assert (got, error["error"]["param"]) == (status, param), (wrong, error)
        assert message in error["error"]["message"], wrong
        assert error["error"]["type"] == "invalid_request_error"
    assert post(served, "/completions", b"{not json")[0] == 400
    assert post(served, "/embeddings", {})[1]["error"]["message"] == "Not Found: POST /v1/embeddings"
    too_long = post(served, "/completions", {"model": "tiny", "prompt": "a" * 600})[1]["error"]
    assert too_long["code"] == "context_length_exceeded"
    neutral = {"frequency_penalty": 0.0, "logit_bias": None, "tools": [], "user": "me", "stop": None, "top_k": -1}
    assert post(served, "/completions", {"model": "tiny", "prompt": "a", **neutral})[0] == 200


def post(address: str, page: str, body: Any) -> tuple[int, Any]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=300)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", parts.path + page, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_a_failure_of_ours_is_an_error_too(
    client: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a secret of the house")

    with monkeypatch.context() as patch:
        patch.setattr(engine.policy.sampler, "sample", fail)
        with pytest.raises(openai.InternalServerError, match="the server failed") as error:
            client.completions.create(model="tiny", prompt="a")
        with pytest.raises(openai.APIError, match="the server failed"):
            list(client.completions.create(model="tiny", prompt="a", stream=True))
    assert "secret" not in str(error.value) and caplog.text.count("ValueError: a secret of the house") == 2
    assert client.completions.create(model="tiny", prompt="a").choices
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_concurrent_requests_share_batches(served: str, engine: Engine, policy: Policy) -> None:
    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(base_url=served, api_key="none")
        asked = [client.completions.create(model="tiny", prompt=f"{i % 4}?", seed=i, max_tokens=24) for i in range(32)]
        return [found.choices[0].text for found in await asyncio.gather(*asked)]

    found = asyncio.run(ask())
    assert found[:4] == [answers(policy, f"{i}?", 1, i, max_new_tokens=24)[0].text for i in range(4)]
    assert sum(engine.batches) == 32 and max(engine.batches) > 1


def test_nothing_more_is_computed_for_who_hangs_up(
    served: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    score = Engine._go_on_for
    monkeypatch.setattr(
        Engine, "_go_on_for", lambda self, jobs: (drawn.append(1), time.sleep(0.02), score(self, jobs))[2]
    )
    endless = {"model": "tiny", "prompt": "a", "max_tokens": 500, "seed": 1}
    for body in ({**endless, "stream": True}, endless):
        drawn.clear()
        parts = urlsplit(served)
        connection = http.client.HTTPConnection(parts.netloc)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        while len(drawn) < 3:
            time.sleep(0.01)
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        while engine._busy:
            time.sleep(0.01)
        assert len(drawn) < 400


def test_the_sampler_of_servers_draws_from_ours_with_all_log_probs(served: str, policy: Policy) -> None:
    ids = [prompt_ids(CHAT, policy.tokenizer), prompt_ids("abc", policy.tokenizer)]
    sampling = Sampling(max_new_tokens=8)
    found = ServerSampler(served, policy.tokenizer).sample(ids, [[1, 2], [3]], sampling)
    for prompt, seeds, completions in zip(ids, ([1, 2], [3]), found, strict=True):
        for seed, completion in zip(seeds, completions, strict=True):
            (same,) = policy.sampler.sample([prompt], [completion_seeds(1, seed, *prompt)], sampling)[0]
            assert (completion.tokens, completion.text) == (same.tokens, same.text)
            np.testing.assert_allclose(completion.logps, same.logps, atol=1e-5)


def test_what_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen at 127\.0\.0\.1, port {port}.*Choose another --port"):
            guerdon.serve("tiny:layers=1,width=16,heads=2", port=port)
    with pytest.raises(ConfigError, match=r"cannot listen at 127\.0\.0\.1, port 70000"):
        guerdon.serve("tiny:layers=1,width=16,heads=2", port=70000)
    assert main(["serve", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_ctrl_c_stops_the_server_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(guerdon.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    model = "tiny:layers=2,width=64,heads=4,context=100000"
    command = [sys.executable, "-m", "guerdon", "serve", model, "--port", "0", "--name", "endless"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("endless at http://127.0.0.1:") and line.endswith("/v1. Ctrl-C stops it.\n")
    client = openai.OpenAI(base_url=line.split()[2].removesuffix("."), api_key="none", max_retries=0)
    body: Any = {"model": "endless", "prompt": "a", "extra_body": {"top_k": 0}}
    told: list[Exception] = []

    def whole() -> None:
        try:
            client.completions.create(max_tokens=90000, **body)
        except openai.APIError as error:
            told.append(error)

    waiting = threading.Thread(target=whole)
    stream = client.completions.create(max_tokens=50000, stream=True, **body)
    next(iter(stream))
    waiting.start()
    server.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="stopped"):
        list(stream)
    out, err = server.communicate(timeout=300)
    waiting.join()
    assert (server.returncode, out, err) == (0, "", "") and len(told) == 1
