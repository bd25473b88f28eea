"""A language policy in training: where its groups come from, and one exact gradient step on a global batch of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
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
from guerdon.language.sampling.base import Completion, Sampling, completion_seeds
from guerdon.language.store import load_groups, save_groups
from guerdon.language.templates import prompt_ids, render_all, render_each, stop_ids
from guerdon.lazy import torch
from guerdon.tasks import Task, load_task
from guerdon.training.config import LanguageTraining
from guerdon.training.distributed import Distribution
from guerdon.training.optim import MasterAdamW, learning_rate
from guerdon.training.runner import BudgetSpent

if TYPE_CHECKING:
    from guerdon.language.forward import GroupModel, Outputs
    from guerdon.methods.base import LanguageMethod

Metrics = dict[str, Any]
LossFunction = Callable[["Outputs", Batch], "tuple[torch.Tensor, Metrics]"]
PROBE_GROUPS = 4  # groups of each round on which KL and entropy of the policy are measured
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
        from guerdon.language.forward import GroupModel, supports_groups
        from guerdon.language.models import add_lora, fingerprint, load_model

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
        if config.lora_rank:
            model = add_lora(model, config.lora_rank, config.lora_alpha, config.seed)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        head = next((h for h in ("scores", "values") if h in method.wants), None)
        self.model = GroupModel(model, head, padded=bool(supports_groups(model))).to(distribution.device)
        self.policy = Policy(self.model, self.tokenizer)
        self.optimizer = self._optimizer(self.model, method.lr)
        self.critic: Critic | None = None
        self.feedback: list[Group] = self._feedback() if self.task is None else []
        self._reference: GroupModel | None = None
        self._round: tuple[list[Group], Metrics] | None = None
        self._last_batch: list[Group] = []

    def _optimizer(self, model: GroupModel, lr: float) -> MasterAdamW:
        """Cast a model's parameters to the precision of the run and optimise fp32 masters of what they were."""
        m = self.method
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        cast(model, self.precision)
        optimizer = MasterAdamW(
            model.named_parameters(),
            lr=lr,
            betas=(m.adam_beta1, m.adam_beta2),
            eps=m.adam_eps,
            weight_decay=m.weight_decay,
            max_grad_norm=m.max_grad_norm,
        )
        for name, master in zip(optimizer.names, optimizer.masters, strict=True):
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
            if self.task is None:
                groups, figures = self.feedback, Metrics()
            else:
                groups, figures = self._sample_round(index, method)
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

    def _sample_round(self, index: int, method: LanguageMethod) -> tuple[list[Group], Metrics]:
        assert self.task is not None
        if self.config.max_samples and self.cursor.samples >= self.config.max_samples:
            raise BudgetSpent
        kept: list[Group] = []
        drawn: list[Group] = []
        for draw in range(method.max_draws):
            at = (index * method.max_draws + draw) * method.prompts_per_round
            records = [
                self.task.train[i] for i in _endless(len(self.task.train), self.seed, at, method.prompts_per_round)
            ]
            groups = self.sample(records, method.group_size, (self.seed, index, draw))
            drawn += groups
            kept += [g for g in groups if method.max_draws == 1 or np.ptp(g.values["score"]) > 0]
            if len(kept) >= method.prompts_per_round:
                break
        self._log_samples(index, drawn)
        return kept[: method.prompts_per_round], {**health(drawn), **self._probe(drawn[:PROBE_GROUPS])}

    def sample(self, records: Sequence[Record], n: int, identity: tuple[int, ...]) -> list[Group]:
        """n verified completions for each record, with `score`, `finished`, rewards by component and `old_logps`."""
        assert self.task is not None
        m = self.method
        how = Sampling(max_new_tokens=m.max_new_tokens, temperature=m.temperature, top_k=m.top_k, top_p=m.top_p)
        mine = self.distribution.shard(list(enumerate(records)), size=lambda _: 1)
        prompts = [prompt_ids(record.prompt or "", self.tokenizer) for _, record in mine]
        seeds = [completion_seeds(n, *identity, i) for i, _ in mine]
        sampled = self.sampler.sample(prompts, seeds, how)
        groups = [
            (i, self._verified(record, prompt, completions))
            for (i, record), prompt, completions in zip(mine, prompts, sampled, strict=True)
        ]
        gathered = sorted(self.distribution.gather_objects(groups), key=lambda item: item[0])
        self.cursor.samples += n * len(records)
        drawn = [group for _, group in gathered]
        if any("old_logps" not in s.values for group in drawn for s in group.segments[1:]):
            self.logps(self.model, drawn, "old_logps")
        return drawn

    def _verified(self, record: Record, prompt: list[int], completions: list[Completion]) -> Group:
        assert self.task is not None
        finished = np.array([c.finished for c in completions], dtype=np.float32)
        rewards = self.task.score(record, [c.text for c in completions])
        components = {f"reward/{name}": r for name, r in rewards.items() if name != "reward"}
        group = Group.of(
            prompt,
            [c.tokens for c in completions],
            values={"score": rewards["reward"].astype(np.float32), "finished": finished, **components},
            columns={**record.columns, "prompt": record.prompt, "completions": [c.text for c in completions]},
            key=record.where,
        )
        for segment, completion in zip(group.segments[1:], completions, strict=True):
            if len(completion.logps) == len(completion.tokens):
                segment.values["old_logps"] = completion.logps
        return group

    @property
    def sampler(self) -> Any:
        if not hasattr(self, "_sampler"):
            from guerdon.language.sampling import make_sampler

            self._sampler = make_sampler(
                self.config.sampler, self.model, self.tokenizer, stop_ids(self.tokenizer, self.model.model)
            )
            self._sampler.sync(self.model)
        return self._sampler

    # Log-probs

    @property
    def reference(self) -> GroupModel:
        """The starting policy, frozen. With LoRA it is the policy without its adapter and never asked for here."""
        if self._reference is None:
            from guerdon.language.forward import GroupModel

            model, _ = self.load_start()
            cast(model, self.precision)
            self._reference = GroupModel(model, padded=self.model.padded).to(self.distribution.device)
            self._reference.eval().requires_grad_(False)
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

    def _probe(self, groups: list[Group]) -> Metrics:
        """KL to the start and entropy of the current policy, on a few of its own samples."""
        if not groups:
            return {}
        self.start_logps(groups, "probe")
        figures: Metrics = {}
        with torch.no_grad():
            kl, entropy = [], []
            for part in micro_batches(groups, self.config.max_tokens):
                batch = pack(part, self.distribution.device)
                outputs = self.model(batch, {"logps", "entropy"}, self.method.temperature)
                gap = batch.token_values["probe"] - outputs.logps
                kl.append(gap.exp() - 1 - gap)
                entropy.append(outputs.entropy)
        figures["policy/kl"] = float(torch.cat(kl).mean())
        figures["policy/entropy"] = float(torch.cat(entropy).mean())
        for group in groups:
            for s in group.segments:
                s.values.pop("probe", None)
        return figures

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
        if self.task is not None:
            self.sampler.sync(self.model)
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
        self._last_batch = list(groups)
        sums: dict[str, float] = {"loss/total": 0.0}
        counts: dict[str, float] = {}
        mine = self.distribution.shard(list(groups), size=lambda g: g.unique_tokens)
        model.train()
        for part in micro_batches(mine, self.config.max_tokens, per_completion):
            batch = pack(part, self.distribution.device, totals)
            value, metrics = loss(model(batch, wants, self.method.temperature), batch)
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
        """Write everything that the rest of the run depends on."""
        from safetensors.torch import save_file

        save_file(self.optimizer.state_dict(), directory / "optimizer.safetensors")
        if self.critic is not None:
            save_file(self.critic.optimizer.state_dict(), directory / "critic.safetensors")
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
        if self.task is not None:
            self.forget_samples(self.cursor.round + (self.cursor.update > 0))
            self.sampler.sync(self.model)

    def export(self, directory: Path) -> None:
        """Write the policy as transformers (or peft) loads it, with its head where it has one."""
        from safetensors.torch import save_file

        from guerdon.language.models import save_model

        save_model(self.model.model, self.tokenizer, directory)
        if hasattr(self.model, "head"):
            save_file({"weight": self.model.head.weight.detach().float().cpu()}, directory / HEAD)

    def dump_batch(self, directory: Path) -> None:
        """Save the batch under way, to look at what went wrong."""
        save_groups(directory / "batch.safetensors", self._last_batch)

    # Samples, to be read by people

    def _log_samples(self, index: int, groups: Sequence[Group]) -> None:
        if not self.distribution.is_main:
            return
        with (self.directory / "samples.jsonl").open("a", encoding="utf-8") as file:
            for group in groups[:PROBE_GROUPS]:
                row = {
                    "round": index,
                    "step": self.cursor.step,
                    "prompt": group.columns["prompt"],
                    "completions": group.columns["completions"],
                    "rewards": group.values["score"].tolist(),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def forget_samples(self, from_round: int) -> None:
        """Remove the logged samples of rounds that will be sampled again."""
        path = self.directory / "samples.jsonl"
        if path.exists():
            rows = [line for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in rows if json.loads(line)["round"] < from_round]
            path.write_text("".join(line + "\n" for line in kept), "utf-8")


def material(
    config: LanguageTraining, check: Callable[[Feedback], None] = lambda feedback: None
) -> tuple[Task | None, list[Record], list[Record], list[str]]:
    """The task (or None), records to learn from, held-out ones that no run ever trains on, and what to tell the user.

    What is held out depends on the task or data alone, not on the seed: runs are judged on the same items.

    Args:
        check: raises where a method cannot learn from the feedback.
    """
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
        self.model = GroupModel(model, "values", padded=run.model.padded).to(run.distribution.device)
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


def health(groups: Sequence[Group]) -> Metrics:
    """What a round of samples looks like: rewards by component, lengths, cut-off, informative and repeated shares."""
    if not groups:
        return {}
    scores = np.concatenate([g.values["score"] for g in groups])
    lengths = np.concatenate([g.lengths() for g in groups])
    components = {name for g in groups for name in g.values if name.startswith("reward/")}
    completions = [group.segments[s].tokens for group in groups for s in group.leaves]
    return {
        "reward/mean": float(scores.mean()),
        "reward/std": float(scores.std()),
        **{name: float(np.concatenate([g.values[name] for g in groups]).mean()) for name in sorted(components)},
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/truncated_share": float(1 - np.concatenate([g.values["finished"] for g in groups]).mean()),
        "policy/informative_share": float(np.mean([np.ptp(g.values["score"]) > 0 for g in groups])),
        "policy/repetition": float(np.mean([_repetition(c) for c in completions])),
    }


def _repetition(tokens: np.ndarray, n: int = 4) -> float:
    """Share of the n-grams of a completion that occurred in it before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _endless(n: int, seed: int, start: int, count: int) -> Iterator[int]:
    """`count` indices from an endless sequence of permutations of range(n), from position `start` on."""
    for position in range(start, start + count):
        epoch, offset = divmod(position, n)
        yield int(np.random.default_rng([seed, epoch]).permutation(n)[offset])


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
