"""More computation for each answer of a language policy: best of n, weighted vote, beam search over lines."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from guerdon.errors import ConfigError
from guerdon.feedback.records import Record, Text
from guerdon.methods.planning.candidates import best_of_n, final_answer, vote, vote_weights
from guerdon.methods.planning.line_search import line_search

if TYPE_CHECKING:
    from guerdon.language.policy import Policy
    from guerdon.language.sampling.base import Completion, Sampling

Scorer = Callable[[Sequence[Text], Sequence[Sequence[str]]], list[np.ndarray]]  # prompts, answers: scores of each


def reward_scorer(judge: Policy, name: str = "the policy") -> Scorer:
    """What the head of a reward model says of answers; it may have another tokenizer than who answers.

    Raises:
        ConfigError: there is no head.
    """
    from guerdon.language.templates import render_all

    if not hasattr(judge.model, "head"):
        raise ConfigError(f"{name} is no reward model: it has no head that scores completions.")

    def scores(prompts: Sequence[Text], answers: Sequence[Sequence[str]]) -> list[np.ndarray]:
        records = [Record(p, [_said(p, text) for text in texts]) for p, texts in zip(prompts, answers, strict=True)]
        groups = render_all(records, judge.tokenizer, max_length=sys.maxsize)[0]
        return [np.array(row) for row in judge.rewards(groups)]

    return scores


def _said(prompt: Text, text: str) -> Text:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def choose(
    policy: Policy,
    prompts: Sequence[Text],
    n: int,
    sampling: Sampling,
    *,
    how: Literal["best-of-n", "vote", "lines"],
    candidates: int,
    scorer: Scorer | None = None,
    answer: Callable[[str], str | None] = final_answer,
) -> list[list[Completion]]:
    """n answers to each prompt, each found among candidates of its own.

    Best of n takes the candidate with the highest score; a vote the final answer that most candidates give, weighted
    where there is a scorer by `vote_weights`. Search over lines keeps the root of `candidates` partial answers and
    judges them by the scorer, or without one by the policy's mean log-prob of a token.

    Args:
        candidates: completions that an answer is chosen from, or lines that are sampled in a round.
        scorer: see `reward_scorer`.
        answer: what two candidates have to agree on in a vote.

    Raises:
        ConfigError: best of n without a scorer.
    """
    if how == "best-of-n" and scorer is None:
        raise ConfigError("best-of-n chooses by score: give the run of a reward model as scorer, or take a vote.")
    if how == "lines":
        return _by_lines(policy, prompts, n, sampling, candidates, scorer)
    drawn = policy.answer(prompts, n * candidates, sampling)
    scores = scorer(prompts, [[c.text for c in each] for each in drawn]) if scorer else [None] * len(drawn)
    found = []
    for each, scored in zip(drawn, scores, strict=True):
        chosen = []
        for first in range(0, len(each), candidates):
            part = slice(first, first + candidates)
            if how == "best-of-n":
                assert scored is not None
                best = best_of_n(scored[part])
            else:
                weights = None if scored is None else vote_weights(scored[part])
                best = vote([answer(c.text) for c in each[part]], weights)
            chosen.append(each[first + best])
        found.append(chosen)
    return found


def _by_lines(
    policy: Policy, prompts: Sequence[Text], n: int, sampling: Sampling, candidates: int, scorer: Scorer | None
) -> list[list[Completion]]:
    from guerdon.language.templates import prompt_ids, stop_ids

    def judge(p: int, partial: Sequence[Completion]) -> np.ndarray:
        if scorer is None:
            return np.array([c.logps.mean() for c in partial])
        return scorer([prompts[p % len(prompts)]], [[c.text for c in partial]])[0]

    ids = [prompt_ids(prompt, policy.tokenizer) for prompt in prompts]
    width = math.isqrt(candidates)
    found = line_search(
        policy.sampler,
        policy.tokenizer,
        ids * n,
        [(i, *each) for i in range(n) for each in ids],
        sampling,
        ends=stop_ids(policy.tokenizer, policy.model.model),
        width=width,
        branches=candidates // width,
        judge=judge,
    )
    return [found[p :: len(prompts)] for p in range(len(prompts))]
