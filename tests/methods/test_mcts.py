"""Monte Carlo tree search."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from guerdon.errors import ConfigError, DataError, GuerdonError
from guerdon.methods.planning.mcts import (
    MCTS,
    Ask,
    Node,
    distinct,
    puct,
    score,
    search,
    select,
    together,
    uct,
)


class Counting:
    """Digits are appended until there are `depth`; the return is what `worth` says of them."""

    def __init__(self, worth: dict[str, float], depth: int = 2, actions: int = 2) -> None:
        self.worth, self.depth, self.actions, self.said = worth, depth, actions, ""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.said += action
        over = len(self.said) == self.depth
        return self.said, self.worth.get(self.said, 0.0) if over else 0.0, over, False, {}

    def snapshot(self) -> str:
        return self.said

    def restore(self, snapshot: str) -> str:
        self.said = snapshot
        return self.said


def digits(asks: list[Ask]) -> list[list[str]]:
    """Digits at random, those of an ask by its seed."""
    return [[str(d) for d in np.random.default_rng(ask.seed).integers(ask.env.actions, size=ask.n)] for ask in asks]


def in_order(asks: list[Ask]) -> list[list[str]]:
    return [[str(i % ask.env.actions) for i in range(ask.n)] for ask in asks]


def grown(env: Counting, propose: Any = digits, seed: int = 0, **how: Any) -> Node:
    ((_, tree),) = together([search(env, "", MCTS(**how), seed)], propose)
    return tree


def by_name(root: Node) -> dict[str, Node]:
    return {node.observation: node for node in root.walk()}


def test_every_return_goes_through_one_child_and_values_are_means_of_returns():
    worth = {"00": 0.1, "01": 0.2, "10": 0.3, "11": 0.9}
    root = grown(Counting(worth), iterations=40, candidates=8)
    nodes = by_name(root)
    assert set(nodes) == {"", "0", "1", *worth}
    for name, value in worth.items():
        assert nodes[name].value == pytest.approx(value) and nodes[name].visits >= 1
    assert root.visits == nodes["0"].visits + nodes["1"].visits
    total = sum(child.visits * child.value for child in root.children)
    assert root.value == pytest.approx(total / root.visits)
    assert root.visits < 40  # all is exhausted before, since nothing of it is a success


def test_proposals_count_once_and_their_shares_are_the_prior():
    propose = lambda asks: [["1", "0", "1 ", "1"][: ask.n] for ask in asks]  # noqa: E731
    root = grown(Counting({}, depth=1), propose, iterations=1, candidates=4, shuffle=False)
    assert [(child.action, child.prior) for child in root.children] == [("1", 0.75), ("0", 0.25)]
    assert distinct(["a", "B", "b ", "A"]) == (["a", "B"], [0.5, 0.5])
    assert distinct([3, 3, 1]) == ([3, 1], [2 / 3, 1 / 3])


def test_a_failed_end_has_its_own_value_and_its_ancestors_get_what_it_returned():
    root = grown(Counting({"1": 1.0}, depth=1), in_order, iterations=1, candidates=2, failure=-1.0, shuffle=False)
    lost, won = root.children
    assert (lost.value, won.value) == (-1.0, 1.0)
    assert (root.visits, root.value) == (2, 0.5)  # 0 from the failure, and 1 from the end that was never visited


@pytest.mark.parametrize(("unfinished", "value"), [(-0.5, -0.5), (None, 0.0)])
def test_what_is_not_finished_has_a_return_of_its_own(unfinished, value):
    root = grown(
        Counting({"000": 1.0}, depth=3), in_order, iterations=3, candidates=2, max_depth=2, unfinished=unfinished
    )
    assert max(node.depth for node in root.walk()) == 2
    assert all(node.over and node.value == value for node in root.walk() if node.depth == 2)
    assert root.value == pytest.approx(value)


def test_exhausted_nodes_are_kept_or_taken_out():
    how = {"iterations": 3, "candidates": 2, "shuffle": False}  # the root and both of its children are expanded
    kept, detached = (grown(Counting({"00": 1.0}), in_order, **how) for _ in range(2))
    everything = {"", "0", "1", "00", "01", "10", "11"}
    assert set(by_name(kept)) == set(by_name(detached)) == everything
    assert select(kept, MCTS()) is None
    assert set(by_name(kept)) == everything and all(child.exhausted for child in kept.children)
    assert select(detached, MCTS(detach=True)) is detached  # to be expanded once more
    assert set(by_name(detached)) == {""}  # the success went with its parent


def test_the_search_ends_with_the_first_success_if_it_may():
    worth = {"11": 1.0}
    early = grown(Counting(worth), in_order, iterations=50, candidates=2, early_stop=True)
    late = grown(Counting(worth), in_order, iterations=50, candidates=2)
    assert by_name(early)["11"].visits == 1
    assert early.visits < late.visits


def test_a_success_is_met_again_and_raises_the_value_of_its_way():
    env = Counting({f"1{d}": 1.0 for d in "0"}, depth=2, actions=3)
    root = Node(None, "")
    way, other = (Node(a, a, depth=1, parent=root, visits=1) for a in "10")
    root.children, root.visits = [way, other], 2
    way.value = 1.0
    won, open_ = Node("0", "10", 1.0, 2, over=True, parent=way), Node("1", "11", 0.0, 2, parent=way)
    way.children = [open_, won]
    assert select(root, MCTS(weight=0.1)) is won
    assert select(root, MCTS(weight=0.1, goal=2.0)) is open_
    assert env.actions == 3


def test_scores():
    assert uct(0.0, 0, 5) == math.inf and uct(-0.5, 0, 5) == -0.5
    assert uct(0.25, 4, 9, weight=2.0) == pytest.approx(0.25 + 2 * math.sqrt(2 * math.log(9) / 4))
    assert puct(0.25, 3, 16, prior=0.5, weight=2.0) == pytest.approx(0.25 + 2 * 0.5 * 4 / 4)
    root = Node(None, "", visits=16)
    child = Node("a", "a", depth=1, prior=0.5, visits=3, value=0.25, parent=root)
    assert score(child, MCTS(selection="puct", weight=2.0)) == pytest.approx(1.25)
    assert score(child, MCTS(divide=True)) == pytest.approx(uct(0.25, 3, 16, divide=True))


def test_puct_follows_its_prior():
    visits = {}
    for prior in (0.9, 0.1):
        env = Counting({}, depth=6)
        how = MCTS(selection="puct", weight=5.0, iterations=40, candidates=2)
        tree = search(env, "", how, 0, prior=lambda node, actions, p=prior: [p if a == "1" else 1 - p for a in actions])
        ((_, root),) = together([tree], in_order)
        visits[prior] = by_name(root)["1"].visits / root.visits
    assert visits[0.9] > 0.7 > 0.3 > visits[0.1]


def test_what_is_proposed_first_does_not_win_all_ties():
    first = [
        max(
            grown(Counting({}, depth=3), in_order, s, iterations=1, candidates=2).children, key=lambda c: c.visits
        ).action
        for s in range(20)
    ]
    assert 2 <= first.count("0") <= 18
    unshuffled = grown(Counting({}, depth=3), in_order, iterations=1, candidates=2, shuffle=False)
    assert [child.visits for child in unshuffled.children] == [1, 0]


def test_trees_do_not_depend_on_what_is_searched_beside_them():
    def begun(seed: int):
        return search(Counting({"012": 1.0}, depth=3, actions=3), "", MCTS(iterations=12, candidates=3), seed)

    alone = [next(together([begun(seed)], digits))[1].as_dict() for seed in range(5)]
    beside = dict(together(map(begun, range(5)), digits, at_once=2))
    assert [beside[number].as_dict() for number in range(5)] == alone
    assert len({json.dumps(tree) for tree in alone}) == 5
    assert list(together([], digits)) == []


def test_proposals_of_another_number_are_refused():
    with pytest.raises(GuerdonError, match=r"\[5\] actions were asked for, and others proposed: \[\['0'\]\]"):
        grown(Counting({}), lambda asks: [["0"]])


def test_trees_survive_json():
    root = grown(Counting({"01": 0.5}), iterations=10, candidates=3)
    back = Node.from_dict(json.loads(json.dumps(root.as_dict())))
    assert back.as_dict() == root.as_dict()
    assert all(child.parent is node for node in back.walk() for child in node.children)
    with pytest.raises(DataError, match="no tree of a search"):
        Node.from_dict({"action": None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations is 0: it must be at least 1"),
        ({"weight": -1.0}, "weight is -1.0"),
        ({"selection": "puct", "divide": True}, "divide is a way of computing uct"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(ConfigError, match=message):
        grown(Counting({}), **options)
