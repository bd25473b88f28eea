"""Negative-aware fine-tuning (arXiv 2505.18116): learning from wrong answers, with the smallest policy that has tokens.

A prompt x ~ N(0, I) is answered by two tokens; both are softmax-linear in x, the second for each first one. All answers
can be summed over, so that the probability of a right one is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.claims.base import Above, Alike, Claim
from guerdon.claims.training import one_thread
from guerdon.evaluation.metrics import Evaluation
from guerdon.lazy import torch
from guerdon.methods.policy_gradient import clipped_surrogate
from guerdon.methods.verifiers.nft import nft_loss

WIDTH = 12  # of a prompt
PROMPTS, GROUP, BATCHES = 32, 8, 4  # in each round: prompts, answers to each, updates
HELD_OUT = 1000  # prompts by which a policy is judged
CLIP = 0.2


def trial(
    arm: Mapping[str, Any], seeds: Sequence[int], settings: Mapping[str, Any], directory: Path
) -> dict[int, Evaluation]:
    """Trained with each learning rate; what counts is the mean over them. Each seed has a world of its own."""
    found = {}
    for seed in seeds:
        with one_thread():
            scores = {f"reward/lr-{lr:g}": accuracy(arm, seed, lr, settings) for lr in settings["lrs"]}
        metrics = {"reward": float(np.mean(list(scores.values()))), **scores}
        found[seed] = Evaluation(["world"], {name: np.array([score]) for name, score in metrics.items()}, "reward")
    return found


def accuracy(arm: Mapping[str, Any], seed: int, lr: float, settings: Mapping[str, Any]) -> float:
    """Probability of a right answer to new prompts after training."""
    rng = torch.Generator().manual_seed(seed)
    right_answers = world(settings["vocabulary"], settings["right"], rng)
    held_out = torch.randn(HELD_OUT, WIDTH, generator=rng)
    size = settings["vocabulary"]
    weights = [torch.zeros(size, WIDTH, requires_grad=True), torch.zeros(size, size, WIDTH, requires_grad=True)]
    optimizer = torch.optim.Adam(weights, lr=lr)
    for _ in range(settings["rounds"]):
        x = torch.randn(PROMPTS, WIDTH, generator=rng)
        with torch.no_grad():
            first, second = token_logps(weights, x)
            answers = torch.multinomial((first[:, :, None] + second).flatten(1).exp(), GROUP, True, generator=rng)
            old = chosen_logps(first, second, answers)
        correct = right_answers(x).flatten(1).gather(1, answers).float()
        pass_rate = correct.mean(1, keepdim=True).expand_as(correct)
        for rows in torch.randperm(PROMPTS, generator=rng).chunk(BATCHES):
            rows = rows[(pass_rate[rows, 0] > 0) & (pass_rate[rows, 0] < 1)]
            if not len(rows):
                continue
            log_ratio = chosen_logps(*token_logps(weights, x[rows]), answers[rows]) - old[rows]
            loss = answer_loss(arm, log_ratio, correct[rows, :, None], pass_rate[rows, :, None])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        first, second = token_logps(weights, held_out)
        return float(((first[:, :, None] + second).exp() * right_answers(held_out)).sum((1, 2)).mean())


def answer_loss(
    arm: Mapping[str, Any], log_ratio: torch.Tensor, correct: torch.Tensor, pass_rate: torch.Tensor
) -> torch.Tensor:
    """Loss of answers to some prompts, (prompts, answers, tokens), summed over tokens and averaged over answers."""
    correct, pass_rate = correct.expand_as(log_ratio), pass_rate.expand_as(log_ratio)
    if arm["method"] == "nft":
        losses, _ = nft_loss(log_ratio, correct, pass_rate, **arm["options"])
    else:
        losses, _ = clipped_surrogate(log_ratio.exp(), correct - pass_rate, CLIP, CLIP)
    return losses.sum(-1).mean()


def token_logps(weights: Sequence[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the first token (N, V), and of the second given the first (N, V, V)."""
    return (x @ weights[0].T).log_softmax(-1), torch.einsum("nd,abd->nab", x, weights[1]).log_softmax(-1)


def chosen_logps(first: torch.Tensor, second: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Log-probs of the two tokens of answers (N, K), which are numbered row by row: (N, K, 2)."""
    return torch.stack([first.gather(1, answers // first.shape[1]), second.flatten(1).gather(1, answers)], -1)


def world(size: int, right: str, rng: torch.Generator) -> Any:
    """Prompts (N, WIDTH) -> which answers are right, (N, V, V) bool.

    "many": those whose tokens sum to the prompt's class modulo 3; "one": the class of the prompt and another class.
    The classes are the greatest of hidden linear scores.
    """
    if right == "many":
        scores = torch.randn(WIDTH, 3, generator=rng)
        sums = (torch.arange(size)[:, None] + torch.arange(size)) % 3
        return lambda x: (x @ scores).argmax(1)[:, None, None] == sums
    scores = torch.randn(2, WIDTH, size, generator=rng)
    tokens = torch.arange(size)

    def one(x: torch.Tensor) -> torch.Tensor:
        first, second = (x @ scores).argmax(-1)
        return (first[:, None, None] == tokens[:, None]) & (second[:, None, None] == tokens)

    return one


CLAIM = Claim(
    paper=62,
    says=(
        "Supervised learning from right and wrong answers (NFT) is better than from right ones alone (RFT), and as "
        "good as reinforcement learning (Dr. GRPO), where a prompt has many right answers."
    ),
    measures="probability of a right answer to a new prompt, mean over learning rates",
    arms={
        "nft": {"method": "nft", "options": {}},
        "rft": {"method": "nft", "options": {"neg_weight": 0.0, "normalize": 0}},
        "dr-grpo": {"method": "dr-grpo"},
    },
    settings={
        "many-answers": {"right": "many", "vocabulary": 6, "rounds": 80, "lrs": [0.02, 0.05, 0.1]},
        "one-answer": {"right": "one", "vocabulary": 7, "rounds": 80, "lrs": [0.02, 0.05, 0.1]},
    },
    trial=trial,
    criteria=(
        Above("nft", "rft", where="many-answers"),
        Alike("nft", "dr-grpo", 0.04, where="many-answers"),
    ),
    seeds=10,
    together=10,
    minutes=3,
    quick={"rounds": 20, "lrs": [0.05]},
)
