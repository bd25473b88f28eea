"""A policy in this process: replies are its own, whoever else asks at the time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError, DataError
from guerdon.language.forward import GroupModel
from guerdon.language.models import load_model, save_model
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Completion, Sampling
from guerdon.language.sampling.local import LocalSampler
from guerdon.language.templates import continued_ids, prompt_ids
from guerdon.llm import make_client
from guerdon.llm.base import Reply, Request, Usage, gather
from guerdon.llm.budget import Budget
from guerdon.llm.engine import Engine, StoppedError
from guerdon.llm.local import LocalClient, pieces
from guerdon.llm.loop import wait

CHAT = [{"role": "user", "content": "1 + 1 ="}]


@pytest.fixture
def client(policy: Policy) -> LocalClient:
    return LocalClient(policy)


def test_replies_are_the_answers_of_the_policy(client: LocalClient, policy: Policy) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=0.7, top_p=0.9, stop=("5", "e"))
    asked = {"n": 3, "seed": 4, "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "stop": ["5", "e"]}
    for prompt in (CHAT, "1 + 1 ="):
        (answers,) = policy.answer([prompt], 3, sampling, seed=4)
        replies = wait(client.ask(Request(prompt=prompt, logprobs=True, **asked)))
        for answer, reply in zip(answers, replies, strict=True):
            assert reply.text == answer.text and not {"5", "e"} & set(reply.text)
            assert reply.finish == ("stop" if answer.finished else "length")
            assert "".join(reply.tokens) == policy.tokenizer.decode(answer.tokens)
            np.testing.assert_allclose(reply.logps, answer.logps, atol=1e-5)
        written = sum(len(answer.tokens) for answer in answers)
        assert [reply.usage for reply in replies] == [
            Usage(len(prompt_ids(prompt, policy.tokenizer)), written),
            Usage(),
            Usage(),
        ]
        plain = wait(client.ask(Request(prompt=prompt, **asked)))
        assert [(r.text, r.tokens, r.logps) for r in plain] == [(r.text, (), ()) for r in replies]
    assert {reply.finish for reply in replies} == {"stop", "length"} or len(replies) == 3


def test_without_a_seed_replies_are_new(client: LocalClient) -> None:
    found = gather(client, [Request(prompt="a", max_tokens=16)] * 3).complete()
    assert len({replies[0].text for replies in found}) == 3


def together(client: LocalClient, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The replies to requests that all wait while the model is busy with another one, and the prompts of batches."""
    batches: list[list[Any]] = []
    sample = LocalSampler.sample

    def held_back(self: LocalSampler, prompts: list[Any], *rest: Any, **how: Any) -> Any:
        batches.append(prompts)
        while len(batches) == 1 and len(client.engine._waiting) < len(requests):
            time.sleep(0.001)
        return sample(self, prompts, *rest, **how)

    async def ask() -> list[list[Reply]]:
        first = asyncio.create_task(client.ask(Request(prompt="first", max_tokens=2, seed=0)))
        while not batches:
            await asyncio.sleep(0.001)
        found = await asyncio.gather(*map(client.ask, requests))
        await first
        return found

    monkeypatch.setattr(LocalSampler, "sample", held_back)
    return wait(ask()), batches[1:]


def test_requests_that_wait_together_share_a_batch_and_do_not_change_each_other(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(prompt=f"{i % 5}?", seed=i, max_tokens=8, n=1 + i % 2) for i in range(24)]
    client = LocalClient(policy)
    found, batches = together(client, requests, monkeypatch)
    assert [len(prompts) for prompts in batches] == [5]  # what is asked of one prompt computes it once
    assert client.engine.batches == [1, 36]
    alone = [wait(LocalClient(policy).ask(request)) for request in requests[:6]]
    assert [[r.text for r in replies] for replies in found[:6]] == [[r.text for r in replies] for replies in alone]


def test_requests_with_other_settings_take_turns(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(prompt="a", seed=i, max_tokens=4 + i % 3) for i in range(9)]
    client = LocalClient(policy)
    found, _ = together(client, [*requests, Request(prompt="a", continuations=["b"])], monkeypatch)
    assert client.engine.batches == [1, 3, 3, 3] and found[-1][0].finish == "score"


def test_scores_are_the_log_probs_that_sampling_reports(client: LocalClient, policy: Policy) -> None:
    replies = wait(client.complete("1 + 1 =", n=4, seed=1, max_tokens=6, logprobs=True))
    plain = [reply for reply in replies if not any(token.startswith("<") and len(token) > 1 for token in reply.tokens)]
    assert plain
    scores = wait(client.score("1 + 1 =", [reply.text for reply in plain]))
    for score, reply in zip(scores, plain, strict=True):
        np.testing.assert_allclose(score, reply.logps, atol=1e-5)
    assert wait(client.score("a", [])) == []


def test_a_token_that_straddles_the_boundary_is_scored() -> None:
    _, tokenizer = load_model("tiny:layers=1,width=16,heads=2,vocab=word", texts=["one two three"])
    before, after = continued_ids("one tw", "o three", tokenizer)
    assert tokenizer.convert_ids_to_tokens(before) == ["<s>", "one"]
    assert tokenizer.convert_ids_to_tokens(after) == [" two", " three"]
    before, after = continued_ids("", "one", tokenizer)
    assert tokenizer.convert_ids_to_tokens(before + after) == ["<s>", "one"]


@pytest.mark.slow
def test_scores_of_smollm2_know_capitals_and_characters_of_several_tokens() -> None:
    client = make_client("smollm2-135m")
    right, wrong = wait(client.score("Paris is the capital of", [" France", " Germany"]))
    assert right.sum() > wrong.sum() + 1
    assert isinstance(client, LocalClient)
    text = "naïve 日本語 🙂!"
    ids = prompt_ids(text, client.engine.policy.tokenizer)
    parts = pieces(ids, client.engine.policy.tokenizer)
    assert "".join(parts) == text and len(parts) == len(ids) > len(text.split())


def test_what_does_not_fit_is_refused_and_the_rest_answered(client: LocalClient) -> None:
    long = Request(prompt="a" * 500, max_tokens=12)
    found = gather(
        client, [long, Request(prompt="a" * 499, max_tokens=12, seed=1), Request(prompt="a", continuations=["b" * 600])]
    )
    assert "501 tokens and 12 may follow: together 513 are more than the context of 512" in found.refused[0]
    assert found.replies[1] and "context of 512" in found.refused[2]


def test_a_model_without_a_chat_template_says_so(policy: Policy) -> None:
    model, tokenizer = load_model("tiny:layers=1,width=16,heads=2")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        wait(LocalClient(Policy(GroupModel(model), tokenizer)).chat(CHAT))


def test_budgets_hold_in_this_process_too(policy: Policy) -> None:
    budget = Budget(tokens=2000)
    found = gather(
        LocalClient(policy, budget=budget), [Request(prompt="abc", max_tokens=50, n=4, seed=i) for i in range(20)]
    )
    assert found.stopped.startswith("the budget is spent: tokens are at") and 1700 < budget.spent.total <= 2000
    assert found.usage() == budget.spent


def test_replies_of_other_weights_are_told_apart(tmp_path: Path) -> None:
    model, tokenizer = load_model("tiny:layers=1,width=16,heads=2")
    save_model(model, tokenizer, tmp_path / "policy")  # as in a run directory
    one = make_client(str(tmp_path))
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    save_model(model, tokenizer, tmp_path / "policy")
    two = make_client(str(tmp_path))
    assert wait(one.identity()) != wait(two.identity()) == wait(make_client(str(tmp_path)).identity())


def test_who_gives_up_waiting_stops_the_computation(engine: Engine) -> None:
    steps: list[int] = []
    sampling = Sampling(max_new_tokens=400)

    async def hang_up() -> None:
        asked = asyncio.create_task(engine.sample([1, 2], [1], sampling, lambda k, token, logp: steps.append(token)))
        while len(steps) < 2:
            await asyncio.sleep(0.001)
        asked.cancel()
        while engine._busy:
            await asyncio.sleep(0.001)

    engine.policy.sampler.stop_ids, kept = torch.tensor([10**6]), engine.policy.sampler.stop_ids
    try:
        asyncio.run(hang_up())
    finally:
        engine.policy.sampler.stop_ids = kept
    assert 2 <= len(steps) < 400


def test_a_closed_engine_stops_and_says_so(engine: Engine) -> None:
    async def close_in_the_middle() -> list[Completion]:
        return await engine.sample([1, 2], [1], Sampling(max_new_tokens=400), lambda *drawn: engine.close())

    with pytest.raises(StoppedError):
        asyncio.run(close_in_the_middle())
    with pytest.raises(StoppedError):
        asyncio.run(engine.score([([1], [2])]))


def test_a_failure_of_one_batch_is_told_to_those_who_asked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    async def ask() -> list[Any]:
        asked = (engine.sample([1, 2], [k], Sampling(max_new_tokens=4)) for k in range(3))
        return await asyncio.gather(*asked, return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(engine.policy.sampler, "sample", fail)
        assert [str(error) for error in asyncio.run(ask())] == ["no room"] * 3
    assert all(len(found) == 1 for found in asyncio.run(ask()))  # and the next batch is computed


def test_what_each_refuses(engine: Engine) -> None:
    with pytest.raises(DataError, match="context of 512"):
        asyncio.run(engine.sample([1] * 600, [1], Sampling()))
    assert Reply("a", "stop").usage == Usage()
