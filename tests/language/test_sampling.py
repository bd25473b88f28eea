"""The in-process sampler: exact log-probs, independence of the batch, the right distribution, stops."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from guerdon.errors import ConfigError
from guerdon.language.forward import GroupModel
from guerdon.language.groups import Group
from guerdon.language.packing import pack
from guerdon.language.sampling import make_sampler
from guerdon.language.sampling.base import Completion, Sampling, completion_seeds
from guerdon.language.sampling.local import LocalSampler, draw

VOCABULARY = 60
WIDE = {"initializer_range": 0.3, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, **WIDE
    ),
    "gpt2": GPT2Config(n_embd=48, n_layer=3, n_head=6, **WIDE),
}


class Letters:
    """Decodes token i to the character 'A' + i."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool = True) -> list[str]:
        return ["".join(chr(65 + i) for i in row) for row in rows]


def sampler(style: str = "llama", padded: bool = False, rows: int = 64) -> LocalSampler:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[style]))
    return LocalSampler(GroupModel(model, padded=padded), Letters(), stop_ids={5, 6}, rows=rows)


RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(7, VOCABULARY, n).tolist() for n in (4, 9, 1, 20)]
SEEDS = [completion_seeds(6, "test", i) for i in range(len(PROMPTS))]
LONG = Sampling(max_new_tokens=40)


def flat(completions: list[list[Completion]]) -> list[list[int]]:
    return [c.tokens for group in completions for c in group]


@pytest.mark.parametrize("style", CONFIGS)
def test_a_completion_depends_on_its_prompt_and_seed_alone(style: str) -> None:
    together = sampler(style).sample(PROMPTS, SEEDS, LONG)
    engine = sampler(style)
    alone = [[engine.sample([p], [[s]], LONG)[0][0] for s in seeds] for p, seeds in zip(PROMPTS, SEEDS, strict=True)]
    in_small_waves = sampler(style, rows=4).sample(PROMPTS, SEEDS, LONG)
    by_transformers = sampler(style, padded=True).sample(PROMPTS, SEEDS, LONG)
    assert flat(together) == flat(alone) == flat(in_small_waves) == flat(by_transformers)
    lengths = [len(tokens) for tokens in flat(together)]
    assert min(lengths) < 10 and max(lengths) == 40  # rows are retired at different times
    other = sampler(style).sample(PROMPTS, [completion_seeds(6, "other", i) for i in range(4)], LONG)
    assert flat(other) != flat(together)


def test_ragged_numbers_of_completions() -> None:
    seeds = [SEEDS[0][:1], SEEDS[1], [], SEEDS[3][:2]]
    found = sampler(rows=4).sample(PROMPTS, seeds, LONG)
    whole = sampler().sample(PROMPTS, SEEDS, LONG)
    assert [len(group) for group in found] == [1, 6, 0, 2]
    assert flat([found[1]]) == flat([whole[1]]) and found[3][1].tokens == whole[3][1].tokens


@pytest.mark.parametrize("style", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_group_forward(style: str, temperature: float) -> None:
    engine = sampler(style)
    sampling = Sampling(max_new_tokens=30, temperature=temperature, top_p=0.9, top_k=30)
    sampled = engine.sample(PROMPTS, SEEDS, sampling)
    groups = [Group.of(p, [c.tokens for c in g]) for p, g in zip(PROMPTS, sampled, strict=True)]
    expected = engine.model(pack(groups), temperature=temperature).logps
    found = torch.from_numpy(np.concatenate([c.logps for group in sampled for c in group]))
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=0)


def test_ends_and_cuts() -> None:
    for completion in (c for g in sampler().sample(PROMPTS, SEEDS, LONG) for c in g):
        assert completion.finished == (completion.tokens[-1] in (5, 6))
        assert completion.finished or len(completion.tokens) == 40
        assert not {5, 6} & set(completion.tokens[:-1])


def test_stop_strings_end_a_completion_and_leave_its_text() -> None:
    free = sampler().sample(PROMPTS, SEEDS, LONG)[0][4]
    stop = free.text[3:5]
    first = free.text.index(stop)
    stopped = sampler().sample(PROMPTS, SEEDS, Sampling(max_new_tokens=40, stop=("no such", stop)))[0][4]
    assert stopped.finished
    assert stopped.tokens == free.tokens[: first + 2]
    assert stopped.text == free.text[:first]


def test_temperature_zero_is_greedy() -> None:
    engine = sampler()
    found = engine.sample(PROMPTS[:1], [[1, 2]], Sampling(max_new_tokens=5, temperature=0))[0]
    assert found[0].tokens == found[1].tokens
    tokens = list(PROMPTS[0])
    engine.model.model.set_attn_implementation("eager")
    for token in found[0].tokens:
        assert engine.model.model(torch.tensor([tokens])).logits[0, -1].argmax() == token
        tokens.append(token)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()[None]
    n = 40_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(n)).float()

    def shares(sampling: Sampling) -> list[float]:
        tokens, logps = draw(logits.expand(n, 4), uniform, sampling)
        torch.testing.assert_close(logps, (logits / sampling.temperature).log_softmax(-1)[0][tokens])
        return (torch.bincount(tokens, minlength=4) / n).tolist()

    assert shares(Sampling()) == pytest.approx([0.5, 0.2, 0.2, 0.1], abs=0.01)
    assert shares(Sampling(temperature=0.5)) == pytest.approx(np.array([25, 4, 4, 1]) / 34, abs=0.01)
    assert shares(Sampling(top_k=1)) == [1, 0, 0, 0]
    assert shares(Sampling(top_k=2)) == pytest.approx([5 / 7, 2 / 7, 0, 0], abs=0.01)
    assert shares(Sampling(top_p=0.6)) == pytest.approx([5 / 7, 2 / 7, 0, 0], abs=0.01)
    assert shares(Sampling(top_p=0.5)) == [1, 0, 0, 0]


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'local'"):
        make_sampler("locl", None, None, set())
