"""The group forward equals separate padded rows: log-probs, entropies, heads and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

from guerdon.errors import ConfigError
from guerdon.language.attention import QUERY_BLOCK
from guerdon.language.forward import GroupModel, supports_groups
from guerdon.language.groups import Group
from guerdon.language.models import add_lora
from guerdon.language.packing import pack
from shapes import CONFIGS, VOCABULARY, build, flat_group, random_tree


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def groups_of_many_shapes(seed: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [
        flat_group(rng, 2, 10, 9),
        flat_group(rng, 1, 1, 4),
        flat_group(rng, 5, 30, 1),
        flat_group(rng, 3, 7, 40),
        random_tree(rng, 7, 12),
        random_tree(rng, 4, 30),
        flat_group(rng, 2, QUERY_BLOCK + 20, QUERY_BLOCK + 9),  # more than one block of queries
    ]


@pytest.mark.parametrize("style", CONFIGS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_group_forward_equals_separate_rows(style: str, lora: bool) -> None:
    model = build(style)
    if lora:
        model = add_lora(model, rank=4, alpha=8)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    grouped = GroupModel(model, head="values")
    torch.nn.init.normal_(grouped.head.weight)
    wants = {"logps", "entropy", "values", "scores"}
    batch = pack(groups_of_many_shapes(seed=1))
    weigh = [torch.randn(len(batch.target)) for _ in range(3)] + [torch.randn(len(batch.last))]

    results = []
    for padded in (False, True):
        grouped.padded = padded
        grouped._base.set_attn_implementation("sdpa" if padded else "guerdon")
        outputs = grouped(batch, wants, temperature=0.8)
        found = (outputs.logps, outputs.entropy, outputs.values, outputs.scores)
        sum((x * w).sum() for x, w in zip(found, weigh, strict=True)).backward()
        results.append((found, gradients(grouped)))
    (ours, our_gradients), (naive, naive_gradients) = results

    for ours_, naive_ in zip(ours, naive, strict=True):
        torch.testing.assert_close(ours_, naive_, atol=1e-4, rtol=0)
    assert our_gradients.keys() == naive_gradients.keys() and len(our_gradients) > 4
    for name, gradient in our_gradients.items():
        error = (gradient - naive_gradients[name]).norm() / (naive_gradients[name].norm() + 1e-6)
        assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("style", CONFIGS)
def test_the_last_mlp_sees_what_is_read_and_no_more(style: str) -> None:
    grouped = GroupModel(build(style), head="scores")
    torch.nn.init.normal_(grouped.head.weight)
    batch = pack(groups_of_many_shapes(seed=5))
    layers = getattr(grouped.body, "layers", getattr(grouped.body, "h", None))
    seen: list[int] = []
    layers[-1].mlp.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    together = grouped(batch, {"logps", "scores"})
    torch.testing.assert_close(grouped(batch, {"scores"}).scores, together.scores)
    torch.testing.assert_close(grouped(batch, {"logps"}).logps, together.logps)
    both = torch.cat([batch.source, batch.last])
    assert seen == [len(rows.unique()) for rows in (both, batch.last, batch.source)]
    assert max(seen) < batch.tokens.shape[1]


def test_fused_logps_equal_the_full_softmax_of_transformers() -> None:
    """The padded path shares the fused log-probs, so they are compared with a plain log-softmax once."""
    model = build("llama")
    rng = np.random.default_rng(0)
    group = flat_group(rng, 3, 5, 8)
    outputs = GroupModel(model)(pack([group]), {"logps", "entropy"}, temperature=0.7)
    model.set_attn_implementation("eager")
    logps, entropy = [], []
    for c in range(len(group)):
        tokens, learn = group.sequence(c)
        logits = model(torch.from_numpy(tokens)[None]).logits[0] / 0.7
        p = logits.log_softmax(-1)
        where = torch.from_numpy(np.flatnonzero(learn))
        logps.append(p[where - 1, torch.from_numpy(tokens)[where]])
        entropy.append(-(p.exp() * p).sum(-1)[where - 1])
    torch.testing.assert_close(outputs.logps, torch.cat(logps), atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.entropy, torch.cat(entropy), atol=1e-4, rtol=0)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build("llama")
    batch = pack(groups_of_many_shapes(seed=3)[:3])
    grouped = GroupModel(model).train()
    grouped(batch).logps.sum().backward()
    plain = gradients(grouped)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    grouped(batch).logps.sum().backward()
    for name, gradient in gradients(grouped).items():
        torch.testing.assert_close(gradient, plain[name])


def test_a_batch_gives_each_group_what_it_gets_alone() -> None:
    grouped = GroupModel(build("qwen2"))
    groups = groups_of_many_shapes(seed=2)
    together = grouped(pack(groups)).logps
    alone = torch.cat([grouped(pack([group])).logps for group in groups])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_group_error_is_small_for_a_sound_model_and_large_for_a_broken_one() -> None:
    grouped = GroupModel(build("llama"))
    group = flat_group(np.random.default_rng(0), 3, 5, 6)
    assert grouped.group_error(group) < 1e-4
    normal_forward = type(grouped)._group_states

    def blind_to_positions(self, batch, wants):  # type: ignore[no-untyped-def]
        batch.positions = torch.arange(batch.tokens.shape[1])[None] * 3
        return normal_forward(self, batch, wants)

    grouped._group_states = blind_to_positions.__get__(grouped)
    assert grouped.group_error(group) > 1e-2


def test_bf16_is_as_near_to_fp32_as_separate_rows_are() -> None:
    model = build("llama")
    batch = pack(groups_of_many_shapes(seed=4))
    exact = GroupModel(model)(batch).logps
    model = model.to(torch.bfloat16)
    grouped = GroupModel(model)(batch).logps
    model.set_attn_implementation("sdpa")
    separate = GroupModel(model, padded=True)(batch).logps
    assert grouped.dtype == torch.float32
    ours, theirs = ((x - exact).square().mean().sqrt() for x in (grouped, separate))
    assert ours < 1.2 * theirs < 0.1


def test_architectures_that_cannot_are_told_apart() -> None:
    small = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**small, **heads))
    mistral = AutoModelForCausalLM.from_config(MistralConfig(**small, **heads, sliding_window=8))
    assert "sliding" in supports_groups(gemma)
    assert "sliding" in supports_groups(mistral)
    with pytest.raises(ConfigError, match="sliding"):
        GroupModel(mistral)
    batch = pack([flat_group(np.random.default_rng(0), 3, 20, 6)])
    assert torch.isfinite(GroupModel(mistral, padded=True)(batch).logps).all()
    assert supports_groups(build("gpt2")) == ""
