"""Scores of continuations are those of each sequence alone, whatever they share and however they are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.language.forward import GroupModel
from guerdon.language.models import load_model
from guerdon.language.scoring import Trie, score, score_pairs

STYLES = ("llama", "qwen2", "gpt2")


def alone(model, context, continuation):
    """Log-probs from a forward pass of transformers over one sequence."""
    if not len(continuation):
        return np.zeros(0)
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1)
    return logps[torch.arange(len(logps)), ids[0, 1:]][len(context) - 1 :].numpy()


def random_model(style: str, padded: bool = False):
    """(transformers' model, the same weights on groups); random heads far from uniform."""
    name = f"tiny:layers=2,width=32,heads=4,context=512,style={style}"
    plain, grouped = load_model(name, seed=3)[0], load_model(name, seed=3)[0]
    for model in (plain, grouped):
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data = 0.2 * torch.randn(p.shape, generator=generator) + p.data
    return plain, GroupModel(grouped, padded=padded)


def ids(rng, n: int, high: int = 90) -> list[int]:
    return rng.integers(3, high, n).tolist()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("max_tokens", [4096, 7, 300])
def test_one_prefix(style, max_tokens):
    plain, model = random_model(style)
    rng = np.random.default_rng(0)
    prefix = ids(rng, 40)
    continuations = [ids(rng, n) for n in (1, 3, 9, 1, 0, 30)]
    continuations += [continuations[2][:5], continuations[2] + ids(rng, 2), continuations[5]]
    found = score(model, prefix, continuations, max_tokens=max_tokens)
    assert [x.dtype for x in found] == [np.float32] * len(found)
    for continuation, logps in zip(continuations, found, strict=True):
        np.testing.assert_allclose(logps, alone(plain, prefix, continuation), atol=1e-4)
    assert max(abs(x).max() for x in found if len(x)) > 5  # the model is far from uniform


@pytest.mark.parametrize("style", STYLES)
def test_a_forest_of_prompts_items_and_answers(style):
    """Prompts that lack some tokens of each other, items that begin alike, several answers to each."""
    plain, model = random_model(style)
    rng = np.random.default_rng(1)
    full, items, answers = ids(rng, 30), [[7, *ids(rng, n)] for n in (2, 5, 11)], [[5], [6], [8, 9]]
    prompts = [full, full[:4] + full[6:], full[:20], full[1:]]
    pairs = [(prompt + item, answer) for prompt in prompts for item in items for answer in answers]
    for max_tokens in (4096, 16):
        for pair, logps in zip(pairs, score_pairs(model, pairs, max_tokens=max_tokens), strict=True):
            np.testing.assert_allclose(logps, alone(plain, *pair), atol=1e-4)


def test_long_sequences_cross_blocks_of_queries():
    plain, model = random_model("llama")
    rng = np.random.default_rng(2)
    prefix, continuations = ids(rng, 270), [ids(rng, 150), ids(rng, 20), ids(rng, 5)]
    for max_tokens in (4096, 200):
        found = score(model, prefix, continuations, max_tokens=max_tokens)
        for continuation, logps in zip(continuations, found, strict=True):
            np.testing.assert_allclose(logps, alone(plain, prefix, continuation), atol=1e-4)


def test_padded_models_score_the_same():
    plain, model = random_model("llama", padded=True)
    pairs = [([4, 5, 6], [7, 8]), ([4, 5], []), ([9], [3])]
    for pair, logps in zip(pairs, score_pairs(model, pairs), strict=True):
        np.testing.assert_allclose(logps, alone(plain, *pair), atol=1e-4)


def test_the_probabilities_of_all_tokens_sum_to_one():
    _, model = random_model("llama")
    size = model.model.config.vocab_size
    found = np.concatenate(score(model, [3, 4, 5], [[token] for token in range(size)]))
    assert np.exp(found.astype(float)).sum() == pytest.approx(1, abs=1e-5)


def test_shared_beginnings_are_held_once():
    trie = Trie([(1, 2, 3, 4), (), (1, 2, 5), (1, 2, 3), (6, 2), (1, 2, 3, 4)])
    assert trie.tokens.tolist() == [1, 2, 3, 4, 5, 6, 2]
    assert trie.depth.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert trie.end.tolist() == [5, 5, 4, 4, 5, 7, 7]
    assert trie.paths == [[0, 1, 2, 3], [], [0, 1, 4], [0, 1, 2], [5, 6], [0, 1, 2, 3]]


def test_what_nothing_can_be_predicted_from_is_refused():
    _, model = random_model("llama")
    assert score(model, [3], []) == []
    assert [len(x) for x in score(model, [3], [[], []])] == [0, 0]
    with pytest.raises(ValueError, match="start token"):
        score(model, [], [[3]])


def test_training_mode_comes_back():
    _, model = random_model("llama")
    model.train()
    score(model, [3], [[4]])
    assert model.training
