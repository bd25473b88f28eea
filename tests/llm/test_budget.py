"""Budgets are kept, whatever happens, and what is under way counts with the most that it can take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.llm import endpoint
from guerdon.llm.base import Client, Reply, Request, Usage, gather
from guerdon.llm.budget import Budget, BudgetSpent, Limits
from guerdon.llm.endpoint import Again
from guerdon.llm.loop import wait

REQUEST = Request(prompt="a" * 8, max_tokens=60)  # takes at most 100 tokens


class Limited(Client):
    """Takes 10 tokens for each reply, within limits; `trouble` is raised before the replies."""

    def __init__(self, budget: Budget, trouble: list[Exception] | None = None, per_minute: float = 0):
        self.limits = Limits(budget, 4, per_minute)
        self.concurrency, self.trouble, self.calls = 4, trouble or [], 0

    async def _ask(self, request: Request) -> list[Reply]:
        return await self.limits.send(request, self.attempt)

    async def attempt(self) -> list[Reply]:
        self.calls += 1
        await asyncio.sleep(0.001)
        if self.trouble:
            raise self.trouble.pop(0)
        return [Reply("x", "stop", usage=Usage(5, 5))]


def test_a_budget_of_requests() -> None:
    client = Limited(Budget(requests=7))
    found = gather(client, [REQUEST] * 20)
    assert sum(replies is not None for replies in found.replies) == client.calls == client.limits.budget.sent == 7
    assert found.stopped == ("the budget is spent: requests are at 7 of 7, and the next request could take 1.")


@pytest.mark.parametrize(("tokens", "answered"), [(100, 1), (99, 0), (119, 2), (280, 19), (1000, 20)])
def test_a_budget_of_tokens_is_used_up_and_never_overdrawn(tokens: int, answered: int) -> None:
    """Each request may take 100 tokens and takes 10: the last one that is sent leaves room for 100."""
    budget = Budget(tokens=tokens)
    found = gather(Limited(budget), [REQUEST] * 20)
    assert sum(replies is not None for replies in found.replies) == answered
    assert budget.spent.total == 10 * answered <= tokens
    assert ("tokens are at" in found.stopped) == (answered < 20)


def test_a_budget_of_money() -> None:
    budget = Budget(cost=0.05, prices=(100.0, 1000.0))  # 0.0055 for a request, at most 0.064
    with pytest.raises(BudgetSpent, match=r"cost are at 0\.0 of 0\.05"):
        wait(Limited(budget).ask(REQUEST))
    budget = Budget(cost=0.1, prices=(100.0, 1000.0))
    found = gather(Limited(budget), [REQUEST] * 20)
    assert sum(replies is not None for replies in found.replies) == 7  # 6 * 0.0055 + 0.064 <= 0.1 < 7 * 0.0055 + 0.064
    assert budget.cost() == pytest.approx(7 * 0.0055)


def test_several_clients_share_a_budget() -> None:
    budget = Budget(requests=3)
    for answered in (True, True, True, False):
        client = Limited(budget)
        if answered:
            wait(client.ask(REQUEST))
        else:
            with pytest.raises(BudgetSpent):
                wait(client.ask(REQUEST))


@pytest.mark.parametrize(
    ("error", "spent"),
    [
        (Again(GuerdonError("busy"), 500), Usage(5, 5)),  # answered with an error: only the second attempt took tokens
        (Again(GuerdonError("cut off")), Usage(45, 65)),  # no whole answer: the work may have been done
    ],
)
def test_every_attempt_counts(error: Exception, spent: Usage) -> None:
    client = Limited(Budget(requests=2), trouble=[error])
    wait(client.ask(REQUEST))
    assert (client.limits.budget.sent, client.limits.budget.spent) == (2, spent)
    client = Limited(Budget(requests=1), trouble=[error])
    with pytest.raises(BudgetSpent):
        wait(client.ask(REQUEST))


def test_a_refused_request_takes_no_tokens() -> None:
    client = Limited(Budget(tokens=100), trouble=[DataError("too long")])
    assert gather(client, [REQUEST] * 2).refused == {0: "too long"}
    assert client.limits.budget.spent == Usage(5, 5) and client.limits.budget.sent == 2


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRIES", 3)
    client = Limited(Budget(), trouble=[Again(GuerdonError("busy"), 500)] * 9)
    with pytest.raises(GuerdonError, match="busy"):
        wait(client.ask(REQUEST))
    assert client.calls == 4
    client = Limited(Budget(), trouble=[Again(GuerdonError("busy"), 429, wait=1e6)] * 9)
    with pytest.raises(GuerdonError, match="busy"):
        wait(client.ask(REQUEST))
    assert client.calls == 1  # nobody waits for days


def test_requests_are_spaced_and_bounded() -> None:
    client = Limited(Budget(), per_minute=3000)
    begun = time.monotonic()
    gather(client, [REQUEST] * 6)
    assert time.monotonic() - begun >= 5 * 0.02


def test_who_gives_up_waiting_leaves_the_budget_in_order() -> None:
    budget = Budget(requests=2)

    async def never() -> list[Reply]:
        await asyncio.Event().wait()
        raise AssertionError

    async def given_up(attempt: Callable[[], Awaitable[list[Reply]]]) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(budget.pay(REQUEST, attempt), 0.01)

    wait(given_up(never))
    assert budget.spent == Usage(40, 60)  # it may have been done all the same
    wait(Limited(budget).ask(REQUEST))


@pytest.mark.parametrize("limits", [{"requests": -1}, {"tokens": -5}, {"cost": float("nan")}])
def test_what_cannot_be_a_budget(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(limits))):
        Budget(**limits)  # type: ignore[arg-type]
