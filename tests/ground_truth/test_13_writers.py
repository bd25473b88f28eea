"""Sheet 13, baselines: what EvoPrompt and APE ask and keep, on fitness whose optimum is known, and soft Q-learning."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from guerdon.language.prompting import Prompt
from guerdon.llm import Client, Reply, Request, Usage
from guerdon.methods.prompting.ape import APE
from guerdon.methods.prompting.evoprompt import EvoPrompt, others, roulette
from guerdon.methods.prompting.instructions import instruction_in
from guerdon.methods.prompting.rlprompt import soft_q_loss, z_scores
from guerdon.training.prompting import Score, Search

FULL = Prompt(("say ", "text"), ((0,), ()), frozenset({1}))
TARGET = "1011001110"
BITS = re.compile(rf"\b[01]{{{len(TARGET)}}}\b")


def letters(text, **_):
    """A tokenizer: each character is a token."""

    class Found:
        input_ids = list(range(len(text)))
        offset_mapping = [(i, i + 1) for i in range(len(text))]

    return Found


class Scripted(Client):
    """Answers by a function of the request's text and seed, and remembers what it was asked."""

    concurrency = 4

    def __init__(self, reply: Callable[[str, np.random.Generator], str]):
        self.reply, self.asked = reply, []

    async def _ask(self, request: Request) -> list[Reply]:
        text = request.prompt[0]["content"]
        self.asked.append(text)
        return [Reply(self.reply(text, np.random.default_rng(request.seed)), "stop", usage=Usage(3, 2))]


def search(reply, fitness: Callable[[str], float], budget: int = 1000, seed: int = 0) -> Search:
    def judge(prompts, half):
        return [Score(0.5, float(fitness(p.text.removesuffix("say {text}").strip()))) for p in prompts]

    found = Search(FULL, judge, budget, seed, tokenizer=letters)
    found.examples = [(f"question {i}", f"answer {i}") for i in range(8)]
    found.llm = Scripted(reply)
    return found


def run(method, found: Search) -> list[dict]:
    method.check()
    return list(method.learn(found))


def agreement(text: str) -> float:
    return float(sum(a == b for a, b in zip(text, TARGET, strict=False)))


def crossed(text: str, rng: np.random.Generator) -> str:
    """A stand-in that crosses the bit strings it is shown, flips one bit, and brackets what comes of it."""
    parents = BITS.findall(text)
    if not parents:
        return '"' + "".join(rng.choice(["0", "1"], len(TARGET))) + '"'
    child = [parents[rng.integers(len(parents))][k] for k in range(len(TARGET))]
    flipped = rng.integers(len(TARGET))
    child[flipped] = "10"[int(child[flipped])]
    return f"Step 1 gives <prompt>no</prompt>, so:\n<prompt> {''.join(child)} </prompt>"


# EvoPrompt


@pytest.mark.parametrize("mode", ["ga", "de"])
def test_evolution_by_an_llm_finds_the_optimum_and_never_falls(mode):
    found = search(crossed, agreement, budget=600)
    rows = run(EvoPrompt(mode=mode, population=8, iterations=0), found)
    best = [row["search/best"] for row in rows]
    assert best == sorted(best) and best[0] < len(TARGET) and best[-1] == len(TARGET)
    mean = [row["search/mean"] for row in rows]
    assert mean == sorted(mean)  # neither algorithm lets an instruction go for a worse one
    assert found.cursor.samples == 600 and len(rows) == 1 + -(-591 // 8)
    assert found.best("reward").text == TARGET + "\n\nsay {text}"
    assert rows[-1]["llm/requests"] == len(found.llm.asked) == 599 and rows[-1]["llm/tokens"] == 5 * 599


def test_a_generation_is_what_the_algorithm_says():
    method = EvoPrompt(mode="de", population=3, iterations=1, instructions=("aa", "bbb", "c"))
    found = search(lambda text, rng: f"<prompt>{text[-1]}{text[-1]}</prompt>", len)
    rows = run(method, found)
    assert len(rows) == 2 and found.cursor.samples == 7
    assert len(found.llm.asked) == 3  # the population was given
    for text, own in zip(found.llm.asked, ("aa", "bbb", "c"), strict=True):
        assert "Prompt 3: bbb" in text and text.endswith(f"Basic Prompt: {own}")
        two = set(re.findall(r"Prompt [12]: (\w+)", text))
        assert two == {"aa", "bbb", "c"} - {own}
    # aa -> aa is no fitter, bbb -> bb is worse, c -> cc is fitter
    assert [found.archive[i].instruction for i in found.state["population"]] == ["aa", "bbb", "cc"]

    genetic = search(lambda text, rng: "<prompt>dddd</prompt>", len)
    run(EvoPrompt(population=3, iterations=1, instructions=("aa", "bbb", "c")), genetic)
    assert [genetic.archive[i].instruction for i in genetic.state["population"]] == ["dddd", "bbb", "aa"]
    assert [t.evaluations for t in genetic.archive] == [1, 2, 3, 4, 5] and genetic.cursor.samples == 7


def test_parents_are_drawn_by_roulette():
    np.testing.assert_allclose(roulette([1, 3, 0], 0.0), [0.25, 0.75, 0])
    np.testing.assert_allclose(roulette([-180, 0, 180], -180.0), [0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(roulette([0, 0], 0.0), [0.5, 0.5])
    rng = np.random.default_rng(0)
    pairs = {others(1, 4, rng) for _ in range(200)}
    assert pairs == set(itertools.permutations((0, 2, 3), 2))


def test_replies_are_read_tolerantly():
    assert instruction_in("x <prompt>a</prompt> y <prompt>\nb c\n</prompt>.") == "b c"
    assert instruction_in("<prompt>cut at the end") == "cut at the end"
    assert instruction_in(' "Say it." ') == "Say it." and instruction_in('"') == '"' and instruction_in(" ") == ""


def test_an_llm_that_says_nothing_leaves_the_prompt_as_it_is():
    found = search(lambda text, rng: "  ", len, budget=20)
    run(EvoPrompt(population=4, iterations=0), found)
    assert found.cursor.samples == 20 and [t.instruction for t in found.archive] == [""]


# APE


def test_ape_shows_pairs_and_takes_what_scores_best():
    replies = {"0": "zero", "1": "the one", "2": "two"}
    found = search(lambda text, rng: replies[str(rng.integers(3))], lambda text: float(text == "the one"), budget=40)
    rows = run(APE(proposals=20, pairs=3), found)
    assert found.cursor.samples == 21 and len(found.archive) == 4 and found.best("reward").instruction == "the one"
    assert len(rows) == 3 and rows[-1]["search/best"] == 1
    shown = [re.findall(r"Input: question (\d)\nOutput: answer (\d)", text) for text in found.llm.asked]
    assert all(len(pairs) == 3 and all(a == b for a, b in pairs) for pairs in shown)
    assert len({tuple(pairs) for pairs in shown}) > 10  # other items each time
    assert all("an instruction and 3 inputs" in text for text in found.llm.asked)


def test_further_rounds_vary_the_best():
    def longer(text: str, rng: np.random.Generator) -> str:
        before = re.findall(r"Input: (a+)\n\nOutput:$", text)
        return (before[0] if before else "a") + "a" * int(rng.integers(1, 3))

    found = search(longer, len, budget=36)
    run(APE(proposals=5, rounds=0, top=0.5, instructions=("aaaa",)), found)
    assert found.cursor.samples == 36
    first, second = found.llm.asked[:5], found.llm.asked[5:10]
    assert all(text.endswith("Input: aaaa\n\nOutput:") for text in first)
    # aaaa, aaaaa and aaaaaa were tried: the better half is varied, the best one first
    assert [text.split()[-2] for text in second] == ["aaaaaa", "aaaaa"] * 2 + ["aaaaaa"]
    assert len(found.best("reward").instruction) >= 4 + 7


# RLPrompt


def soft_optimum(reward: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Q, actions, rewards) of all prompts of T tokens, from backward induction; reward has T axes of V."""
    depth, size = reward.ndim, reward.shape[0]
    q = [torch.tensor(reward)]
    for _ in range(depth - 1):
        q.insert(0, q[0].logsumexp(-1))
    actions = torch.tensor(list(itertools.product(range(size), repeat=depth)))
    rows = [torch.stack([level[tuple(a[:t])] for t, level in enumerate(q)]) for a in actions]
    return torch.stack(rows), actions, torch.tensor([reward[tuple(a)] for a in actions])


def test_the_soft_optimum_has_no_loss_and_nothing_else_has_none():
    reward = np.random.default_rng(0).normal(size=(3, 3, 3))
    q, actions, rewards = soft_optimum(reward)
    assert float(soft_q_loss(q, q, actions, rewards)) == pytest.approx(0, abs=1e-12)
    for t in range(3):
        wrong = q.clone()
        wrong[:, t, 0] += 0.5
        assert float(soft_q_loss(wrong, wrong, actions, rewards)) > 1e-3


def test_one_token_regresses_on_its_reward():
    """With T = 1 and the target equal, all four parts are 1/2 (r - Q)^2."""
    q = torch.tensor([[[0.3, -1.0, 2.0]], [[0.0, 0.5, 1.0]]], dtype=torch.double)
    actions, reward = torch.tensor([[2], [0]]), torch.tensor([1.0, -1.0], dtype=torch.double)
    assert float(soft_q_loss(q, q, actions, reward)) == pytest.approx(2 * ((2 - 1) ** 2 + (0 + 1) ** 2) / 2)


def test_the_loss_of_two_tokens_by_hand():
    q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=torch.double)
    target = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], dtype=torch.double)
    log = np.log
    logp, v = [1 - log(np.e + 1), -log(1 + np.e**2)], [log(np.e + 1), log(1 + np.e**2)]
    slow_logp, slow_v = [-log(2), 1 - log(np.e + 1)], [0.5 + log(2), log(np.e + 1)]
    parts = [slow_v[1] - slow_v[0] - logp[0], 3 - slow_v[1] - logp[1]]
    parts += [3 - slow_v[0] - sum(logp), 3 - slow_v[1] - logp[1]]
    parts += [slow_v[1] - v[0] - slow_logp[0], 3 - v[1] - slow_logp[1]]
    parts += [3 - v[0] - sum(slow_logp), 3 - v[1] - slow_logp[1]]
    by_hand = sum(x * x / 2 for x in parts) / 2
    found = soft_q_loss(q, target, torch.tensor([[0, 0]]), torch.tensor([3.0], dtype=torch.double))
    assert float(found) == pytest.approx(by_hand)


def test_gradient_descent_on_the_loss_reaches_the_soft_policy():
    """pi of a whole prompt becomes exp(r) / sum exp(r)."""
    reward = np.random.default_rng(1).normal(size=(3, 3))
    _, actions, rewards = soft_optimum(reward)
    first, second = (torch.zeros(*shape, dtype=torch.double, requires_grad=True) for shape in ((3,), (3, 3)))
    optimizer = torch.optim.Adam([first, second], lr=0.05)
    for _ in range(600):
        q = torch.stack([first.expand(9, 3), second[actions[:, 0]]], 1)
        optimizer.zero_grad()
        soft_q_loss(q, q, actions, rewards).backward()
        optimizer.step()
    logps = first.log_softmax(-1)[:, None] + second.log_softmax(-1)
    np.testing.assert_allclose(logps.detach(), np.log(np.exp(reward) / np.exp(reward).sum()), atol=1e-3)


def test_z_scores():
    np.testing.assert_allclose(z_scores([80, 34, -12]), [1.2247, 0, -1.2247], atol=1e-3)
    assert z_scores([5.0, 5.0]).tolist() == [0, 0]
