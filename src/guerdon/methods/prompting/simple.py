"""What evolutionary pruning is held against: the full prompt, and prunings that do not learn from what they try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from guerdon.errors import ConfigError
from guerdon.fields import check_range
from guerdon.methods.base import Metrics, method
from guerdon.methods.prompting.base import PromptMethod, drop

if TYPE_CHECKING:
    from guerdon.training.prompting import Kept, PromptRun, Search

TOGETHER = 16  # prompts of one step, whose items share forward passes


@method("icl", paper=13, learns_from="labels", policy="prompt")
@dataclass(kw_only=True)
class InContext(PromptMethod):
    """In-context learning: the full few-shot prompt as it is.

    One evaluation; what every other prompt method starts from and has to beat.
    """

    def learn(self, run: Search) -> Iterator[Metrics]:
        if not run.archive:
            yield self.progress(run, run.evaluate([run.everything]))


@method("random-pruning", paper=13, learns_from="labels", policy="prompt")
@dataclass(kw_only=True)
class RandomPruning(PromptMethod):
    """Prompts that lose a random share of their tokens; validation chooses among the best.

    The share is uniform in [low, high] for each prompt. With the budget of a search it is the rival that shows whether
    the search does more than choose the best of many.
    """

    low: float = 0.05  # least share of the tokens that is lost
    high: float = 0.5  # greatest share

    def check(self) -> None:
        check_range(vars(self), "low", "high", high=1)
        if self.low > self.high:
            raise ConfigError(f"low is {self.low} and high {self.high}: the shares lie between them.")

    def learn(self, run: Search) -> Iterator[Metrics]:
        prunable = frozenset(run.prompt.prunable)
        while run.left:
            ratios = run.rng.uniform(self.low, self.high, min(TOGETHER, run.left))
            pruned = [drop(run.everything, prunable, round(ratio * len(prunable)), run.rng) for ratio in ratios]
            yield self.progress(run, run.evaluate(pruned))


def shortened(order: Sequence[int], everything: Kept, count: int) -> list[Kept]:
    """Prompts without the first 1, 2, ... of `order`, at most `count` lengths spread evenly over all of them."""
    lengths = np.unique(np.linspace(1, len(order), min(count, len(order))).round().astype(int))
    return [tuple(i for i in everything if i not in set(order[:n])) for n in lengths.tolist()]


@method("attribution-pruning", paper=13, learns_from="labels", policy="prompt")
@dataclass(kw_only=True)
class AttributionPruning(PromptMethod):
    """Tokens are left out in the order of what each matters by itself, the least important first.

    Importance by occlusion: f(full) - f(full without the token), one evaluation for each token; then prompts without
    the n least important ones, for n over all lengths as far as the budget goes.
    """

    def learn(self, run: Search) -> Iterator[Metrics]:
        tokens = run.prompt.prunable
        full = run.everything
        if not run.archive:
            yield self.progress(run, run.evaluate([full]))
        # Of tokens that the budget does not reach nothing is known, and they stay.
        while run.left and len(run.state.setdefault("alone", [])) < len(tokens):
            alone = run.state["alone"]
            part = tokens[len(alone) : len(alone) + min(TOGETHER, run.left)]
            found = run.evaluate([tuple(i for i in full if i != token) for token in part])
            alone += [self.fit(run, i) for i in found]
            yield self.progress(run, found)
        order = [tokens[i] for i in np.argsort([-f for f in run.state["alone"]], kind="stable")]
        yield from _walk(self, run, order)


@method("information-pruning", paper=13, learns_from="labels", policy="prompt")
@dataclass(kw_only=True)
class InformationPruning(PromptMethod):
    """Prompt compression: the tokens that the model itself finds most predictable are left out first.

    -log p(token | those before it), by the same model and one pass over the full prompt, is what a token says; prompts
    keep the n tokens that say most, for n over all lengths as far as the budget goes. The principle of selective
    context and of LLMLingua's token level, without their second model and budget controller.
    """

    def learn(self, run: PromptRun) -> Iterator[Metrics]:
        if "order" not in run.state:
            logps = run.token_logps()
            run.state["order"] = sorted(run.prompt.prunable, key=lambda i: (-logps[i], i))
            yield self.progress(run, run.evaluate([run.everything]))
        yield from _walk(self, run, run.state["order"])


@method("llmlingua-2", paper=13, learns_from="labels", policy="prompt")
@dataclass(kw_only=True)
class LLMLingua2(PromptMethod):
    """Prompt compression by a token classifier that was trained to tell what a text can do without.

    The tokens that it would keep least probably are left out first: prompts keep the n most probable ones, for n over
    all lengths as far as the budget goes. Its words are those of its own tokenizer; a token of the prompt has the mean
    of the classifier's tokens that cover it.

    Source: Pan et al. 2024 (arXiv 2403.12968), whose classifiers are on the hub.
    """

    compressor: str = ""  # token classifier, microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank say

    def check(self) -> None:
        if not self.compressor:
            raise ConfigError(
                "llmlingua-2 needs a token classifier that says what to keep: give --compressor, a directory or a hub "
                "id such as microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank."
            )

    def learn(self, run: Search) -> Iterator[Metrics]:
        from guerdon.language.compression import keep_probabilities

        if "order" not in run.state:
            p = keep_probabilities(run.prompt, self.compressor)
            run.state["order"] = sorted(run.prompt.prunable, key=lambda i: (p[i], i))
            yield self.progress(run, run.evaluate([run.everything]))
        yield from _walk(self, run, run.state["order"])


def _walk(method: PromptMethod, run: Search, order: Sequence[int]) -> Iterator[Metrics]:
    """Evaluate ever shorter prompts, some at a time."""
    if "walk" not in run.state:
        run.state["walk"] = [list(kept) for kept in shortened(order, run.everything, run.left)] if run.left else []
    while run.left and run.state["walk"]:
        size = min(TOGETHER, run.left)
        part, run.state["walk"] = run.state["walk"][:size], run.state["walk"][size:]
        yield method.progress(run, run.evaluate([tuple(kept) for kept in part]))
