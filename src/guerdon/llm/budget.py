"""What may be spent on a language model, and how fast.

A request is sent only if the most that it can take still fits into the budget, so that no budget is overdrawn: while
others are under way it waits for what they really took, and when it does not fit even then, the budget is spent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from guerdon.errors import GuerdonError
from guerdon.fields import check_range
from guerdon.llm.base import Reply, Request, Usage
from guerdon.llm.endpoint import Again, persist


class BudgetSpent(GuerdonError):
    """The next request could take more than the budget has left."""


class Budget:
    """Limits of requests, tokens and cost; one budget may be shared by several clients.

    Every attempt counts as a request. An attempt that brought no whole answer counts with the most that it can have
    taken, because the server may have done the work; of a stream that broke it is what had come, since servers stop
    when nobody listens any more. One that was answered with an error takes no tokens. What a cache or a cassette
    replies costs nothing.

    Args:
        requests: that may be sent.
        tokens: that may be read and written together.
        cost: in the currency of `prices`.
        prices: of a million tokens read and of a million written.

    Attributes:
        sent, spent: requests and tokens so far.
    """

    def __init__(
        self,
        *,
        requests: int | None = None,
        tokens: int | None = None,
        cost: float | None = None,
        prices: tuple[float, float] = (0.0, 0.0),
    ):
        limits = {"requests": requests, "tokens": tokens, "cost": cost}
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        check_range(self.limits, *self.limits)
        self.prices = prices
        self.sent, self.spent = 0, Usage()
        self._held = Usage()  # the most that the requests under way can take
        self._under_way = 0
        self._changed = asyncio.Condition()

    async def pay(self, request: Request, attempt: Callable[[], Awaitable[list[Reply]]]) -> list[Reply]:
        """The replies that `attempt` returns, with what they took written down.

        Raises:
            BudgetSpent: the attempt was not made, because it could take more than is left.
        """
        most = request.most()
        async with self._changed:
            while why := self._lacks(most):
                if not self._under_way:
                    raise BudgetSpent(f"the budget is spent: {why}.")
                await self._changed.wait()
            self.sent += 1
            self._under_way += 1
            self._held += most
        taken = most
        try:
            replies = await attempt()
            taken = sum((reply.usage for reply in replies), Usage())
            return replies
        except Again as again:
            taken = again.taken or (most if again.status_code is None else Usage())
            raise
        except GuerdonError:
            taken = Usage()
            raise
        finally:
            self._under_way -= 1
            self._held -= most
            self.spent += taken
            async with self._changed:
                self._changed.notify_all()

    def cost(self, usage: Usage | None = None) -> float:
        """What these tokens, or those spent so far, cost."""
        usage = self.spent if usage is None else usage
        return (usage.prompt * self.prices[0] + usage.completion * self.prices[1]) / 1e6

    def _lacks(self, most: Usage) -> str:
        """What another request may take too much of; empty where it fits."""
        then = self.spent + self._held + most
        needs = {"requests": self.sent + 1, "tokens": then.total, "cost": self.cost(then)}
        had = {"requests": self.sent, "tokens": self.spent.total, "cost": self.cost()}
        return "; ".join(
            f"{name} are at {had[name]:,} of {limit:,}, and the next request could take {needs[name] - had[name]:,}"
            for name, limit in self.limits.items()
            if needs[name] > limit
        )


class Limits:
    """How requests go out: at most `concurrency` at a time, evenly spaced, again after faults, within the budget."""

    def __init__(self, budget: Budget, concurrency: int, per_minute: float = 0):
        check_range({"concurrency": concurrency}, "concurrency", low=1)
        check_range({"per_minute": per_minute}, "per_minute")
        self.budget = budget
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._slots = asyncio.Semaphore(concurrency)

    async def send(self, request: Request, attempt: Callable[[], Awaitable[list[Reply]]]) -> list[Reply]:
        """The replies that `attempt` returns, made again while it raises `Again`."""

        async def once() -> list[Reply]:
            async with self._slots:
                start = max(self._next, time.monotonic())
                self._next = start + self._gap
                await asyncio.sleep(start - time.monotonic())
                return await self.budget.pay(request, attempt)

        return await persist(once)
