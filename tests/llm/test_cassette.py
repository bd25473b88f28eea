"""Cassettes: recorded once, replayed without model or network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.llm import make_client
from guerdon.llm.base import Request, gather
from guerdon.llm.cache import Remembering
from guerdon.llm.cassette import Cassette
from guerdon.llm.loop import wait

TINY = "tiny:layers=1,width=16,heads=2"
CHAT = Request(prompt=[{"role": "user", "content": "Größe?"}], n=2, max_tokens=4, logprobs=True)
REQUESTS = [CHAT, CHAT, Request(prompt="a", seed=1, max_tokens=4), Request(prompt="a", continuations=["b", "cd"])]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    client = make_client(TINY, record=tmp_path / "here" / "tape.jsonl")
    assert isinstance(client, Remembering)
    gather(client, REQUESTS).complete()
    assert client.asked == 4
    return tmp_path / "here" / "tape.jsonl"


def test_a_cassette_replays_what_was_recorded(recorded: Path) -> None:
    first = gather(make_client(TINY, record=recorded), REQUESTS).complete()
    replayed = gather(make_client(f"cassette:{recorded}"), REQUESTS).complete()
    assert replayed == first and replayed[0] != replayed[1]  # two draws of one request
    assert first[3][1].text == "cd" and len(first[3][1].logps) == 2
    assert len(recorded.read_text().splitlines()) == 5
    scores = wait(make_client(f"cassette:{recorded}").score("a", ["b", "cd"]))
    assert [tuple(each) for each in scores] == [reply.logps for reply in first[3]]


def test_what_was_not_recorded_is_said(recorded: Path) -> None:
    found = gather(make_client(f"cassette:{recorded}"), [*REQUESTS, Request(prompt="something else")])
    assert found.replies[-1] is None and all(found.replies[:-1])
    assert 'holds no reply to this request; record it with the model. Its prompt: "something else"' in found.stopped
    with pytest.raises(GuerdonError, match=r"4 of 5 requests were answered\. .*tape.jsonl holds no reply"):
        found.complete()


def test_recording_goes_on_after_a_kill(recorded: Path) -> None:
    whole = recorded.read_bytes()
    recorded.write_bytes(whole[:-10])
    assert gather(make_client(f"cassette:{recorded}"), REQUESTS).replies[3] is None
    client = make_client(TINY, record=recorded)
    assert isinstance(client, Remembering)
    gather(client, REQUESTS).complete()
    assert client.asked == 1 and recorded.read_bytes() == whole


def test_another_model_is_not_recorded_over(recorded: Path) -> None:
    with pytest.raises(ConfigError, match=r"was recorded with weights \w+, not with weights \w+"):
        make_client(TINY.replace("16", "32"), record=recorded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: this is no line of a cassette"),
        (b"{}\n", ":1: this is no line of a cassette"),
        (b'{"cassette": 99, "model": "x"}\n', ":1: .*of another format, 99"),
        (b'{"cassette": 1, "model": "x"}\n{"key": 1}\n', ":2: this is no line of a cassette"),
        (b'{"cassette": 1, "model": "x"}\n\xff\n', ":2: this is no line of a cassette"),
    ],
)
def test_what_is_no_cassette(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tape.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Cassette(tmp_path / "tape.jsonl")


def test_a_cassette_is_text_that_can_be_read(recorded: Path) -> None:
    head, *lines = map(json.loads, recorded.read_text(encoding="utf-8").splitlines())
    assert head["model"].startswith("weights ")
    assert {line["request"]["prompt"] for line in lines if isinstance(line["request"]["prompt"], str)} == {"a"}
