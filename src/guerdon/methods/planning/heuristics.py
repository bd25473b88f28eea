"""The loop of methods that learn the cost to the goal of a puzzle, backwards from it, with nothing else to go by."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from guerdon.control.puzzles.domains import PREFIX
from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.lazy import torch
from guerdon.methods.base import Metrics
from guerdon.methods.control import ControlMethod

if TYPE_CHECKING:
    from guerdon.training.config import ControlTraining
    from guerdon.training.control import ControlRun


@dataclass(kw_only=True)
class HeuristicLearner(ControlMethod):
    """States of random walks back from the goal, targets from a network that follows when it has been learned.

    Until its first copy the target network says 0, so that targets begin as the cost of one move. The policy that is
    judged in episodes is greedy; `guerdon.methods.planning.solve` searches with what was learned.
    """

    lr: float = 1e-3  # learning rate of Adam
    lr_decay: float = 0.9999993  # factor of the learning rate for each update
    hidden: tuple[int, ...] = (5000, 1000)  # widths of the layers before the residual blocks
    blocks: int = 4  # residual blocks
    batch_norm: bool = True  # normalise over the batch before every activation
    batch_size: int = 10_000  # states per update
    updates: int = 1_000_000  # updates of the published method
    gamma: float = 1.0  # discount; 1 counts costs as they are
    scramble: int = 0  # moves of the longest walk back from the goal; 0 is the puzzle's own number
    copy_every: int = 5000  # updates between looks at whether the target network may follow
    copy_below: float = 0.06  # it does where the loss is below this; 0 does whatever the loss

    actions = "discrete"
    estimates_q: ClassVar[bool]

    def check_loop(self, training: ControlTraining) -> None:
        super().check_loop(training)
        check_range(vars(self), "lr", "blocks", "scramble", "copy_below")
        check_range(vars(self), "lr_decay", high=1, above=True)
        check_range(vars(self), "updates", "copy_every", low=1)
        if training.env is None or not training.env.startswith(PREFIX):
            raise ConfigError(
                f"{self.name} learns with the moves of a puzzle at hand, and {training.env or training.data} is none: "
                "give --env puzzle:cube3, puzzle:puzzle15, puzzle:lightsout7 or puzzle:pancake8."
            )
        if training.data is not None:
            raise ConfigError(f"{self.name} makes its own states: leave out data, and give env alone.")

    def setup(self, run: ControlRun) -> None:
        from guerdon.control.optim import Adam
        from guerdon.control.puzzles.domains import make_puzzle
        from guerdon.control.puzzles.networks import CostToGo
        from guerdon.control.puzzles.puzzle import Tables

        assert run.env is not None
        self.puzzle, seeds = make_puzzle(run.env), len(run.seeds)
        self.tables, self.streams = Tables(self.puzzle, run.device), run.streams
        how = {"blocks": self.blocks, "batch_norm": self.batch_norm, "precision": run.precision}
        network = CostToGo(seeds, run.spec, run.env, self.estimates_q, self.hidden, **how)  # type: ignore[arg-type]
        self.network = run.network("network", network).eval()
        self.target = run.add("target", copy.deepcopy(self.network).requires_grad_(False))
        self.followed = torch.zeros(seeds, device=run.device)
        self.target.register_buffer("copies", self.followed)
        self.optimizer = run.add("optimizer", Adam(self.network.parameters(), self.lr))
        run.act_with(self.network)

    def learn(self, run: ControlRun) -> Iterator[Metrics]:
        from guerdon.training.control import Means

        cursor, means = run.cursor, Means()
        self.follow()
        for stop in run.stretches(-(-run.config.max_samples // self.batch_size) or self.updates):
            while cursor.step < stop:
                self.optimizer.lr = self.lr * self.lr_decay**cursor.step
                metrics = self.update(self.scrambled())
                cursor.step += 1
                cursor.samples = cursor.step * self.batch_size
                if cursor.step % self.copy_every == 0:
                    self.copy(metrics["loss/value"])
                means.add(metrics)
            yield means.take()

    def scrambled(self) -> torch.Tensor:
        """States (S, B, L): walks back from the goal, as long as a uniform draw from 0 to `scramble` says."""
        longest = self.scramble or self.puzzle.scramble
        lengths = self.streams.integers("length", longest + 1, self.batch_size)
        moves = self.streams.integers("move", self.puzzle.primitives, longest, self.batch_size)
        return self.tables.walk(lengths, moves.transpose(0, 1))

    def after(self, states: torch.Tensor) -> torch.Tensor:
        """The target network's cost to go from states (S, ..., L): (S, ...), 0 at the goal and before any copy."""
        flat = states.flatten(1, -2)
        values = torch.stack([follow(rows) for follow, rows in zip(self.followers, flat, strict=True)])
        values = values.amin(-1) if self.estimates_q else values
        known = (self.followed > 0)[:, None] & ~self.tables.solved(flat)
        return torch.where(known, values, 0.0).view(states.shape[:-1])

    def update(self, states: torch.Tensor) -> Metrics:  # type: ignore[override]
        """One step on states (S, B, L); metrics are tensors (S,)."""
        self.network.train()
        values = self.network(states)
        values, target = self.backup(states, values)
        target = target.masked_fill(self.tables.solved(states), 0.0)
        loss = (values - target).square().mean(-1)
        self.optimizer.minimise(loss)
        self.network.eval()
        return {
            "loss/value": loss.detach(),
            "value/mean": values.detach().mean(-1),
            "value/target": target.mean(-1),
            "value/copies": self.followed.clone(),
        }

    def backup(self, states: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimates (S, B) that are learned, of the network's `values`, and their targets (S, B)."""
        raise NotImplementedError

    def copy(self, loss: torch.Tensor) -> None:
        """Let the target networks of those seeds follow whose loss (S,) is low enough."""
        low = torch.ones_like(loss, dtype=torch.bool) if self.copy_below == 0 else loss < self.copy_below
        old, new = self.target.state_dict(), self.network.state_dict()
        for name, value in new.items():
            old[name][low] = value[low]
        self.followed += low
        self.follow()

    def follow(self) -> None:
        """Have what `after` asks say what the target networks say now."""
        self.followers = [self.target.inference(k) for k in range(len(self.followed))]
