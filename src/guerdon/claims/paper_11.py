"""From r to Q* (Rafailov et al. 2024, arXiv 2404.12358): what a DPO policy knows of single tokens, in two small worlds.

Ciphers: a prompt of letters is answered by the same letters, put through a permutation that the prompt's first letter
chooses, and then by marks that are anybody's choice. Supervised on noisy answers, then DPO on pairs of a right answer
and one with a letter or two changed; nobody says which. Held-out answers with changed letters show whether the implicit
token reward points at them: among the letters, and among letters and marks, which surprise but are no mistakes.

Walks: answers are rows of letters whose hidden reward is a sum over neighbouring letters. A table of logits, for each
place and last letter, is supervised on the preferred one of each pair of answers (or is not), then trained by DPO. Its
beam search, its samples and its implicit rewards are judged by the hidden reward.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.claims.base import Above, Claim
from guerdon.claims.training import learned, one_thread, shared
from guerdon.evaluation.metrics import Evaluation
from guerdon.feedback.records import Record
from guerdon.language.groups import Group
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Sampling
from guerdon.language.templates import render_all
from guerdon.lazy import torch
from guerdon.methods.demonstrations.sft import SFT
from guerdon.methods.preferences.dpo import DPO, implicit_rewards, preference_loss
from guerdon.methods.preferences.token_q import beam_search, credit_map, sample

MODEL = "tiny:layers=2,width=96,heads=4,context=32"  # 0.2 million parameters
HELD_OUT = 200  # prompts by which a policy is judged
Row = dict[str, Any]


def trial(
    arm: Mapping[str, Any], seeds: Sequence[int], settings: Mapping[str, Any], directory: Path
) -> dict[int, Evaluation]:
    """One number for each seed, which has a world of its own. Arms that need the same policies share them."""
    measure = {"auroc": credit, "normalized": search, "reward/chosen": drift, "preference/margin": drift}
    sizes = {name: value for name, value in settings.items() if name not in ("measure", "marks")}
    found = {}
    for seed in seeds:
        with one_thread():
            metrics = measure[settings["measure"]]({**arm, **settings}, seed, sizes, directory)
        values = {name: np.array([float(value)]) for name, value in metrics.items()}
        found[seed] = Evaluation(["world"], values, settings["measure"])
    return found


# Ciphers


def credit(arm: Mapping[str, Any], seed: int, sizes: Mapping[str, Any], directory: Path) -> dict[str, float]:
    """How well a score of tokens tells changed letters from others: the area under its ROC curve."""
    world = Ciphers(seed, sizes)
    with shared(directory, world="ciphers", seed=seed, **sizes) as place:
        sft = learn(SFT, place / "sft", MODEL, world.demonstrations(), seed, sizes)
        dpo = learn(DPO, place / "dpo", sft, world.pairs(), seed, sizes)
    records, changed = world.held_out()
    policy, reference = Policy.load(dpo), Policy.load(sft)
    groups, _ = render_all(records, policy.tokenizer, max_length=64)
    policy.annotate(groups, "logps")
    reference.annotate(groups, "ref_logps")
    scores = np.stack([token_scores(arm["score"], group, seed) for group in groups])
    counted = slice(None if arm["marks"] else world.length)
    return {"auroc": auroc(scores[:, counted].ravel(), changed[:, counted].ravel())}


def token_scores(score: str, group: Group, seed: int) -> np.ndarray:
    """A score of each letter of a group's one answer, the higher the more suspicious."""
    answer = group.segments[1].values
    if score == "random":
        return np.random.default_rng([seed, *group.segments[0].tokens]).random(len(answer["logps"]) - 1)
    if score == "implicit":
        (rewards,) = credit_map(group, answer["logps"], answer["ref_logps"], beta=1.0)
        return -rewards[len(group.segments[0]) : -1]
    return -answer[score][:-1]


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive scores higher than a negative; ties count one half."""
    gaps = scores[positive][:, None] - scores[~positive]
    return float(np.mean(np.sign(gaps)) / 2 + 0.5)


class Ciphers:
    """Prompts, right answers and wrong ones, all drawn from one seed."""

    letters, ciphers, length, noise = np.array(list("abcdefghij")), 3, 6, 0.2
    marks, free = np.array(list(string.ascii_uppercase + string.digits + "!#$%&*+-/:;<>?@")), 3

    def __init__(self, seed: int, sizes: Mapping[str, Any]) -> None:
        self.seed, self.sizes = seed, sizes
        rng = self.rng("keys")
        ciphers = np.stack([rng.permutation(len(self.letters)) for _ in range(self.ciphers)])
        self.keys = ciphers[np.arange(len(self.letters)) % self.ciphers]  # of each first letter

    def rng(self, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what.encode()])

    def draw(self, what: str, count: int) -> Iterator[tuple[np.random.Generator, np.ndarray, np.ndarray]]:
        rng = self.rng(what)
        for prompt in rng.integers(len(self.letters), size=(count, self.length)):
            yield rng, prompt, self.keys[prompt[0]][prompt]

    def text(self, letters: np.ndarray) -> str:
        return "".join(self.letters[letters])

    def choice(self, rng: np.random.Generator) -> str:
        return "".join(rng.choice(self.marks, self.free))

    def changed(self, rng: np.random.Generator, answer: np.ndarray, where: np.ndarray) -> np.ndarray:
        """The answer with other letters in some places."""
        shift = rng.integers(1, len(self.letters), size=len(answer))
        return np.where(where, (answer + shift) % len(self.letters), answer)

    def one_or_two(self, rng: np.random.Generator) -> np.ndarray:
        where = np.zeros(self.length, dtype=bool)
        where[rng.choice(self.length, size=rng.integers(1, 3), replace=False)] = True
        return where

    def demonstrations(self) -> Iterator[Row]:
        for rng, prompt, answer in self.draw("demonstrations", self.sizes["demonstrations"]):
            noisy = self.changed(rng, answer, rng.random(self.length) < self.noise)
            yield {"prompt": f"{self.text(prompt)}=", "completion": self.text(noisy) + self.choice(rng)}

    def pairs(self) -> Iterator[Row]:
        for rng, prompt, answer in self.draw("pairs", self.sizes["pairs"]):
            chosen, rejected = (self.text(a) for a in (answer, self.changed(rng, answer, self.one_or_two(rng))))
            marks = self.choice(rng)
            yield {"prompt": f"{self.text(prompt)}=", "chosen": chosen + marks, "rejected": rejected + marks}

    def held_out(self) -> tuple[list[Record], np.ndarray]:
        """Answers with changed letters, and which of their letters and marks are: (answers, letters + marks) bool."""
        records, changed = [], []
        for rng, prompt, answer in self.draw("held out", HELD_OUT):
            where = self.one_or_two(rng)
            wrong = self.text(self.changed(rng, answer, where)) + self.choice(rng)
            records.append(Record(f"{self.text(prompt)}=", [wrong]))
            changed.append([*where, *[False] * self.free])
        return records, np.array(changed)


def learn(
    method: type[SFT] | type[DPO], directory: Path, start: str, rows: Any, seed: int, sizes: Mapping[str, Any]
) -> str:
    """The policy that a method makes of `start` with these rows."""
    file = directory.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common: Row = {"batch_size": 16, "max_length": 64, "schedule": "linear", "warmup": 0.1}
    if method is SFT:
        configured: SFT | DPO = SFT(lr=2e-3, epochs=sizes["sft_epochs"], **common)
    else:
        configured = DPO(lr=sizes["dpo_lr"], beta=sizes["beta"], epochs=sizes["dpo_epochs"], **common)
    return learned(configured, directory, model=start, data=str(file), seed=seed)


# Walks


def search(arm: Mapping[str, Any], seed: int, sizes: Mapping[str, Any], directory: Path) -> dict[str, float]:
    """Hidden reward of the answers as a share of the best there is, and how often it is above a preferred answer's."""
    world = Walks(seed)
    decoder = Table(walkers(seed, **sizes)[arm["policy"]])
    preferred, _ = world.pairs("held out", HELD_OUT)
    prompts = preferred[:, :1].tolist()
    if arm["beams"]:
        best = beam_search(decoder, prompts, beams=arm["beams"], max_new_tokens=world.length)
        found = [hypothesis for (hypothesis,) in best]
    else:
        found = sample(decoder, prompts, range(HELD_OUT), Sampling(max_new_tokens=world.length))
    rewards = world.reward(np.array([[*prompt, *h.tokens] for prompt, h in zip(prompts, found, strict=True)]))
    return {
        "normalized": np.mean(rewards / world.best[preferred[:, 0]]),
        "win-rate": np.mean(np.sign(rewards - world.reward(preferred))) / 2 + 0.5,
    }


def drift(arm: Mapping[str, Any], seed: int, sizes: Mapping[str, Any], directory: Path) -> dict[str, float]:
    """Implicit rewards of held-out pairs after DPO."""
    world = Walks(seed)
    policies = walkers(seed, **sizes)
    policy, reference = policies[arm["policy"]], policies[arm["reference"]]
    both = [torch.from_numpy(walks) for walks in world.pairs("held out", 10 * HELD_OUT)]
    chosen, rejected = (sizes["beta"] * float((logps(policy, w) - logps(reference, w)).mean()) for w in both)
    return {"reward/chosen": chosen, "reward/rejected": rejected, "preference/margin": chosen - rejected}


class Walks:
    """Answers of equal length with a hidden reward for each pair of neighbours, all drawn from one seed.

    An answer is a row of letters after the prompt's, which is the first.
    """

    letters, length = 12, 8

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.steps = self.rng("steps").normal(size=(self.letters, self.letters))

    def rng(self, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what.encode()])

    @cached_property
    def best(self) -> np.ndarray:
        """The highest reward of an answer to each prompt, by dynamic programming."""
        best = np.zeros(self.letters)
        for _ in range(self.length):
            best = (self.steps + best).max(1)
        return best

    def reward(self, walks: np.ndarray) -> np.ndarray:
        return np.asarray(self.steps[walks[:, :-1], walks[:, 1:]].sum(1))

    def pairs(self, what: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Chosen and rejected ones of random answers to a prompt; the higher reward is the likelier one to win."""
        rng = self.rng(what)
        a, b = rng.integers(self.letters, size=(2, count, 1 + self.length))
        b[:, 0] = a[:, 0]
        wins = rng.random((count, 1)) < 1 / (1 + np.exp(self.reward(b) - self.reward(a)))[:, None]
        return np.where(wins, a, b), np.where(wins, b, a)


class Table:
    """A policy that knows how long its answer is and which letter was the last: logits (length, letters, letters)."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        self.at = 0
        return self.logits[0, [prompt[-1] for prompt in prompts]]

    def step(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        self.at += 1
        return self.logits[self.at, tokens]


def logps(logits: torch.Tensor, walks: torch.Tensor) -> torch.Tensor:
    """Log-probs of whole answers, (N,)."""
    return logits.log_softmax(-1)[torch.arange(len(logits)), walks[:, :-1], walks[:, 1:]].sum(1)


@lru_cache(maxsize=1)
def walkers(seed: int, pairs: int, beta: float, lr: float, updates: int) -> dict[str, torch.Tensor]:
    """The policies: of random answers, supervised on chosen ones, and trained by DPO from each of the two."""
    world = Walks(seed)
    chosen, rejected = (torch.from_numpy(walks) for walks in world.pairs("pairs", pairs))

    def dpo(start: torch.Tensor) -> torch.Tensor:
        lengths = torch.full((len(chosen),), float(world.length))

        def loss(logits: torch.Tensor) -> torch.Tensor:
            ours, theirs = (
                implicit_rewards(logps(logits, w) - logps(start, w), lengths, beta=beta) for w in (chosen, rejected)
            )
            return preference_loss(ours, theirs).mean()

        return descended(loss, start, lr, updates)

    base = torch.zeros(world.length, world.letters, world.letters, dtype=torch.float64)
    sft = descended(lambda logits: -logps(logits, chosen).mean(), base, lr, updates)
    return {"base": base, "sft": sft, "dpo": dpo(sft), "dpo-from-base": dpo(base)}


def descended(
    loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, lr: float, updates: int
) -> torch.Tensor:
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    for _ in range(updates):
        optimizer.zero_grad()
        loss(logits).backward()
        optimizer.step()
    return logits.detach()


CIPHERS = {"demonstrations": 3000, "sft_epochs": 3, "pairs": 1500, "dpo_epochs": 1, "dpo_lr": 2e-4, "beta": 0.1}
WALKS = {"pairs": 5000, "beta": 0.5, "lr": 0.05, "updates": 100}


def answers(policy: str, beams: int) -> dict[str, Any]:
    return {"where": ["search"], "policy": policy, "beams": beams}


CLAIM = Claim(
    paper=11,
    says=(
        "A DPO policy is a Q-function of tokens: trained on whole answers, its implicit rewards point at the wrong "
        "tokens, a small beam of its likelihood finds better answers, and after supervision on the chosen answers "
        "their implicit reward falls below zero while the margin grows."
    ),
    measures=(
        "credit: area under the ROC curve of changed letters, among letters or letters and marks; search: hidden "
        "reward as a share of the best there is; chosen, margin: implicit reward of the chosen answer and its lead "
        "over the rejected one, in nats times beta"
    ),
    arms={
        "implicit-reward": {"where": ["credit", "credit-among-marks"], "score": "implicit"},
        "sft-likelihood": {"where": ["credit", "credit-among-marks"], "score": "ref_logps"},
        "dpo-likelihood": {"where": ["credit", "credit-among-marks"], "score": "logps"},
        "random": {"where": ["credit", "credit-among-marks"], "score": "random"},
        "sampling": answers("dpo", 0),
        "beam-1": answers("dpo", 1),
        "beam-2": answers("dpo", 2),
        "beam-5": answers("dpo", 5),
        "beam-10": answers("dpo", 10),
        "sft-sampling": answers("sft", 0),
        "sft-beam-1": answers("sft", 1),
        "sft-beam-5": answers("sft", 5),
        "start": {"where": ["chosen", "margin"], "policy": "sft", "reference": "sft"},
        "dpo-after-sft": {"where": ["chosen", "margin"], "policy": "dpo", "reference": "sft"},
        "dpo-from-base": {"where": ["chosen", "margin"], "policy": "dpo-from-base", "reference": "base"},
    },
    settings={
        "credit": {"measure": "auroc", "marks": False, **CIPHERS},
        "credit-among-marks": {"measure": "auroc", "marks": True, **CIPHERS},
        "search": {"measure": "normalized", **WALKS},
        "chosen": {"measure": "reward/chosen", **WALKS},
        "margin": {"measure": "preference/margin", **WALKS},
    },
    trial=trial,
    criteria=(
        Above("implicit-reward", "random", 0.3, where="credit"),
        Above("implicit-reward", "sft-likelihood", where="credit"),
        Above("implicit-reward", "sft-likelihood", where="credit-among-marks"),
        Above("beam-5", "sampling", where="search"),
        Above("beam-5", "beam-1", where="search"),
        Above("start", "dpo-after-sft", where="chosen"),
        Above("dpo-after-sft", "start", where="margin"),
    ),
    seeds=10,
    minutes=6,
    quick={"pairs": 300},
    quick_seeds=2,
)
