"""What surrounds vLLM: the weights it is given, what it is asked, what is made of its answers.

vLLM itself needs a GPU. A stand-in with the same calls loads the directory that it is given and draws in-process.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import guerdon
from guerdon.errors import ConfigError
from guerdon.language.forward import GroupModel
from guerdon.language.models import add_lora, load_model
from guerdon.language.sampling import make_sampler
from guerdon.language.sampling.base import Completion, Sampling
from guerdon.language.sampling.local import LocalSampler
from guerdon.language.scoring import score
from guerdon.language.templates import prompt_ids, stop_ids

MODEL = "tiny:layers=2,width=32,heads=4,context=512"
SEEDS = [[11, 12], [], [2**63 - 1]]
SAMPLING = Sampling(max_new_tokens=12, temperature=0.7)


class LLM:
    """The calls of `vllm.LLM` that are used, with a `LocalSampler` behind them."""

    started: list[LLM] = []

    def __init__(self, model: str, **options: Any):
        self.options, self.cache_resets = options, 0
        self.started.append(self)
        self.reload_weights(model)

    def reload_weights(self, weights_path: str) -> None:
        self.weights_path = weights_path
        loaded, self.tokenizer = load_model(weights_path, dtype=self.options["dtype"])
        self.model = GroupModel(loaded)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        getattr(self, method)(**kwargs)

    def reset_prefix_cache(self) -> None:
        self.cache_resets += 1

    def generate(self, prompts: list[dict[str, Any]], parameters: list[Any], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        return [self._one(prompt["prompt_token_ids"], p) for prompt, p in zip(prompts, parameters, strict=True)]

    def _one(self, prompt: list[int], p: Any) -> Any:
        if hasattr(p, "allowed_token_ids"):
            assert (p.max_tokens, p.logprobs) == (1, len(p.allowed_token_ids))
            logps = score(self.model, prompt, [[token] for token in p.allowed_token_ids])
            shown = {t: SimpleNamespace(logprob=float(x[0])) for t, x in zip(p.allowed_token_ids, logps, strict=True)}
            return SimpleNamespace(outputs=[SimpleNamespace(logprobs=[shown])])
        engine = LocalSampler(self.model, self.tokenizer, set(p.stop_token_ids))
        how = Sampling(
            max_new_tokens=p.max_tokens, temperature=p.temperature, top_k=max(p.top_k, 0), top_p=p.top_p,
            stop=tuple(p.stop),
        )  # fmt: skip
        drawn = engine.sample([prompt], [[p.seed]], how)[0][0]
        assert p.logprobs == 0
        logprobs = [
            {token: SimpleNamespace(logprob=float(logp))} for token, logp in zip(drawn.tokens, drawn.logps, strict=True)
        ]
        reason = "stop" if drawn.finished else "length"
        output = SimpleNamespace(token_ids=drawn.tokens, logprobs=logprobs, finish_reason=reason, text=drawn.text)
        return SimpleNamespace(outputs=[output])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    LLM.started = []
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))  # type: ignore
    return LLM


@pytest.fixture
def policy(tiny: tuple[Any, Any], request: pytest.FixtureRequest) -> GroupModel:
    model = copy.deepcopy(tiny[0])
    if getattr(request, "param", "full") == "lora":
        model = add_lora(model, 4, 8.0)
        shake(model)
    return GroupModel(model)


def flat(completions: list[list[Completion]]) -> list[Completion]:
    return [c for group in completions for c in group]


def shake(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


@pytest.mark.parametrize("policy", ["full", "lora"], indirect=True)
def test_it_draws_from_the_policy_and_follows_its_updates(
    policy: GroupModel, tiny: tuple[Any, Any], vllm: type[LLM]
) -> None:
    tokenizer = tiny[1]
    prompts = [prompt_ids(text, tokenizer) for text in ("1 + 2 =", "a", "abc")]
    ends = stop_ids(tokenizer, tiny[0])
    local, engine = LocalSampler(policy, tokenizer, ends), make_sampler("vllm", policy, tokenizer, ends)
    engine.sync(policy)
    assert engine.can_rank([[1], [2]]) and not engine.can_rank([[1], [2, 3]]) and not engine.can_rank([[1]] * 21)
    assert engine.sample([[1]], [[]], SAMPLING) == [[]] and not vllm.started  # nothing asked, nothing started

    def check() -> list[list[int]]:
        found, expected = engine.sample(prompts, SEEDS, SAMPLING), local.sample(prompts, SEEDS, SAMPLING)
        assert [len(group) for group in found] == [2, 0, 1]
        for ours, theirs in zip(flat(found), flat(expected), strict=True):
            assert (ours.tokens, ours.text, ours.finished) == (theirs.tokens, theirs.text, theirs.finished)
            np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-4)
        return [c.tokens for c in flat(found)]

    before = check()
    first = vllm.started[0].weights_path
    assert check() == before and vllm.started[0].weights_path == first  # nothing is written without an update
    shake(policy)
    engine.sync(policy)
    assert check() != before
    (host,) = vllm.started
    assert host.cache_resets == 1 and not Path(first).exists() and Path(host.weights_path).exists()
    assert host.options["dtype"] == "float32" and host.options["logprobs_mode"] == "processed_logprobs"


def test_log_probs_of_a_truncated_distribution_are_left_out(
    policy: GroupModel, tiny: tuple[Any, Any], vllm: type[LLM]
) -> None:
    ends = stop_ids(tiny[1], tiny[0])
    local, engine = LocalSampler(policy, tiny[1], ends), make_sampler("vllm", policy, tiny[1], ends)
    for how in (Sampling(max_new_tokens=5, top_k=3), Sampling(max_new_tokens=5, top_p=0.5)):
        found, expected = engine.sample([[2, 30]], [[1]], how)[0][0], local.sample([[2, 30]], [[1]], how)[0][0]
        assert found.tokens == expected.tokens and len(found.logps) == 0


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"lora_rank": 2}])
def test_training_with_it_equals_training_with_the_local_sampler(
    options: dict[str, Any], vllm: type[LLM], tmp_path: Path
) -> None:
    task = tmp_path / "short.jsonl"
    task.write_text("\n".join(json.dumps({"prompt": f"{i}=", "pattern": "^[a-z]"}) for i in range(20)))
    rows = {}
    for sampler in ("local", "vllm"):
        guerdon.train(
            "grpo", model=MODEL, task=str(task), verifier="regex", sampler=sampler, out=str(tmp_path / sampler),
            rounds=3, prompts_per_round=4, group_size=8, batch_size=4, max_new_tokens=4, lr=1e-2, **options,
        )  # fmt: skip
        lines = (tmp_path / sampler / "metrics.jsonl").read_text().splitlines()
        rows[sampler] = [
            {k: v for k, v in json.loads(line).items() if not k.startswith("time/") and isinstance(v, float)}
            for line in lines
        ]
    assert len(rows["vllm"]) >= 3 and vllm.started[0].cache_resets >= 2
    for ours, theirs in zip(rows["vllm"], rows["local"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    first = next(row for row in rows["vllm"] if "policy/ratio" in row)
    assert first["policy/ratio_error"] < 1e-4


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": f"number {i}", "label": "ab"[i % 2]} for i in range(60)],
        [{"prompt": f"{i} is odd or even", "choices": ["odd", "even"], "answer": (i + 1) % 2} for i in range(60)],
        [{"prompt": f"{i} + 1", "answer": i + 1} for i in range(60)],
    ],
    ids=["classification", "choice", "generation"],
)
def test_prompts_are_judged_as_by_the_model_itself(rows: list[Any], vllm: type[LLM], tmp_path: Path) -> None:
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how: dict[str, Any] = {
        "model": MODEL.replace("32", "16") + ",vocab=word", "data": str(data), "precision": "fp32", "max_samples": 8,
        "search_items": 6, "validation_items": 6, "eval_items": 6, "max_new_tokens": 3,
    }  # fmt: skip
    found = []
    for sampler in ("local", "vllm"):
        run = guerdon.train("random-pruning", **how, sampler=sampler, out=str(tmp_path / sampler))
        found.append([json.loads(line) for line in (run.path / "policy" / "history.jsonl").read_text().splitlines()])
    for ours, theirs in zip(*found, strict=True):
        assert ours.pop("reward") == pytest.approx(theirs.pop("reward"), abs=1e-3) and ours == theirs
    assert len(vllm.started) == 1
    with pytest.raises(ConfigError, match="needs a masked one"):
        guerdon.train("icl", **how, sampler="vllm", template="{text} {mask}", out=str(tmp_path / "masked"))


def test_a_missing_package_is_named(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'guerdon\[vllm\]'"):
        make_sampler("vllm", None, tiny[1], set())


def test_several_processes_are_refused(
    policy: GroupModel, tiny: tuple[Any, Any], vllm: type[LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="works in one process"):
        make_sampler("vllm", policy, tiny[1], set())
