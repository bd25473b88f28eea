"""A language policy in training: where its groups come from, and one exact gradient step on a global batch of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import DataError, InvariantError
from guerdon.feedback.readers import Feedback, read_feedback
from guerdon.feedback.records import Record, texts
from guerdon.language.groups import Group, micro_batches
from guerdon.language.packing import Batch, pack
from guerdon.language.policy import HEAD, Policy, annotate, cast, resolve_precision
from guerdon.language.store import load_groups, save_groups
from guerdon.language.templates import render_all, render_each
from guerdon.lazy import torch
from guerdon.tasks import Task, load_task
from guerdon.training.config import LanguageTraining
from guerdon.training.distributed import Distribution
from guerdon.training.optim import MasterAdamW, learning_rate
from guerdon.training.rollouts import Metrics, Rollouts, forget_samples

if TYPE_CHECKING:
    from guerdon.language.forward import GroupModel, Outputs
    from guerdon.methods.base import LanguageMethod

LossFunction = Callable[["Outputs", Batch], "tuple[torch.Tensor, Metrics]"]
GROUP_TOLERANCE = {
    "fp32": 1e-3,
    "bf16": 1.0,
}  # of log-probs between the group forward and padded rows, at the first step


@dataclass
class Cursor:
    """How far a run has come; all that its order of events depends on, and saved with every checkpoint."""

    round: int = 0
    update: int = 0  # updates done within the round
    step: int = 0  # updates done in all
    samples: int = 0  # completions sampled
    tokens: int = 0  # unique tokens trained on
    done: float = 0.0  # share of the run, in the middle of the update under way

    def next_round(self) -> None:
        self.round, self.update = self.round + 1, 0


class LanguageRun:
    """What a language method works with: gather groups, compare with the start, update.

    Attributes:
        policy: what is improved; `model` and `tokenizer` are its own.
        task: prompts with a verifier, or None where the run learns from a file of feedback.
        held_out: records that training never sees; evaluation uses them.
        notes: what the user should know of the material: rows that were left out, completions that were cut.
        feedback: its groups, where the run learns from a file.
        cursor: how far the run has come.
    """

    def __init__(self, method: LanguageMethod, config: LanguageTraining, distribution: Distribution, directory: Path):
        from guerdon.language.models import fingerprint, load_model

        self.method, self.config, self.distribution, self.directory = method, config, distribution, directory
        self.seed = config.seed
        self.cursor = Cursor()
        self.task, self.records, self.held_out, self.notes = material(config, method.check_feedback)
        if not self.records:
            raise DataError(f"{config.data}: a holdout of {config.holdout:g} leaves nothing to learn from.")
        if not self.held_out and config.holdout:
            raise DataError(
                f"{config.data}: there are too few different prompts to hold any out: give --eval-data, or --holdout 0 "
                "to learn from all of it and evaluate nothing."
            )
        torch.manual_seed(config.seed)
        self.load_start = lambda: load_model(config.model, seed=config.seed, texts=texts(self.records + self.held_out))
        model, self.tokenizer = self.load_start()
        self.precision = resolve_precision(config.precision, model)
        self._start = fingerprint(model) if self.task is None and method.needs_reference() else ""
        self.model = self._trained(model)
        self.policy = Policy(self.model, self.tokenizer)
        self.optimizer = self._optimizer(self.model, method.lr)
        self.critic: Critic | None = None
        self.rollouts = None if self.task is None else Rollouts(self, self.task)
        self.feedback: list[Group] = self._feedback() if self.task is None else []
        self._reference: GroupModel | None = None
        self._round: tuple[list[Group], Metrics] | None = None
        self._last_batch: list[Group] = []

    def _trained(self, model: Any) -> GroupModel:
        """The start with what is trained beside its weights or in their place: adapters, a head."""
        from guerdon.language.forward import GroupModel, supports_groups
        from guerdon.language.models import add_lora

        if self.config.lora_rank:
            model = add_lora(model, self.config.lora_rank, self.config.lora_alpha, self.config.seed)
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        head = next((h for h in ("scores", "values") if h in self.method.wants), None)
        return GroupModel(model, head, padded=bool(supports_groups(model)))

    def _optimizer(self, model: GroupModel, lr: float) -> MasterAdamW:
        """Bring a model to its device in the precision of the run, and optimise fp32 masters of what it was."""
        m = self.method
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        start = {} if self.distribution.sharded else {name: p.detach().clone() for name, p in trained.items()}
        self.distribution.place(model, self.precision)
        optimizer = MasterAdamW(
            model.named_parameters(),
            lr=lr,
            betas=(m.adam_beta1, m.adam_beta2),
            eps=m.adam_eps,
            weight_decay=m.weight_decay,
            max_grad_norm=m.max_grad_norm,
        )
        for name, master in zip(optimizer.names, optimizer.masters, strict=True):
            if name in start:  # and was rounded; shards never are
                master.detach().copy_(start[name])
        return optimizer

    # Groups

    def rounds(self, rounds: int) -> int:
        """How many of a method's rounds the budget of samples pays for; one where there is no task to sample from."""
        if self.task is None:
            return 1
        per_round = self.method.prompts_per_round * self.method.group_size
        return max(1, self.config.max_samples // per_round) if self.config.max_samples else rounds

    def begin(self, round_: int, update: int, done: float) -> None:
        """Note that an update is under way, as the `update`-th of its round, at the share `done` of all rounds."""
        if self.config.max_updates:
            done = max(done, (self.cursor.step + 0.5) / self.config.max_updates)
        self.cursor.round, self.cursor.update, self.cursor.done = round_, update, min(done, 1.0)

    def round(self, index: int, method: LanguageMethod) -> tuple[list[Group], Metrics]:
        """The credited groups of a round and its health figures; the same ones when a run is resumed in its middle."""
        if self._round is None or self.cursor.update == 0:
            rng = np.random.default_rng([self.seed, index])
            if self.rollouts is None:
                groups, figures = self.feedback, Metrics()
            else:
                groups, figures = self.rollouts.round(index, method)
            if method.needs_reference():
                self.reference_logps(groups)
            credited = method.credit(groups, rng)
            if not credited and self.task is None:
                source = self.config.data
                raise DataError(
                    f"{source}: {method.name} finds nothing to learn in it; see `guerdon inspect {source}`."
                )
            self._round = (credited, figures)
        return self._round

    def _feedback(self) -> list[Group]:
        """The feedback as groups of tokens; the held-out share is rendered as well, to be refused now and not later."""
        from guerdon.language.models import learned_positions

        c, longest = self.config, self.method.max_length
        groups, done = render_all(
            self.records, self.tokenizer, max_length=longest, overlong=c.overlong, skip_bad=c.skip_bad
        )
        if not groups:
            raise DataError(f"{c.data}: nothing is left to learn from: {'; '.join(done.warnings())}.")
        if (most := learned_positions(self.model.model)) is not None:
            _check_lengths(groups, most)
        self.notes += [f"{c.data}: {warning}" for warning in done.warnings()]
        judged = self.held_out[: c.eval_items]
        render_each(judged, self.tokenizer, max_length=longest, overlong=c.overlong, skip_bad=c.skip_bad)
        return groups

    # Log-probs

    @property
    def reference(self) -> GroupModel:
        """The starting policy, frozen. With LoRA it is the policy without its adapter and never asked for here."""
        if self._reference is None:
            from guerdon.language.forward import GroupModel

            model, _ = self.load_start()
            reference = GroupModel(model, padded=self.model.padded).eval().requires_grad_(False)
            self._reference = self.distribution.place(reference, self.precision)
        return self._reference

    def reference_logps(self, groups: Sequence[Group]) -> None:
        """Set `ref_logps` on every learned token; for a file of feedback they are kept on disk between runs."""
        if self.task is not None:
            self.start_logps(groups, "ref_logps")
            return
        cache = self._reference_cache(groups)
        if all(self.distribution.gather_objects([cache.exists()])):
            _load_token_values(cache, groups, "ref_logps")
        else:
            self.start_logps(groups, "ref_logps")
            if self.distribution.is_main:
                _save_token_values(cache, groups, "ref_logps")

    def start_logps(self, groups: Sequence[Group], name: str) -> None:
        """Store the log-probs of the policy that the run started from in the groups' segments as `name`."""
        self._with_reference(lambda model: self.logps(model, groups, name))

    def _with_reference(self, use: Callable[[GroupModel], None]) -> None:
        if self.config.lora_rank:
            with self.model.model.disable_adapter():
                use(self.model)
        else:
            use(self.reference)
            if self.task is None:
                self._reference = None  # not needed again before an evaluation

    def _reference_cache(self, groups: Sequence[Group]) -> Path:
        from guerdon.language.models import cache_directory

        key = hashlib.blake2b(digest_size=16)
        key.update(f"{self._start} {self.precision} {self.method.temperature} {self.model.padded}".encode())
        for group in groups:
            for s in group.segments:
                key.update(s.tokens.tobytes() + s.learn.tobytes() + bytes(str(s.parent), "ascii"))
        return cache_directory() / "logps" / f"{key.hexdigest()}.safetensors"

    def logps(self, model: GroupModel, groups: Sequence[Group], name: str, wants: str = "logps") -> None:
        """Compute a per-token quantity under `model` without gradients and store it in the segments as `name`."""
        mine = self.distribution.shard(range(len(groups)), size=lambda i: groups[i].unique_tokens)
        annotate(model, [groups[i] for i in mine], name, wants, self.method.temperature, self.config.max_tokens)
        computed = [(i, [s.values.get(name) for s in groups[i].segments]) for i in mine]
        for i, arrays in self.distribution.gather_objects(computed):
            for segment, array in zip(groups[i].segments, arrays, strict=True):
                if array is not None:
                    segment.values[name] = array

    # Updates

    def update(
        self,
        groups: Sequence[Group],
        loss: LossFunction,
        totals: dict[str, float],
        wants: Collection[str],
        per_completion: bool,
    ) -> Metrics:
        """One step of the optimiser on a global batch; the same result for any cut into micro-batches and processes."""
        first = self.cursor.step == 0
        if first:
            self._check_forward(groups)
        metrics = self._step(self.model, self.optimizer, self.method.lr, groups, loss, totals, wants, per_completion)
        if first:
            self._check_start(metrics)
        self.cursor.tokens += sum(g.unique_tokens for g in groups)
        if self.rollouts is not None:
            self.rollouts.sync()
        return metrics

    def _step(
        self,
        model: GroupModel,
        optimizer: MasterAdamW,
        peak: float,
        groups: Sequence[Group],
        loss: LossFunction,
        totals: dict[str, float],
        wants: Collection[str],
        per_completion: bool,
    ) -> Metrics:
        from guerdon.language.sharding import IDLE, idle_loss, in_step

        self._last_batch = list(groups)
        sums: dict[str, float] = {"loss/total": 0.0}
        counts: dict[str, float] = {}
        mine = self.distribution.shard(list(groups), size=lambda g: g.unique_tokens)
        model.train()
        for part in in_step(model, micro_batches(mine, self.config.max_tokens, per_completion)):
            batch = pack(part, self.distribution.device, totals)
            outputs = model(batch, wants, self.method.temperature)
            value, metrics = (idle_loss(outputs), Metrics()) if part is IDLE else loss(outputs, batch)
            value.backward()
            optimizer.accumulate()
            sums["loss/total"] += float(value.detach())
            for name, values in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
                counts[name] = counts.get(name, 0) + values.numel()
        self.distribution.reduce_gradients(optimizer.gradient)
        means = self.distribution.reduce_metrics(sums, counts)
        lr = learning_rate(self.cursor.done, peak, self.method.schedule, self.method.warmup)
        return {**means, "optim/lr": lr, "optim/grad_norm": optimizer.step(lr)}

    def add_critic(self, model: Any, lr: float, head: torch.Tensor | None = None) -> Critic:
        """A value model beside the policy, with its own optimiser; saved and restored with the run."""
        self.critic = Critic(self, model, lr, head)
        return self.critic

    # Invariants

    def _check_forward(self, groups: Sequence[Group]) -> None:
        shortest = min((g for g in groups if g.learned_tokens), key=lambda g: g.unique_tokens, default=None)
        if shortest is None or self.model.padded:
            return
        error = self.model.group_error(shortest, self.method.temperature)
        if not error <= GROUP_TOLERANCE[self.precision]:
            raise InvariantError(
                f"the packed forward of {type(self.model.model).__name__} differs from separate rows by {error:.3g} in "
                "a log-prob: this architecture does not compute on packed groups; please report it"
            )

    def _check_start(self, metrics: Metrics) -> None:
        expected = self.method.start_loss()
        tolerance = 1e-3 if self.precision == "fp32" else 5e-2
        if expected is not None and abs(metrics["loss/total"] - expected) > tolerance * max(1, abs(expected)):
            raise InvariantError(
                f"the first loss is {metrics['loss/total']:.4f} and must be {expected:.4f} where the policy equals its "
                "reference: the reference log-probs belong to other weights or other tokens"
            )
        self.method.check_first(metrics)

    # State

    def save(self, directory: Path) -> None:
        """Write all that the rest of the run depends on. The main process writes, the others add their shards."""
        from safetensors.torch import save_file

        optimizers = {"optimizer": self.optimizer} | ({"critic": self.critic.optimizer} if self.critic else {})
        for name, optimizer in optimizers.items():
            state = optimizer.state_dict(keep=self.distribution.is_main)
            if self.distribution.is_main:
                save_file(state, directory / f"{name}.safetensors")
        if not self.distribution.is_main:
            return
        if self.task is not None and self._round is not None:
            save_groups(directory / "round.safetensors", self._round[0])
        (directory / "cursor.json").write_text(json.dumps(asdict(self.cursor)))

    def restore(self, directory: Path) -> None:
        """Continue from what `save` wrote."""
        from safetensors.torch import load_file

        self.optimizer.load_state_dict(load_file(directory / "optimizer.safetensors"))
        if self.critic is not None:
            self.critic.optimizer.load_state_dict(load_file(directory / "critic.safetensors"))
        if (directory / "round.safetensors").exists():
            self._round = (load_groups(directory / "round.safetensors"), {})
        self.cursor = Cursor(**json.loads((directory / "cursor.json").read_text()))
        if self.rollouts is not None:
            self.forget_samples(self.cursor.round + (self.cursor.update > 0))
            self.rollouts.sync()

    def export(self, directory: Path) -> None:
        """Write the policy as transformers (or peft) loads it, with its head where it has one; see `save`."""
        from safetensors.torch import save_file

        from guerdon.language.models import save_model

        sharded, main = self.distribution.sharded, self.distribution.is_main
        state = self.optimizer.state_dict(keep=main) if sharded else {}
        if not main:
            return
        model = self._whole(state) if sharded else self.model
        save_model(model.model, self.tokenizer, directory)
        if hasattr(model, "head"):
            save_file({"weight": model.head.weight.detach().float().cpu()}, directory / HEAD)

    def _whole(self, state: dict[str, torch.Tensor]) -> GroupModel:
        """The policy on the CPU, with its trained weights from the optimiser's state."""
        model = self._trained(self.load_start()[0])
        for name, parameter in model.named_parameters():
            parameter.data = state.get(f"master.{name}", parameter.data)
        cast(model, self.precision)
        return model

    def dump_batch(self, directory: Path) -> None:
        """Save the batch under way, to look at what went wrong."""
        save_groups(directory / "batch.safetensors", self._last_batch)

    def forget_samples(self, from_round: int) -> None:
        """Remove the logged samples of rounds that will be sampled again."""
        forget_samples(self.directory, from_round)


def material(
    config: LanguageTraining, check: Callable[[Feedback], None] = lambda feedback: None
) -> tuple[Task | None, list[Record], list[Record], list[str]]:
    """The task (or None), records to learn from, held-out ones that no run ever trains on, and what to tell the user.

    Nothing of all that where neither a task nor data is given.

    What is held out depends on the task or data alone, not on the seed: runs are judged on the same items.

    Args:
        check: raises where a method cannot learn from the feedback.
    """
    if config.task is None and config.data is None:
        return None, [], [], []
    if config.task is not None:
        task = load_task(config.task, verifier=config.verifier)
        return task, task.train, task.test, list(task.notes)
    feedback = read_feedback(str(config.data), skip_bad=config.skip_bad)
    check(feedback)
    train, held_out = feedback.split(0.0 if config.eval_data else config.holdout)
    if config.eval_data:
        held_out = read_feedback(config.eval_data, skip_bad=config.skip_bad)
        if not all(record.completions for record in held_out.records):
            raise DataError(f"{config.eval_data}: holds {held_out.kind}, and answers are what a policy is judged by.")
    notes = [
        f"{source.source}: {len(source.bad)} rows cannot be read and are left out; the first: {source.bad[0]}."
        for source in (feedback, held_out)
        if source.bad
    ]
    return None, train.records, held_out.records, notes


class Critic:
    """A value model with its own optimiser (PPO); `head` (1, width) starts its value head, which is zero without it."""

    def __init__(self, run: LanguageRun, model: Any, lr: float, head: torch.Tensor | None = None):
        from guerdon.language.forward import GroupModel

        self.run, self.lr = run, lr
        self.model = GroupModel(model, "values", padded=run.model.padded)
        if head is not None:
            self.model.head.weight.data.copy_(head)
        self.optimizer = run._optimizer(self.model, lr)

    def values(self, groups: Sequence[Group]) -> None:
        """Set `values` on every learned token: the value of the state before it."""
        self.run.logps(self.model, groups, "values", wants="values")

    def update(self, groups: Sequence[Group], loss: LossFunction, totals: dict[str, float]) -> Metrics:
        """One step of the value model on a global batch."""
        metrics = self.run._step(self.model, self.optimizer, self.lr, groups, loss, totals, {"values"}, True)
        return {"loss/value" if name == "loss/total" else name: value for name, value in metrics.items()}


def _check_lengths(groups: Sequence[Group], most: int) -> None:
    for group in groups:
        tokens = max(len(group.sequence(completion)[0]) for completion in range(len(group)))
        if tokens > most:
            where = group.columns["where"]
            raise DataError(f"{where}: {tokens} tokens are more than the model reads: give --max-length {most}.")


def _save_token_values(path: Path, groups: Sequence[Group], name: str) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    values = [s.values[name] for g in groups for s in g.segments if s.learn.any()]
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.concatenate(values)}, partial)
        partial.replace(path)
    except (OSError, SafetensorError):  # a cache that cannot be written only costs time
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _load_token_values(path: Path, groups: Sequence[Group], name: str) -> None:
    from safetensors.numpy import load_file

    values, at = load_file(path)[name], 0
    for s in (s for g in groups for s in g.segments if s.learn.any()):
        s.values[name] = values[at : at + len(s)]
        at += len(s)
