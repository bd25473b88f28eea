"""Monte Carlo tree search in anything that can be brought back: text environments, simulators, puzzles.

A tree is grown from where an episode stands. Whoever acts proposes actions; the search asks, and is told:

    searches = (search(env, env.reset()[0], MCTS(), seed) for ...)
    for number, tree in together(searches, propose): ...

so that many searches share one batch of proposals, and each gives the tree that it would give alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.fields import check_range


class Restorable(Protocol):
    """An environment whose episodes can be brought back: `guerdon.tasks.text.TextEnv`, `simulator.Simulator`."""

    def step(self, action: Any, /) -> tuple[Any, float, bool, bool, dict[str, Any]]: ...

    def snapshot(self) -> Any: ...

    def restore(self, snapshot: Any, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class MCTS:
    """How a tree is searched: as in Zhai et al. 2024 (arXiv 2409.09345), less what its code is known to spoil.

    As released it is `divide=True, detach=True, shuffle=False`.
    """

    iterations: int = 30  # selections, each with an expansion and a rollout
    candidates: int = 5  # actions that are proposed to expand a node; those proposed twice count once
    max_depth: int = 10  # steps of an episode, after which it counts as unfinished
    selection: Literal["uct", "puct"] = "uct"  # what is added to the value of a node
    weight: float = 1.0  # of what is added: higher explores more
    divide: bool = False  # divide the mean return by the visits once more (uct), by which exploitation vanishes
    goal: float = 1.0  # return of an episode that is a success
    failure: float = 0.0  # value of a failed last step itself; what lies before it gets the return that there was
    unfinished: float | None = -0.5  # return of an unfinished episode; none: what it has earned
    early_stop: bool = False  # end with the first success
    detach: bool = False  # take a node with nothing but ends below it out of the tree
    shuffle: bool = True  # children in random order: else what was proposed first wins all ties

    def check(self) -> None:
        """Raise `ConfigError` where a value cannot be meant."""
        check_range(vars(self), "iterations", "candidates", "max_depth", low=1)
        check_range(vars(self), "weight")
        if self.divide and self.selection != "uct":
            raise ConfigError("divide is a way of computing uct: leave it out with selection puct.")


@dataclass(slots=True, eq=False)
class Node:
    """A step of an episode, and what searching below it has brought.

    Attributes:
        action: what led here, as proposed; None at the root.
        observation: what came of it.
        reward: return from the root to here; of an unfinished end, `MCTS.unfinished`.
        depth: steps since the root.
        over: whether the episode ends here.
        prior: share of the proposals that said this action.
        visits: N, returns that were backed up through here.
        value: V, their mean.
        exhausted: all that lies below has an end.
        best: at the root, of the ends that were backed up the one of greatest return, and of equals the shortest.
        info: what the environment told beside; it and `state`, its snapshot, are forgotten when the search ends.
    """

    action: Any
    observation: Any
    reward: float = 0.0
    depth: int = 0
    over: bool = False
    prior: float = 1.0
    visits: int = 0
    value: float = 0.0
    exhausted: bool = False
    best: Node | None = None
    info: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)

    @property
    def path(self) -> list[Node]:
        """From the root to this node."""
        way, node = [self], self.parent
        while node is not None:
            way.append(node)
            node = node.parent
        return way[::-1]

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def add(self, ret: float) -> None:
        """N <- N + 1, V <- V + (ret - V) / N."""
        self.visits += 1
        self.value += (ret - self.value) / self.visits

    def as_dict(self) -> dict[str, Any]:
        """The tree below, as plain data for JSON (where actions and observations are)."""
        told = ("action", "observation", "reward", "depth", "over", "prior", "visits", "value")
        return {name: getattr(self, name) for name in told} | {"children": [c.as_dict() for c in self.children]}

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> Node:
        """The tree that `as_dict` told; a `DataError` where it is none."""
        try:
            node = cls(**{**said, "children": [cls.from_dict(child) for child in said["children"]]})
        except (TypeError, KeyError) as error:
            raise DataError(f"this is no tree of a search ({type(error).__name__}: {error}).") from error
        for child in node.children:
            child.parent = node
        return node


def uct(value: float, visits: int, parent_visits: int, weight: float = 1.0, divide: bool = False) -> float:
    """V + w sqrt(2 ln N_parent / N); of an unvisited node infinite, or V where that is negative.

    `divide` gives V / N + w sqrt(2 ln N_parent / N), as released.
    """
    if visits == 0:
        return math.inf if value >= 0 else value
    return (value / visits if divide else value) + weight * math.sqrt(2 * math.log(parent_visits) / visits)


def puct(value: float, visits: int, parent_visits: int, prior: float, weight: float = 1.0) -> float:
    """V + w P sqrt(N_parent) / (1 + N)."""
    return value + weight * prior * math.sqrt(parent_visits) / (1 + visits)


class Ask(NamedTuple):
    """A search asks for `n` actions at `node`, where the episode in `env` stands; `seed` is of the chance in them."""

    node: Node
    n: int
    seed: int
    env: Restorable


Search = Generator[Ask, Sequence[Any], Node]
Prior = Callable[[Node, Sequence[Any]], Sequence[float]]


def search(
    env: Restorable,
    observation: Any,
    how: MCTS,
    seed: int,
    *,
    info: dict[str, Any] | None = None,
    act: Callable[[Node, Any], Any] = lambda node, action: action,
    prior: Prior | None = None,
) -> Search:
    """Search from where the episode in `env` stands; see `together`, which carries searches out.

    Each iteration descends to a node that has no children, gives it those that are proposed, plays an episode to its
    end from the child of greatest value by one proposal for each step, and backs the return up. What lies in a rollout
    alone is not kept in the tree. Ends that were never visited are backed up once at the end.

    Args:
        env: is this search's own until it ends; when it asks, the episode stands where it asks.
        observation, info: what was seen last.
        act: what of a proposal at a node is done in the environment.
        prior: puct's P of the proposed actions; the share of the proposals that said each where not given.

    Raises:
        ConfigError: options that cannot be meant.
    """
    how.check()
    rng, root = np.random.default_rng(seed), Node(None, observation, info=info or {}, state=env.snapshot())

    def step(node: Node, action: Any, prior: float = 1.0, keep: bool = True) -> Node:
        seen, reward, terminated, truncated, told = env.step(act(node, action))
        child = Node(action, seen, node.reward + reward, node.depth + 1, terminated, prior, info=told, parent=node)
        if not terminated and (truncated or child.depth == how.max_depth):
            child.over = True
            child.reward = child.reward if how.unfinished is None else how.unfinished
        if keep and not child.over:
            child.state = env.snapshot()
        return child

    def ask(node: Node, n: int) -> Ask:
        return Ask(node, n, int(rng.integers(2**31)), env)

    for _ in range(how.iterations):
        leaf = select(root, how)
        if leaf is None:
            break
        ends = [leaf]
        if not leaf.over:
            env.restore(leaf.state)
            actions, priors = distinct((yield ask(leaf, how.candidates)))
            for action, share in zip(actions, priors if prior is None else prior(leaf, actions), strict=True):
                if leaf.children:
                    env.restore(leaf.state)
                leaf.children.append(step(leaf, action, share))
            if how.shuffle:
                rng.shuffle(leaf.children)  # type: ignore[arg-type]
            ends += leaf.children
            leaf = max(leaf.children, key=lambda child: child.value)
            if not leaf.over:
                env.restore(leaf.state)
        while not leaf.over:
            (action,) = yield ask(leaf, 1)
            leaf = step(leaf, action, keep=False)
        back_up(leaf, how)
        if how.early_stop and any(end.over and end.reward >= how.goal for end in (leaf, *ends)):
            break
    for node in root.walk():
        node.info, node.state = {}, None
        if node.over and not node.visits:
            back_up(node, how)
    return root


def select(root: Node, how: MCTS) -> Node | None:
    """From the root by the greatest score to a node without children, or to a success; None where all is exhausted."""
    node = root
    while node.children:
        going = [child for child in node.children if not (child.over or child.exhausted)]
        if not going:
            if node.parent is None:
                return None
            if how.detach:
                node.parent.children.remove(node)
            node.exhausted, node = True, node.parent
            continue
        won = next((child for child in node.children if child.over and child.reward >= how.goal), None)
        if won is not None:
            return won
        node = max(going, key=lambda child: score(child, how))
    return node


def score(child: Node, how: MCTS) -> float:
    """By what a child is selected."""
    assert child.parent is not None
    visits = child.parent.visits
    if how.selection == "uct":
        return uct(child.value, child.visits, visits, how.weight, how.divide)
    return puct(child.value, child.visits, visits, child.prior, how.weight)


def back_up(end: Node, how: MCTS) -> None:
    """Add the return of an episode to all nodes on its way; to a failed end its own value."""
    end.add(how.failure if end.reward == 0 else end.reward)
    way = end.path
    for node in way[:-1]:
        node.add(end.reward)
    root = way[0]
    if root.best is None or (end.reward, -end.depth) > (root.best.reward, -root.best.depth):
        root.best = end


def together(
    searches: Iterable[Search], propose: Callable[[list[Ask]], Sequence[Sequence[Any]]], at_once: int = 32
) -> Iterator[tuple[int, Node]]:
    """Carry searches out, `at_once` of them side by side; the number of each and its tree, as they end.

    Args:
        searches: taken up one by one, so that environments may be made where they are needed.
        propose: for each ask, its `n` actions; the same ones whatever else is asked, if trees are not to depend on it.

    Raises:
        GuerdonError: something else than `n` actions was proposed.
    """
    waiting, live = enumerate(searches), dict[int, Search]()
    told: dict[int, Any] = {}
    while True:
        for number, begun in islice(waiting, at_once - len(live)):
            live[number], told[number] = begun, None
        if not live:
            return
        asks: dict[int, Ask] = {}
        for number, actions in told.items():
            try:
                asks[number] = live[number].send(actions)
            except StopIteration as done:
                del live[number]
                yield number, done.value
        wanted = [ask.n for ask in asks.values()]
        proposed = propose(list(asks.values())) if asks else []
        if [len(actions) for actions in proposed] != wanted:
            raise GuerdonError(f"search: {wanted} actions were asked for, and others proposed: {proposed!r:.200}.")
        told = dict(zip(asks, proposed, strict=True))


def distinct(actions: Sequence[Any]) -> tuple[list[Any], list[float]]:
    """Each action once, as it came first, and its share; texts that differ in space and case alone are one."""
    first: dict[Any, Any] = {}
    counts: dict[Any, int] = {}
    for action in actions:
        key = " ".join(action.split()).casefold() if isinstance(action, str) else action
        first.setdefault(key, action)
        counts[key] = counts.get(key, 0) + 1
    return list(first.values()), [count / len(actions) for count in counts.values()]
