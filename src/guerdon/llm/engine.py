"""One policy, one thread that computes, and any number of threads and event loops that ask.

What is asked while the model computes waits together: requests with the same sampling advance in one batch, those with
the same prompt share its keys and values, and everything that is to be scored shares whatever beginnings it has. A
request that comes while a batch is under way waits until that is done.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import DataError, GuerdonError
from guerdon.language.policy import Policy
from guerdon.language.sampling.base import Completion, Sampling

if TYPE_CHECKING:
    from guerdon.language.sampling.local import Drawn, LocalSampler

COMPANY = 0.005  # seconds that a request which finds the model idle waits for others to come
Listener = Callable[[int, int, float], None]  # is told (completion, token, log-prob)


@dataclass(eq=False)
class _Job:
    """What one caller waits for: completions of a prompt, or the log-probs of pairs."""

    sampling: Sampling | None = None
    prompt: Sequence[int] = ()
    seeds: Sequence[int] = ()
    listener: Listener | None = None
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
    future: Future[Any] = field(default_factory=Future)
    drawn: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)  # completion -> tokens, log-probs
    done: dict[int, Completion] = field(default_factory=dict)

    def take(self, k: int, token: int, logp: float, ends: bool, sampler: LocalSampler) -> None:
        """A token of completion k; nobody waits for the longest completion of the batch but who asked for it."""
        assert self.sampling is not None
        tokens, logps = self.drawn.setdefault(k, ([], []))
        tokens.append(token)
        logps.append(logp)
        if self.listener is not None:
            self.listener(k, token, logp)
        if ends or len(tokens) == self.sampling.max_new_tokens:
            self.done[k] = sampler.completion(tokens, np.array(logps, dtype=np.float32), ends, self.sampling)
            if len(self.done) == len(self.seeds):
                self.finish([self.done[k] for k in range(len(self.seeds))])

    def finish(self, result: Any) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class StoppedError(GuerdonError):
    """The engine was closed, or nobody waits for what it computes any more."""


class Engine:
    """Computes for many callers at once with one policy.

    Attributes:
        policy: the policy.
        context: tokens that the model can read, prompt and completion together; None where nothing is known.
        batches: sizes of the batches so far, in completions.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self.context: int | None = getattr(policy.model.model.config, "max_position_embeddings", None)
        self.batches: list[int] = []
        self._lock = threading.Lock()
        self._waiting: list[_Job] = []
        self._busy = self._closed = False

    async def sample(
        self, prompt: Sequence[int], seeds: Sequence[int], sampling: Sampling, listener: Listener | None = None
    ) -> list[Completion]:
        """One completion for each seed; the same ones whatever else is asked at the time.

        Args:
            listener: is told of every token as it is drawn, from the thread that computes.

        Raises:
            DataError: prompt and completion do not fit into the context.
        """
        self.check(len(prompt), sampling.max_new_tokens)
        job = _Job(sampling, prompt, seeds, listener)
        return await self._submit(job)  # type: ignore[no-any-return]

    async def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Log-probs of the second tokens of each pair after the first ones; see `guerdon.language.scoring`."""
        for context, continuation in pairs:
            self.check(len(context), len(continuation))
        return await self._submit(_Job(pairs=pairs))  # type: ignore[no-any-return]

    def check(self, prompt: int, new: int) -> None:
        """Raise `DataError` where so many tokens do not fit into the model's context."""
        if self.context is not None and prompt + new > self.context:
            raise DataError(
                f"the prompt has {prompt} tokens and {new} may follow: together {prompt + new} are more than the "
                f"context of {self.context} tokens. Shorten the prompt, or ask for fewer tokens."
            )

    def close(self) -> None:
        """Stop after the current token; who waits gets a `StoppedError`. Signal handlers may call it."""
        self._closed = True

    async def _submit(self, job: _Job) -> Any:
        with self._lock:
            self._waiting.append(job)
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._work, name="guerdon-engine", daemon=True).start()
        return await asyncio.wrap_future(job.future)

    def _work(self) -> None:
        """Compute until nobody waits."""
        time.sleep(COMPANY)
        while True:
            with self._lock:
                jobs, self._waiting = self._waiting, []
                if not jobs:
                    self._busy = False
                    return
            for sampling in dict.fromkeys(job.sampling for job in jobs):
                alike = [job for job in jobs if job.sampling == sampling and not job.future.cancelled()]
                try:
                    self._go_on_for(alike)
                    self._score(alike) if sampling is None else self._sample(alike, sampling)
                except Exception as error:
                    for job in alike:
                        job.fail(error)

    def _go_on_for(self, jobs: list[_Job]) -> None:
        if self._closed or all(job.future.cancelled() for job in jobs):
            raise StoppedError("the model was stopped while it computed.")

    def _score(self, jobs: list[_Job]) -> None:
        from guerdon.language.scoring import score_pairs

        found = iter(score_pairs(self.policy.model, [pair for job in jobs for pair in job.pairs]))
        for job in jobs:
            job.finish([next(found) for _ in job.pairs])

    def _sample(self, jobs: list[_Job], sampling: Sampling) -> None:
        whose: dict[tuple[int, ...], list[tuple[_Job, int]]] = {}  # prompt -> whose completions those of it are
        for job in jobs:
            whose.setdefault(tuple(job.prompt), []).extend((job, k) for k in range(len(job.seeds)))
        owners = list(whose.values())

        def on_step(drawn: Sequence[Drawn]) -> None:
            self._go_on_for(jobs)
            for prompt, completion, token, logp, ends in drawn:
                job, k = owners[prompt][completion]
                if not job.future.cancelled():
                    job.take(k, token, logp, ends, self.policy.sampler)

        self.batches.append(sum(map(len, owners)))
        seeds = [[job.seeds[k] for job, k in own] for own in owners]
        self.policy.sampler.sample(list(whose), seeds, sampling, on_step=on_step)
