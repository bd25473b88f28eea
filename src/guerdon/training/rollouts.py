"""Rounds of samples: completions of a task's prompts, judged by its verifier, and whether they look healthy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import ConfigError
from guerdon.feedback.records import Record
from guerdon.language.groups import Group, micro_batches
from guerdon.language.packing import pack
from guerdon.language.sampling.base import Completion, Sampler, Sampling, completion_seeds
from guerdon.language.templates import prompt_ids, stop_ids
from guerdon.lazy import torch
from guerdon.tasks import Task
from guerdon.training.runner import BudgetSpent

if TYPE_CHECKING:
    from guerdon.methods.base import LanguageMethod
    from guerdon.training.language import LanguageRun

Metrics = dict[str, Any]
PROBE_GROUPS = 4  # groups of each round on which KL and entropy of the policy are measured
SAMPLES = "samples.jsonl"  # in the run directory, to be read by people


class Rollouts:
    """What a run samples from its policy and has verified. Every process samples its share and gets all of it."""

    def __init__(self, run: LanguageRun, task: Task):
        self.run, self.task = run, task

    def round(self, index: int, method: LanguageMethod) -> tuple[list[Group], Metrics]:
        """The groups of a round and its health figures; `BudgetSpent` where the run has had all its samples."""
        run = self.run
        if run.config.max_samples and run.cursor.samples >= run.config.max_samples:
            raise BudgetSpent
        kept: list[Group] = []
        drawn: list[Group] = []
        for draw in range(method.max_draws):
            at = (index * method.max_draws + draw) * method.prompts_per_round
            prompts = self.task.train
            records = [prompts[i] for i in _endless(len(prompts), run.seed, at, method.prompts_per_round)]
            groups = self.sample(records, method.group_size, (run.seed, index, draw))
            drawn += groups
            kept += [g for g in groups if method.max_draws == 1 or np.ptp(g.values["score"]) > 0]
            if len(kept) >= method.prompts_per_round:
                break
        self._log(index, drawn)
        return kept[: method.prompts_per_round], {**health(drawn), **self._probe(drawn[:PROBE_GROUPS])}

    def sample(self, records: Sequence[Record], n: int, identity: tuple[int, ...]) -> list[Group]:
        """n verified completions for each record, with `score`, `finished`, rewards by component and `old_logps`."""
        run, m = self.run, self.run.method
        how = Sampling(max_new_tokens=m.max_new_tokens, temperature=m.temperature, top_k=m.top_k, top_p=m.top_p)
        mine = run.distribution.shard(list(enumerate(records)), size=lambda _: 1)
        prompts = [prompt_ids(record.prompt or "", run.tokenizer) for _, record in mine]
        seeds = [completion_seeds(n, *identity, i) for i, _ in mine]
        sampled = self.sampler.sample(prompts, seeds, how)
        groups = [
            (i, self._verified(record, prompt, completions))
            for (i, record), prompt, completions in zip(mine, prompts, sampled, strict=True)
        ]
        gathered = sorted(run.distribution.gather_objects(groups), key=lambda item: item[0])
        run.cursor.samples += n * len(records)
        drawn = [group for _, group in gathered]
        completions = [segment for group in drawn for segment in group.segments[1:]]
        if m.corrects_sampler():
            for segment in completions:
                if "old_logps" not in segment.values:
                    raise ConfigError(
                        "sampler_cap weighs what was sampled by the sampler's own log-probs, and this one gives none: "
                        "use top_k 0 and top_p 1, or sampler_cap 0."
                    )
                segment.values["sampler_logps"] = segment.values.pop("old_logps")
        if any("old_logps" not in segment.values for segment in completions):
            run.logps(run.model, drawn, "old_logps")
        return drawn

    def _verified(self, record: Record, prompt: list[int], completions: list[Completion]) -> Group:
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

    @cached_property
    def sampler(self) -> Sampler:
        from guerdon.language.sampling import make_sampler

        run = self.run
        stops = stop_ids(run.tokenizer, run.model.model)
        sampler = make_sampler(run.config.sampler, run.model, run.tokenizer, stops)
        sampler.sync(run.model)
        return sampler

    def sync(self) -> None:
        """Let the sampler take over the weights after an update."""
        self.sampler.sync(self.run.model)

    def _probe(self, groups: list[Group]) -> Metrics:
        """KL to the start and entropy of the current policy, on a few of its own samples."""
        if not groups:
            return {}
        run = self.run
        run.start_logps(groups, "probe")
        figures: Metrics = {}
        with torch.no_grad():
            kl, entropy = [], []
            for part in micro_batches(groups, run.config.max_tokens):
                batch = pack(part, run.distribution.device)
                outputs = run.model(batch, {"logps", "entropy"}, run.method.temperature)
                gap = batch.token_values["probe"] - outputs.logps
                kl.append(gap.exp() - 1 - gap)
                entropy.append(outputs.entropy)
        figures["policy/kl"] = float(torch.cat(kl).mean())
        figures["policy/entropy"] = float(torch.cat(entropy).mean())
        for group in groups:
            for s in group.segments:
                s.values.pop("probe", None)
        return figures

    def _log(self, index: int, groups: Sequence[Group]) -> None:
        if not self.run.distribution.is_main:
            return
        with (self.run.directory / SAMPLES).open("a", encoding="utf-8") as file:
            for group in groups[:PROBE_GROUPS]:
                row = {
                    "round": index,
                    "step": self.run.cursor.step,
                    "prompt": group.columns["prompt"],
                    "completions": group.columns["completions"],
                    "rewards": group.values["score"].tolist(),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def forget_samples(directory: Path, from_round: int) -> None:
    """Remove from a run's log the samples of rounds that will be sampled again."""
    path = directory / SAMPLES
    if path.exists():
        rows = [line for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in rows if json.loads(line)["round"] < from_round]
        path.write_text("".join(line + "\n" for line in kept), "utf-8")


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
