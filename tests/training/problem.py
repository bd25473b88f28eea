"""A small real problem that follows the protocol of a run: a network with dropout learns a noisy function.

It draws from the global random states of torch, numpy and random, samples rounds of data under way as an online method
does, and keeps bf16 weights with fp32 masters, so that a resume that forgets any of these ends in other weights.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from guerdon.methods.base import Method, Metrics
from guerdon.training.config import Training
from guerdon.training.distributed import Distribution
from guerdon.training.optim import MasterAdamW, NonFiniteError, learning_rate
from guerdon.training.rundir import RunDir
from guerdon.training.runner import BudgetSpent, run_loop


@dataclass
class Cursor:
    step: int = 0
    samples: int = 0
    tokens: int = 0
    done: float = 0.0
    round: int = 0
    update: int = 0


@dataclass(kw_only=True)
class Fit(Method):
    """Least squares on `rounds` rounds of fresh samples, `updates` steps on each."""

    rounds: int = 6
    updates: int = 5
    round_size: int = 16
    lr: float = 1e-2
    spoil_at: int = 0  # step whose data hold a NaN
    hungry_at: int = 0  # step that wants more memory than there is
    seconds: float = 0.0  # that an update takes at least

    def learn(self, run: Problem) -> Iterator[Metrics]:
        cursor = run.cursor
        for round_ in range(cursor.round, self.rounds):
            if cursor.update == 0:
                run.sample(self.round_size)
            for update in range(cursor.update, self.updates):
                cursor.round, cursor.update = round_, update + 1
                cursor.done = (round_ + (update + 0.5) / self.updates) / self.rounds
                time.sleep(self.seconds)
                if cursor.step + 1 == self.hungry_at:
                    torch.empty(2**60, dtype=torch.uint8)
                yield run.update(learning_rate(cursor.done, self.lr, "cosine", 0.1), cursor.step + 1 == self.spoil_at)
            cursor.round, cursor.update = round_ + 1, 0


class Problem:
    def __init__(self, seed: int = 0, max_samples: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.cursor, self.distribution, self.max_samples = Cursor(), Distribution(), max_samples
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(32, 1)
        ).to(dtype)
        self.optimizer = MasterAdamW(self.model.named_parameters(), lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
        self.data = torch.zeros(0)
        self.batch = torch.zeros(0)

    def sample(self, n: int) -> None:
        if self.max_samples and self.cursor.samples >= self.max_samples:
            raise BudgetSpent
        self.data = torch.randn(n, 8)
        self.cursor.samples += n

    def update(self, lr: float, spoil: bool) -> Metrics:
        rows = np.random.permutation(len(self.data))[: len(self.data) // 2]
        self.batch = self.data[torch.as_tensor(rows)] * random.choice([0.5, 1.0])
        if spoil:
            self.batch[0, 0] = float("nan")
        target = self.batch.sin().sum(1, keepdim=True)
        self.model.train()
        losses = []
        for x, y in zip(self.batch.split(4), target.split(4), strict=True):
            loss = (self.model(x.to(self.model[0].weight.dtype)).float() - y).square().sum() / len(self.batch)
            loss.backward()
            self.optimizer.accumulate()
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        if not torch.isfinite(total):
            raise NonFiniteError(f"the loss is {float(total)}.")
        self.cursor.tokens += len(self.batch)
        norm = self.optimizer.step(lr)
        return {"loss/total": total, "optim/lr": lr, "optim/grad_norm": norm, "policy/odd": float("nan")}

    notes: list[str] = []

    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        x = torch.randn(64, 8)  # from the global state, which the loop has to give back
        with torch.no_grad():
            error = (
                (self.model(x.to(self.model[0].weight.dtype)).float() - x.sin().sum(1, keepdim=True)).square().mean()
            )
        return {"eval/score": -float(error)}

    def save(self, directory: Path) -> None:
        save_file(self.optimizer.state_dict(), directory / "optimizer.safetensors")
        save_file({"data": self.data}, directory / "data.safetensors")
        (directory / "cursor.json").write_text(json.dumps(asdict(self.cursor)))

    def restore(self, directory: Path) -> None:
        self.data = load_file(directory / "data.safetensors")["data"]
        self.optimizer.load_state_dict(load_file(directory / "optimizer.safetensors"))
        self.cursor = Cursor(**json.loads((directory / "cursor.json").read_text()))

    def export(self, directory: Path) -> None:
        save_file(self.model.state_dict(), directory / "model.safetensors")

    def dump_batch(self, directory: Path) -> None:
        save_file({"batch": self.batch}, directory / "batch.safetensors")


def train(path: Path, method: Fit, options: dict, dtype: torch.dtype = torch.bfloat16, **rest) -> Problem:
    """Start a run, or go on with it where it exists, as a fresh process would."""
    config = Training(out=str(path), **options)
    exists = (path / "config.json").exists()
    rundir = RunDir.open(path) if exists else RunDir.create(path, "fit", method.options(), asdict(config))
    run = Problem(max_samples=config.max_samples, dtype=dtype)
    run_loop(run, method, rundir, config, evaluate=Problem.evaluate, **rest)
    return run
