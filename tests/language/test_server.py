"""Sampling from a real server on this machine: what comes back is what the sampler behind it drew, or one message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import guerdon
from guerdon.errors import ConfigError, GuerdonError
from guerdon.language.forward import GroupModel
from guerdon.language.sampling import make_sampler
from guerdon.language.sampling.base import Completion, Sampling
from guerdon.language.sampling.local import LocalSampler
from guerdon.language.sampling.server import ServerSampler
from guerdon.language.templates import prompt_ids, stop_ids
from guerdon.llm import endpoint
from openai_server import OpenAIServer

TASK = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&train_size=6&test_size=3"
SEEDS = [[11, 12, 13], [], [2**31 - 1]]
SAMPLING = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def local(tiny: tuple[Any, Any]) -> LocalSampler:
    model, tokenizer = tiny
    return LocalSampler(GroupModel(model), tokenizer, stop_ids(tokenizer, model))


@pytest.fixture(scope="module")
def prompts(tiny: tuple[Any, Any]) -> list[list[int]]:
    conversation = [{"role": "user", "content": "1 + 2 ="}]
    return [prompt_ids(p, tiny[1]) for p in ("1 + 2 =", "a", conversation)]


@pytest.fixture(autouse=True)
def no_key_and_little_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "RETRIES", 2)
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    yield


def flat(completions: list[list[Completion]]) -> list[Completion]:
    return [c for group in completions for c in group]


def same(found: list[list[Completion]], expected: list[list[Completion]], logps: bool = True) -> None:
    assert [len(group) for group in found] == [len(group) for group in expected]
    for ours, theirs in zip(flat(found), flat(expected), strict=True):
        assert ours.tokens == theirs.tokens and ours.text == theirs.text and ours.finished == theirs.finished
        np.testing.assert_allclose(ours.logps, theirs.logps if logps else [], atol=1e-5)  # others ride in a batch
        assert ours.logps.dtype == np.float32


@pytest.mark.parametrize("style", ["vllm", "llama.cpp"])
def test_completions_are_those_of_the_sampler_behind(style: str, local: LocalSampler, prompts: list[list[int]]) -> None:
    with OpenAIServer(local, style=style) as host:
        found = ServerSampler(host.address, local.tokenizer).sample(prompts, SEEDS, SAMPLING)
    expected = local.sample(prompts, SEEDS, SAMPLING)
    same(found, expected)
    assert len({tuple(c.tokens) for c in found[0]}) == 3
    assert host.seen[-1]["model"] == "tiny-one"


def test_what_is_asked_reaches_the_sampler(local: LocalSampler, prompts: list[list[int]]) -> None:
    free = local.sample(prompts, SEEDS, SAMPLING)[0][0].text
    cases = [
        (Sampling(max_new_tokens=5, temperature=0), True),
        (Sampling(max_new_tokens=12, stop=("no such", free[4:6])), True),
        # Servers do not agree on log-probs at other temperatures, or of what top-k and top-p leave.
        (Sampling(max_new_tokens=12, temperature=0.5), False),
        (Sampling(max_new_tokens=12, top_k=3), False),
        (Sampling(max_new_tokens=12, top_p=0.5), False),
    ]
    with OpenAIServer(local) as host:
        engine = ServerSampler(host.address, local.tokenizer)
        for sampling, logps in cases:
            same(engine.sample(prompts, SEEDS, sampling), local.sample(prompts, SEEDS, sampling), logps)
    assert local.sample(prompts, SEEDS, cases[1][0])[0][0].text == free[: free.index(free[4:6])]


@pytest.mark.parametrize(
    "attributes",
    [{"style": "none"}, {"ids": 400}, {"ids": 422}, {"ids": 500}, {"extras": False}, {"shift": 1}],
    ids=lambda a: "-".join(f"{k}={v}" for k, v in a.items()),
)
def test_text_is_sent_where_token_ids_are_not_understood(
    attributes: dict[str, Any], local: LocalSampler, prompts: list[list[int]]
) -> None:
    with OpenAIServer(local, **attributes) as host:
        found = ServerSampler(host.address, local.tokenizer).sample(prompts, SEEDS, SAMPLING)
    expected = local.sample(prompts, SEEDS, SAMPLING)
    assert [c.text for c in flat(found)] == [c.text for c in flat(expected)]
    assert [c.finished for c in flat(found)] == [c.finished for c in flat(expected)]
    for completion in flat(found):
        assert completion.tokens == local.tokenizer(completion.text, add_special_tokens=False).input_ids
        assert len(completion.logps) == 0
    asked = host.seen[-4:]
    assert all(isinstance(body["prompt"], str) for body in asked)
    understood = [local.tokenizer(body["prompt"]).input_ids for body in asked]
    assert all(ids in prompts for ids in understood)  # the server's tokenizer adds the first token by itself
    assert ("top_k" in asked[0]) == host.extras


def test_an_answer_without_all_of_its_ids_is_tokenised_again(local: LocalSampler, prompts: list[list[int]]) -> None:
    class LosesSome(OpenAIServer):
        def completion(self, drawn: Completion) -> dict[str, Any]:
            answer = super().completion(drawn)
            if len(self.seen) > 1:
                del answer["choices"][0]["logprobs"]["content"][3]
            return answer

    with LosesSome(local, style="llama.cpp") as host:
        found = ServerSampler(host.address, local.tokenizer).sample(prompts[:1], [[11]], SAMPLING)[0][0]
    assert found.tokens == local.tokenizer(found.text, add_special_tokens=False).input_ids
    assert len(found.logps) == 0 and found.text == local.sample(prompts[:1], [[11]], SAMPLING)[0][0].text


def test_a_server_without_top_k_is_not_asked_for_it(local: LocalSampler, prompts: list[list[int]]) -> None:
    with OpenAIServer(local, extras=False) as host, pytest.raises(ConfigError, match="knows no top_k"):
        ServerSampler(host.address, local.tokenizer).sample(prompts, SEEDS, Sampling(top_k=5))


@pytest.mark.parametrize("faults", [[500, 500], [429], ["close", "close"]])
def test_passing_faults_change_nothing(faults: list[int | str], local: LocalSampler, prompts: list[list[int]]) -> None:
    with OpenAIServer(local) as host:
        engine = ServerSampler(host.address, local.tokenizer)
        engine.sample(prompts[:1], [[1]], SAMPLING)
        host.faults = list(faults)
        same(engine.sample(prompts, SEEDS, SAMPLING), local.sample(prompts, SEEDS, SAMPLING))
        assert host.faults == []


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (500, GuerdonError, r"the server answers with status 500: out of order"),
        (429, GuerdonError, r"too many requests \(429: out of order\)"),
        (404, ConfigError, r"no such page \(404: out of order\)"),
        ("close", ConfigError, "no answer"),
        (400, GuerdonError, "answers with status 400: out of order"),
        ("text", GuerdonError, "answers with something else than JSON"),
        ("list", GuerdonError, "answers /completions with something else"),
        ("empty", GuerdonError, "answers /completions with something else"),
    ],
)
def test_lasting_faults_are_one_message(
    fault: int | str, kind: type[GuerdonError], message: str, local: LocalSampler, prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    with OpenAIServer(local) as host:
        engine = ServerSampler(host.address, local.tokenizer, at_once=2)
        engine.sample(prompts[:1], [[1]], SAMPLING)
        host.asked, host.faults = 0, [fault] * 1000
        with pytest.raises(kind, match=message) as error:
            engine.sample(prompts[:1], [list(range(200))], SAMPLING)
        assert host.address in str(error.value)
        assert host.asked < 100  # what had not begun is not asked any more


def test_a_key_is_sent_and_never_shown(
    local: LocalSampler, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with OpenAIServer(local, key="sk-right") as host:
        engine = ServerSampler(host.address, local.tokenizer)
        with pytest.raises(ConfigError, match="wants a key: set OPENAI_API_KEY"):
            engine.sample(prompts, SEEDS, SAMPLING)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        with pytest.raises(ConfigError, match="does not accept the key in OPENAI_API_KEY") as refused:
            engine.sample(prompts, SEEDS, SAMPLING)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
        same(engine.sample(prompts, SEEDS, SAMPLING), local.sample(prompts, SEEDS, SAMPLING))
        monkeypatch.setattr(host, "answer", lambda body: (418, {"error": {"message": "you sent sk-right"}}))
        with pytest.raises(GuerdonError, match=r"418: you sent \.\.\.$") as echoed:
            engine.sample(prompts, SEEDS, SAMPLING)
    assert "sk-" not in str(refused.value) + str(echoed.value)


def test_a_model_is_chosen_by_name(local: LocalSampler, prompts: list[list[int]]) -> None:
    with OpenAIServer(local) as host:
        ServerSampler(host.address + "#tiny-two", local.tokenizer).sample(prompts, SEEDS, SAMPLING)
        assert {body["model"] for body in host.seen} == {"tiny-two"}
        with pytest.raises(ConfigError, match=r"no model 'tiny-tow'\. Did you mean 'tiny-two'\? It has: tiny-one"):
            ServerSampler(host.address + "#tiny-tow", local.tokenizer).sample(prompts, SEEDS, SAMPLING)
        host.models = []
        with pytest.raises(ConfigError, match="It has: none"):
            ServerSampler(host.address, local.tokenizer).sample(prompts, SEEDS, SAMPLING)


def test_addresses(local: LocalSampler, prompts: list[list[int]]) -> None:
    with OpenAIServer(local) as host:
        without_path = ServerSampler(host.address.removesuffix("/v1"), local.tokenizer)
        same(without_path.sample(prompts, SEEDS, SAMPLING), local.sample(prompts, SEEDS, SAMPLING))
        with pytest.raises(ConfigError, match=r"no such page \(404: .*Most addresses end in /v1"):
            ServerSampler(host.address + "/elsewhere", local.tokenizer).sample(prompts, SEEDS, SAMPLING)
    with pytest.raises(ConfigError, match=r"no answer \(.*Is the server running"):
        ServerSampler(host.address, local.tokenizer).sample(prompts, SEEDS, SAMPLING)
    with pytest.raises(ConfigError, match="this is no address"):
        ServerSampler("http://localhost:80a0/v1", local.tokenizer)


def test_requests_run_side_by_side_up_to_a_limit(local: LocalSampler, prompts: list[list[int]]) -> None:
    with OpenAIServer(local, delay=0.02) as host:
        ServerSampler(host.address, local.tokenizer, at_once=3).sample(prompts[:1], [list(range(12))], SAMPLING)
        assert host.busiest == 3


def test_collecting_from_a_server_and_training_refused(local: LocalSampler, tmp_path: Path) -> None:
    with OpenAIServer(local) as host:
        figures = guerdon.collect(
            TASK, model="tiny:layers=2,width=32,heads=4", sampler=host.address, prompts=4, n=3, max_new_tokens=4,
            out=tmp_path / "feedback.jsonl",
        )  # fmt: skip
        assert figures["completions"] == 12 and len({body["seed"] for body in host.seen}) == 13
        host.asked = 0
        with pytest.raises(ConfigError, match="a server's weights cannot follow the policy"):
            guerdon.train(
                "grpo", model="tiny:layers=1,width=32", task=TASK, sampler=host.address, out=str(tmp_path / "run")
            )
        assert host.asked == 0


def test_the_address_is_a_sampler(local: LocalSampler) -> None:
    engine = make_sampler("http://localhost:8000/v1#tiny-two", None, local.tokenizer, set())
    assert isinstance(engine, ServerSampler) and engine.endpoint.model == "tiny-two"
