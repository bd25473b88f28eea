"""Methods, by name: what they learn from, the paper they come from, and the loop that language methods share.

A method is a dataclass whose fields are its whole configuration. It states *credit* (what each completion or token
deserves, on whole groups) and *loss* (a pure function of log-probs and credit); the loop below draws, credits, updates.
This module and every method file import no torch at import time.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np

from guerdon.errors import ConfigError, DataError, near
from guerdon.fields import check_range
from guerdon.plugins import load_plugins
from guerdon.training.config import LanguageTraining, Training
from guerdon.training.loggers import check_sinks

if TYPE_CHECKING:
    import torch

    from guerdon.feedback.readers import Feedback
    from guerdon.language.forward import Outputs
    from guerdon.language.groups import Group
    from guerdon.language.packing import Batch
    from guerdon.training.language import LanguageRun

LearnsFrom = Literal["demonstrations", "preferences", "verifier", "transitions", "environment", "labels"]
Kind = Literal["language", "control", "prompt"]
Metrics = dict[str, Any]  # numbers, or tensors of values of which the mean over the global batch is reported

_REGISTRY: dict[str, type[Method]] = {}
M = TypeVar("M", bound="type[Method]")


def method(
    name: str, *, learns_from: LearnsFrom, paper: int | tuple[int, ...] = (), policy: Kind = "language"
) -> Callable[[M], M]:
    """Register a method dataclass under the name that the command line uses.

    Args:
        name: as typed, `guerdon train NAME`.
        learns_from: the least that the feedback must say: demonstrations, preferences (or scores), or a verifier; of
            control methods, whether they learn from logged transitions or in an environment; of prompt methods, labels.
        paper: id(s) of the paper(s) in the catalogue.
        policy: the kind of policy that is improved.
    """

    def register(cls: M) -> M:
        cls.name, cls.learns_from, cls.policy = name, learns_from, policy
        cls.papers = (paper,) if isinstance(paper, int) else paper
        _REGISTRY[name] = cls
        return cls

    return register


@cache
def _import_all() -> None:
    import guerdon.methods

    for module in pkgutil.walk_packages(guerdon.methods.__path__, "guerdon.methods."):
        importlib.import_module(module.name)
    load_plugins()


def all_methods() -> dict[str, type[Method]]:
    """Every registered method by name, in alphabetical order."""
    _import_all()
    return dict(sorted(_REGISTRY.items()))


def get_method(name: str) -> type[Method]:
    """The method class called `name`; a `ConfigError` with the nearest name where there is none."""
    methods = all_methods()
    if name not in methods:
        raise ConfigError(f"no method is called '{name}'.{near(name, methods)} `guerdon methods` lists them all.")
    return methods[name]


@dataclass(kw_only=True)
class Method:
    """Configuration and mathematics of one method; the fields are the options."""

    name: ClassVar[str]
    papers: ClassVar[tuple[int, ...]]
    learns_from: ClassVar[LearnsFrom]
    policy: ClassVar[Kind]
    training: ClassVar[type[Training]] = LanguageTraining  # the runner's options for its kind of policy

    def check(self) -> None:
        """Raise `ConfigError` where options contradict each other; called before anything is loaded."""

    def check_loop(self, training: Any) -> None:
        """Raise `ConfigError` where the options of the loop cannot be meant, or do not go with the runner's."""

    def setup(self, run: Any) -> None:
        """Build what has state (a value model, a queue) and hand it to the run, which saves and restores it."""

    def learn(self, run: Any) -> Iterator[Metrics]:
        """Improve the policy; one yield is one update and its metrics."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The configuration as plain data."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True)
class LanguageMethod(Method):
    """The loop of every language method: gather groups, credit them, update on mini-batches.

    With `--data` the groups are read once from the feedback; with `--task` each round samples fresh completions from
    the current policy and verifies them, and a round of samples is feedback like any other. A method overrides only
    `credit`, `loss` and what its paper changes.
    """

    lr: float = 1e-6  # peak learning rate of AdamW
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # learning rate over the run, after warm-up
    warmup: float = 0.1  # share of the run over which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW's decoupled weight decay
    adam_beta1: float = 0.9  # AdamW's first-moment decay
    adam_beta2: float = 0.999  # AdamW's second-moment decay
    adam_eps: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float = 1.0  # gradients are clipped to this global norm; 0 does not clip
    batch_size: int = 32  # groups per update
    epochs: int = 1  # passes over the feedback, or over each round of samples
    max_length: int = 2048  # tokens of a prompt with one completion; longer ones are counted, shown and cut or refused
    rounds: int = 10  # with a task: rounds of sampling, verifying and learning
    prompts_per_round: int = 32  # with a task: prompts sampled in each round
    group_size: int = 8  # with a task: completions per prompt
    max_new_tokens: int = 256  # with a task: tokens a completion may have
    temperature: float = 1.0  # with a task: sampling temperature, also that of the log-probs in the loss
    top_k: int = 0  # with a task: sample among the k likeliest tokens; 0 among all
    top_p: float = 1.0  # with a task: sample among the likeliest tokens that hold this probability
    max_draws: int = 1  # with a task: draws per round to replace groups whose rewards are all equal (dynamic sampling)

    # Which completions ride in one micro-batch: a loss that is a sum over completions lets long groups be cut.
    per_completion: ClassVar[bool] = False
    # What the forward pass has to return beside log-probs.
    wants: ClassVar[frozenset[Literal["logps", "entropy", "scores", "values"]]] = frozenset({"logps"})

    def check_loop(self, training: LanguageTraining) -> None:
        check_range(vars(self), "batch_size", "epochs", "max_length", "max_draws", low=1)
        check_range(vars(self), "lr", "weight_decay", "max_grad_norm")
        check_range(vars(self), "adam_eps", above=True)
        check_range(vars(self), "warmup", high=1)
        check_range(vars(self), "adam_beta1", "adam_beta2", high=1, below=True)
        if training.task is None:
            if training.data is None and self.learns_from != "verifier":
                raise ConfigError("nothing to learn from is given: give either data or task; env is judged in alone.")
            if self.learns_from == "verifier":
                raise ConfigError(
                    f"{self.name} learns from a verifier: give a task instead of data. "
                    f"`guerdon inspect {training.data}` says which methods can learn from the data."
                )
            return
        check_range(vars(self), "rounds", "prompts_per_round", "group_size", low=1)
        check_sampling(vars(self), above=True)
        per_round = self.prompts_per_round * self.group_size
        if 0 < training.max_samples < per_round:
            raise ConfigError(
                f"a budget of {training.max_samples} samples is less than one round of {self.name}, which samples "
                f"{self.prompts_per_round} prompts {self.group_size} times: it must be at least {per_round}, or "
                "prompts_per_round or group_size lower."
            )

    def check_feedback(self, feedback: Feedback) -> None:
        """Raise `DataError` where the feedback does not say what this method learns from; it names those that could."""
        if not can_learn(self.learns_from, feedback.says()):
            able = [name for name, m in all_methods().items() if can_learn(m.learns_from, feedback.says())]
            raise DataError(
                f"{feedback.source}: {self.name} learns from {_NEEDS[self.learns_from]}, and this is {feedback.kind} "
                f"feedback. Methods that can learn from it: {', '.join(able) or 'none'}."
            )

    def needs_reference(self) -> bool:
        """Whether groups must carry `ref_logps`, the log-probs of the starting policy."""
        return False

    def corrects_sampler(self) -> bool:
        """Whether groups must carry `sampler_logps`, what the sampler said, beside `old_logps` of the policy itself."""
        return False

    def credit(self, groups: list[Group], rng: np.random.Generator) -> list[Group]:
        """Say what each completion or token deserves; groups that teach nothing are left out.

        Runs on whole groups, before shuffling, filtering or sharding. Groups carry `score` per completion where the
        feedback said one (preferences 1 and 0; verifier rewards; ratings).
        """
        return groups

    def totals(self, groups: list[Group]) -> dict[str, float]:
        """Denominators of the loss parts, counted once over the global batch."""
        return {
            "groups": len(groups),
            "completions": sum(len(g) for g in groups),
            "tokens": sum(g.learned_tokens for g in groups),
            "pairs": sum(len(g.pairs) for g in groups),
        }

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """This micro-batch's share of the loss (sums divided by `batch.totals`) and its metrics."""
        raise NotImplementedError

    def start_loss(self) -> float | None:
        """The loss where the policy equals its reference (ln 2 for DPO); None where it depends on the data."""
        return None

    def check_first(self, metrics: Metrics) -> None:
        """Raise `InvariantError` where the metrics of a run's first update cannot be right."""

    def teaches(self, group: Group) -> bool:
        """Whether a credited group has a gradient; where it has none its forward pass is saved, its count is kept."""
        return True

    def update(self, run: LanguageRun, groups: list[Group]) -> Metrics:
        """One gradient step on a global batch of groups."""
        teaching = [group for group in groups if self.teaches(group)]
        return run.update(teaching, self.loss, self.totals(groups), self.wants, self.per_completion)

    def learn(self, run: LanguageRun) -> Iterator[Metrics]:
        rounds = run.rounds(self.rounds)
        for round_ in range(run.cursor.round, rounds):
            groups, health = run.round(round_, self)
            updates = list(batches(len(groups), self.batch_size, self.epochs, seed=(run.seed, round_)))
            for index, chosen in enumerate(updates):
                if index < run.cursor.update:
                    continue
                run.begin(round_, index + 1, done=(round_ + (index + 0.5) / len(updates)) / rounds)
                metrics = self.update(run, [groups[i] for i in chosen])
                yield {**(health if index == 0 else {}), **metrics}
            run.cursor.next_round()
            if not updates:
                yield health


def check_options(method: Method, training: Training) -> None:
    """Raise `ConfigError` where options of a method or of the runner cannot be meant, or contradict each other.

    Nothing is loaded for it, and no file is read.
    """
    training.check()
    check_sinks(training.log_to)
    method.check_loop(training)
    method.check()


def check_sampling(options: Mapping[str, Any], above: bool = False) -> None:
    """Raise `ConfigError` where completions cannot be sampled so.

    Args:
        options: `max_new_tokens`, `temperature`, `top_k` and `top_p`, among others.
        above: a temperature of 0 cannot be learned from.
    """
    check_range(options, "max_new_tokens", low=1)
    check_range(options, "temperature", above=above)
    check_range(options, "top_k")
    check_range(options, "top_p", high=1, above=True)


_NEEDS = {
    "demonstrations": "answers to imitate",
    "preferences": "preferences or scores",
    "verifier": "a verifier (--task instead of --data)",
    "transitions": "logged transitions of an environment (minari:ID, .npz or .hdf5)",
    "environment": "an environment (--env instead of --data)",
    "labels": "labelled items (text and label, or prompt and answer)",
}


def can_learn(learns_from: LearnsFrom, says: set[str]) -> bool:
    """Whether feedback that says `says` (see `Feedback.says`) holds what a method learns from."""
    if learns_from == "demonstrations":
        return bool(says & {"demonstrations", "scores", "labels"})
    if learns_from == "labels":
        return bool(says & {"classes", "answers"})
    return learns_from == "preferences" and "preferences" in says


def batches(n: int, size: int, epochs: int, seed: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Index arrays of at most `size`, each epoch a fresh permutation of `range(n)`; a function of the seed alone."""
    for epoch in range(epochs):
        order = np.random.default_rng([*seed, epoch]).permutation(n)
        for start in range(0, n, size):
            yield order[start : start + size]


def pairs_from_scores(
    scores: np.ndarray, how: Literal["best-worst", "best-random", "all"], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """(better, worse) completion indices from one score per completion; none where all scores are equal.

    `best-worst`: the first argmax against the first argmin. `best-random`: the first argmax against a uniform choice
    among the others that score less (Tulu 3 and UltraFeedback binarisation, where a tie would say nothing). `all`:
    every strictly ordered pair.
    """
    best = int(np.argmax(scores))
    worse = np.flatnonzero(scores < scores[best])
    if len(worse) == 0:
        return []
    if how == "best-worst":
        return [(best, int(np.argmin(scores)))]
    if how == "best-random":
        return [(best, int(rng.choice(worse)))]
    return [(int(a), int(b)) for a in range(len(scores)) for b in range(len(scores)) if scores[a] > scores[b]]
