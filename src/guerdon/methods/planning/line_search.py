"""Beam search over the steps of an answer, which are its lines (Snell et al. 2024, arXiv 2408.03314, section 5.2).

All partial answers of a round, of all prompts, are continued in one call of the sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from guerdon.language.sampling.base import Completion, Sampler, Sampling, completion_seeds

STEP = "\n"
Judge = Callable[[int, Sequence[Completion]], np.ndarray]  # a prompt's number and partial answers (n,) to scores (n,)


@dataclass
class Beam:
    """A partial answer."""

    tokens: list[int] = field(default_factory=list)
    logps: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    ended: bool = False  # by itself
    full: bool = False  # there is no room for another token

    def completion(self, tokenizer: Any) -> Completion:
        text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        return Completion(self.tokens, self.logps, self.ended, text)


def line_search(
    sampler: Sampler,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[Any]],
    sampling: Sampling,
    *,
    ends: set[int],
    width: int,
    branches: int,
    judge: Judge,
) -> list[Completion]:
    """The best answer to each prompt that is found line by line.

    From each of the `width` best partial answers `branches` next lines are sampled; of all these, and of what had ended
    before, the `width` best by `judge` stay. It is over when all of them have ended.

    Args:
        prompts: token ids.
        seeds: what identifies each prompt, for the random numbers of its samples.
        sampling: temperature and the like; `max_new_tokens` is that of the whole answer.
        ends: tokens that end an answer.
        width: partial answers that are kept; the first round samples `width * branches`.
        judge: scores of partial answers, higher is better.
    """
    beams = [[Beam()] for _ in prompts]
    for step in range(sampling.max_new_tokens):
        open_ = [(p, beam) for p, kept in enumerate(beams) for beam in kept if not (beam.ended or beam.full)]
        if not open_:
            break
        room = sampling.max_new_tokens - min(len(beam.tokens) for _, beam in open_)
        count = branches if step else width * branches
        drawn = sampler.sample(
            [[*prompts[p], *beam.tokens] for p, beam in open_],
            [completion_seeds(count, *seeds[p], step, *beam.tokens) for p, beam in open_],
            replace(sampling, max_new_tokens=room, stop=(STEP,)),
        )
        candidates = [[beam for beam in kept if beam.ended or beam.full] for kept in beams]
        for (p, beam), lines in zip(open_, drawn, strict=True):
            candidates[p] += [_longer(beam, line, sampling.max_new_tokens, ends) for line in lines]
        for p in {p for p, _ in open_}:
            scores = judge(p, [beam.completion(tokenizer) for beam in candidates[p]])
            beams[p] = [candidates[p][i] for i in np.argsort(-np.asarray(scores), kind="stable")[:width]]
    return [kept[0].completion(tokenizer) for kept in beams]


def _longer(beam: Beam, line: Completion, most: int, ends: set[int]) -> Beam:
    tokens = [*beam.tokens, *line.tokens][:most]
    logps = np.concatenate([beam.logps, line.logps])[:most]
    ended = len(beam.tokens) + len(line.tokens) <= most and line.finished and line.tokens[-1] in ends
    return Beam(tokens, logps, ended, len(tokens) == most and not ended)
