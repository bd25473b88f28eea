from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from guerdon.language.forward import GroupModel
from guerdon.language.groups import Group
from guerdon.language.packing import pack
from guerdon.language.sampling.base import Sampling
from guerdon.methods.preferences.token_q import (
    CausalDecoder,
    Hypothesis,
    RealignedDecoder,
    beam_search,
    credit_map,
    diagnostics,
    expected_advantage,
    implicit_token_rewards,
    realign,
    sample,
)

VOCABULARY, STOP = 5, 0
PROMPTS = [[1, 2, 3], [4], [2, 2, 1, 3, 4, 1]]


def tiny(kind: str = "llama", seed: int = 0, vocabulary: int = VOCABULARY):
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
        )
        return GPT2LMHeadModel(config).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.5, **sizes)).eval()


def log_likelihood(model, prompt: list[int], answer: tuple[int, ...]) -> float:
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(logps[len(prompt) - 1 :].sum())


def finished_answers(longest: int) -> list[tuple[int, ...]]:
    """Every answer of at most `longest` tokens that ends with the stop token."""
    return [(*body, STOP) for n in range(longest) for body in itertools.product(range(1, VOCABULARY), repeat=n)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_full_beam_finds_the_likeliest_answers_of_all(kind):
    model = tiny(kind)
    found = beam_search(CausalDecoder(model), PROMPTS, beams=VOCABULARY**3, max_new_tokens=3, stop=[STOP], keep=3)
    for prompt, hypotheses in zip(PROMPTS, found, strict=True):
        every = sorted(((log_likelihood(model, prompt, a), a) for a in finished_answers(3)), reverse=True)
        assert [h.tokens for h in hypotheses] == [a for _, a in every[:3]]
        np.testing.assert_allclose([h.logp for h in hypotheses], [logp for logp, _ in every[:3]], atol=1e-5)
        assert all(h.finished for h in hypotheses)


def test_one_beam_is_greedy_decoding():
    model = tiny(seed=1)
    found = beam_search(CausalDecoder(model), PROMPTS, beams=1, max_new_tokens=12, stop=[STOP])
    for prompt, [hypothesis] in zip(PROMPTS, found, strict=True):
        tokens: list[int] = []
        while len(tokens) < 12 and STOP not in tokens:
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].argmax()))
        assert hypothesis.tokens == tuple(tokens)
        assert hypothesis.finished == (STOP in tokens)
        assert hypothesis.logp == pytest.approx(log_likelihood(model, prompt, hypothesis.tokens), abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_transformers_beam_search_without_length_penalty(seed):
    model = tiny(seed=seed, vocabulary=12)
    settings = {"num_beams": 4, "do_sample": False, "max_new_tokens": 10, "length_penalty": 0.0}
    settings |= {"eos_token_id": [0, 1, 2], "pad_token_id": 0}
    compared = 0
    for prompt in ([4, 5, 3], [7, 5], [11]):
        ids = torch.tensor([prompt])
        theirs = tuple(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist())
        [[ours]] = beam_search(CausalDecoder(model), [prompt], beams=4, max_new_tokens=10, stop=[0, 1, 2])
        if theirs[-1] in (0, 1, 2):
            compared += 1
            assert ours.finished and ours.tokens == theirs
    assert compared


def test_wider_beams_find_likelier_answers_and_several_stop_tokens_end_them():
    model = tiny(seed=5, vocabulary=20)
    logps = []
    for beams in (1, 3, 10, 400):
        [[best]] = beam_search(CausalDecoder(model), [[3, 4]], beams=beams, max_new_tokens=3, stop=[0, 1, 2])
        assert not set(best.tokens[:-1]) & {0, 1, 2} and best.finished == (best.tokens[-1] in (0, 1, 2))
        logps.append((best.finished, best.logp))
    assert logps == sorted(logps)


def test_likely_stop_tokens_do_not_crowd_out_answers_that_go_on():
    class Policy:
        """Stops at once with 0 or 1, or says 2 or 3 and then stops with 0."""

        def start(self, prompts):
            return torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

        def step(self, rows, tokens):
            return torch.tensor([[1.0, 0, 0, 0]]).log().expand(len(rows), 4)

    [found] = beam_search(Policy(), [[]], beams=2, max_new_tokens=2, stop=[0, 1], keep=4)
    assert [h.tokens for h in found] == [(0,), (1,), (2, 0), (3, 0)]
    np.testing.assert_allclose(np.exp([h.logp for h in found]), [0.4, 0.3, 0.2, 0.1], rtol=1e-6)


def test_an_answer_that_ended_ranks_above_one_that_was_cut():
    assert Hypothesis(True, -9.0, (1, 0)) > Hypothesis(False, -1.0, (1, 1))


def test_realigned_distribution_is_the_product_renormalised():
    base, proxy, reference = (torch.randn(7, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for strength in (0.0, 0.5, 1.0, 2.0):
        product = base.softmax(-1) * (proxy.softmax(-1) / reference.softmax(-1)) ** strength
        found = realign(base, proxy, reference, strength).exp()
        torch.testing.assert_close(found, product / product.sum(-1, keepdim=True))
    torch.testing.assert_close(realign(base, proxy, base), proxy.log_softmax(-1))
    torch.testing.assert_close(realign(base, proxy + 3, reference - 2), realign(base, proxy, reference))


def test_realigned_decoder_searches_and_samples_the_realigned_policy():
    base, proxy, reference = (tiny(seed=seed) for seed in range(3))

    def logps(prompt: list[int], answer: tuple[int, ...]) -> float:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = [m(input_ids=ids).logits[0, len(prompt) - 1 : -1] for m in (base, proxy, reference)]
        return float(realign(*logits, 1.5).gather(1, ids[0, len(prompt) :, None]).sum())

    decoder = RealignedDecoder(*(CausalDecoder(m) for m in (base, proxy, reference)), strength=1.5)
    found = beam_search(decoder, PROMPTS, beams=VOCABULARY**2, max_new_tokens=3, stop=[STOP])
    for prompt, [best] in zip(PROMPTS, found, strict=True):
        likeliest = max(finished_answers(3), key=lambda a: logps(prompt, a))
        assert best.tokens == likeliest
        assert best.logp == pytest.approx(logps(prompt, likeliest), abs=1e-5)

    draws = sample(decoder, [[4]] * 2000, range(2000), Sampling(max_new_tokens=2), stop=[STOP])
    shares = {a: sum(d.tokens == a for d in draws) / 2000 for a in {d.tokens for d in draws}}
    assert all(d.logp == pytest.approx(logps([4], d.tokens), abs=1e-5) for d in draws[:20])
    answers = [(STOP,), *itertools.product(range(1, VOCABULARY), range(VOCABULARY))]
    p = {a: np.exp(logps([4], a)) for a in answers}
    assert sum(p.values()) == pytest.approx(1, abs=1e-5)
    assert all(abs(shares.get(a, 0) - p[a]) < 4.5 * np.sqrt(p[a] / 2000) + 1e-3 for a in answers)


def test_a_sampled_answer_does_not_depend_on_its_neighbours():
    decoder = CausalDecoder(tiny(seed=2))
    sampling = Sampling(max_new_tokens=8, top_p=0.9)
    together = sample(decoder, PROMPTS, [7, 8, 9], sampling, stop=[STOP])
    for prompt, seed, answer in zip(PROMPTS, [7, 8, 9], together, strict=True):
        [alone] = sample(decoder, [prompt], [seed], sampling, stop=[STOP])
        assert alone.tokens == answer.tokens
        assert alone.logp == pytest.approx(answer.logp, abs=1e-5)


def rows() -> tuple[Group, torch.Tensor, torch.Tensor]:
    """A group of two answers, and the same as padded rows with their completion mask."""
    group = Group.of([1, 2], [[3, 4, 0], [4, 0]])
    ids = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 4, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]], dtype=torch.bool)
    return group, ids, mask


def test_token_rewards_of_padded_rows_and_of_groups_agree():
    group, ids, mask = rows()
    policy, reference = tiny(seed=0), tiny(seed=1)
    padded = implicit_token_rewards(policy, reference, ids, mask, beta=0.2)
    assert padded.shape == ids.shape and (padded[~mask] == 0).all() and (padded[mask] != 0).all()
    totals = [
        0.2 * (log_likelihood(policy, [1, 2], a) - log_likelihood(reference, [1, 2], a)) for a in ((3, 4, 0), (4, 0))
    ]
    np.testing.assert_allclose(padded.sum(-1), totals, atol=1e-5)

    batch = pack([group])
    with torch.no_grad():
        logps, ref_logps = (GroupModel(m)(batch).logps.numpy() for m in (policy, reference))
    maps = credit_map(group, logps, ref_logps, beta=0.2)
    assert [len(m) for m in maps] == [len(group.sequence(c)[0]) for c in range(2)]
    for found, row in zip(maps, padded, strict=True):
        np.testing.assert_allclose(found, row[: len(found)], atol=1e-5)


def test_credit_map_follows_the_paths_of_a_tree():
    group = Group.of([1], [[2, 3], [4]], learn=[[True, False], [True]])
    maps = credit_map(group, np.array([-1.0, -2.0]), np.array([-3.0, -1.0]), beta=0.5)
    assert [m.tolist() for m in maps] == [[0, 1.0, 0], [0, -0.5]]


def test_diagnostics_on_pairs():
    _, ids, mask = rows()
    policy, reference = tiny(seed=0), tiny(seed=1)
    found = diagnostics(policy, reference, ids, mask, beta=0.2)
    chosen, rejected = implicit_token_rewards(policy, reference, ids, mask, beta=0.2).sum(-1).tolist()
    assert found["reward/chosen"] == pytest.approx(chosen) and found["reward/rejected"] == pytest.approx(rejected)
    assert found["preference/margin"] == pytest.approx(chosen - rejected)
    assert found["preference/accuracy"] == float(chosen > rejected)
    with torch.no_grad():
        logits, ref = policy(input_ids=ids).logits[:, :-1], reference(input_ids=ids).logits[:, :-1]
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=ref), torch.distributions.Categorical(logits=logits)
    )
    torch.testing.assert_close(expected_advantage(logits, ref, 0.2), -0.2 * kl, atol=1e-6, rtol=1e-5)
    assert found["policy/expected_advantage"] == pytest.approx(-0.2 * kl[mask[:, 1:]].mean().item(), rel=1e-4)
    same = diagnostics(policy, policy, ids, mask, beta=0.2)
    assert all(abs(value) < 1e-6 for value in same.values())
