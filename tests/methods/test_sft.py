from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guerdon.language.forward import GroupModel
from guerdon.language.groups import Group
from guerdon.language.packing import pack
from guerdon.methods.base import get_method
from guerdon.methods.demonstrations.sft import RFT, SFT

RNG = np.random.default_rng(0)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))


def tokens(*lengths: int) -> list[list[int]]:
    return [RNG.integers(0, 11, n).tolist() for n in lengths]


def scored(scores: list[float], completions: list[list[int]] | None = None) -> Group:
    answers = completions or [[i + 1] for i in range(len(scores))]
    return Group.of([0], answers, values={"score": np.array(scores, dtype=np.float32)})


def answers(groups: list[Group]) -> list[list[list[int]]]:
    return [[g.sequence(c)[0][1:].tolist() for c in range(len(g))] for g in groups]


def gradient(method: SFT, groups: list[Group], batches: list[list[Group]]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the global batch `groups`, accumulated over `batches`."""
    model = GroupModel(tiny_model())
    total = 0.0
    for part in batches:
        batch = pack(part, totals=method.totals(groups))
        loss, _ = method.loss(model(batch), batch)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_loss_and_gradient_equal_plain_forward_passes(average):
    groups = [Group.of(*tokens(4), tokens(3, 7)), Group.of(*tokens(6), tokens(1))]
    method = SFT(average=average)
    logps = []
    model = tiny_model()
    for group in groups:
        for c in range(len(group)):
            ids, learn = (torch.from_numpy(x) for x in group.sequence(c))
            row = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            logps.append(row[learn[1:]])
    expected = -torch.cat(logps).mean() if average == "tokens" else -torch.stack([x.mean() for x in logps]).mean()
    expected.backward()
    slope = torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, found = gradient(method, groups, [groups])
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(found, slope, atol=1e-6, rtol=1e-4)

    # Neither the cut into micro-batches nor a group cut by completions changes anything.
    cut = [[groups[0].subset([0])], [groups[1], groups[0].subset([1])]]
    loss, found = gradient(method, groups, cut)
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(found, slope, atol=1e-6, rtol=1e-4)


def test_metric_is_the_loss():
    group = Group.of(*tokens(4), tokens(3, 7))
    for average in ("tokens", "sequences"):
        method = SFT(average=average)
        batch = pack([group], totals=method.totals([group]))
        loss, metrics = method.loss(GroupModel(tiny_model())(batch), batch)
        assert metrics["loss/nll"].mean().item() == pytest.approx(loss.item(), rel=1e-6)


def test_demonstrations_are_all_imitated_and_scored_answers_from_min_score_on():
    demonstrations = [Group.of([0], [[1], [2]])]
    assert answers(SFT().credit(demonstrations, RNG)) == [[[1], [2]]]
    preference, none_right, ratings = scored([1, 0]), scored([0, 0.5]), scored([2, 5, 3, 5])
    assert answers(SFT().credit([preference, none_right], RNG)) == [[[1]]]
    assert answers(SFT(min_score=3).credit([ratings], RNG)) == [[[2], [3], [4]]]
    assert answers(SFT(min_score=3, keep="best").credit([ratings, preference], RNG)) == [[[2]]]
    assert answers(SFT(min_score=-np.inf, keep="best").credit([none_right], RNG)) == [[[2]]]


def test_identical_answers_are_imitated_once_by_rft():
    group = scored([1, 1, 0, 1, 1], [[3, 4], [5], [6], [3, 4], [5, 5]])
    assert answers(SFT().credit([group], RNG)) == [[[3, 4], [5], [3, 4], [5, 5]]]
    assert answers(RFT().credit([group], RNG)) == [[[3, 4], [5], [5, 5]]]


def test_registered_with_the_published_settings():
    method = get_method("sft")()
    assert method.papers == (17,) and method.learns_from == "demonstrations" and not method.needs_reference()
    settings = (method.lr, method.batch_size, method.epochs, method.schedule, method.warmup, method.weight_decay)
    assert settings == (5e-6, 128, 2, "linear", 0.03, 0.0)
    assert get_method("rft").learns_from == "verifier"
