"""What the trials of the claim of Q* search measure."""

from __future__ import annotations

import math

import numpy as np
import pytest

from guerdon.claims import get_claim
from guerdon.claims.paper_07 import LEARNING, searched, trial
from guerdon.control.puzzles.domains import make_puzzle
from guerdon.control.puzzles.heuristics import make_heuristic
from guerdon.control.puzzles.puzzle import Distances
from guerdon.methods.planning import a_star, lookahead, q_star

PANCAKES = {
    "puzzles": ["pancake5", "pancake5?meta=2"],
    "scramble": 8,
    "instances": 12,
    "max_nodes": 10_000,
    "weight": 1.0,
    "updates": 30,
    "options": {**LEARNING, "hidden": [16], "batch_size": 32, "copy_every": 10},
}


@pytest.mark.parametrize("search", ["q-star", "a-star"])
def test_the_metrics_are_those_of_the_searches(search):
    puzzle = make_puzzle("pancake6?meta=2")
    starts = puzzle.walk(np.full(10, 9), np.random.default_rng(0))
    shortest = np.maximum(Distances(make_puzzle("pancake6")).of(starts), 1)
    h = make_heuristic("misplaced", puzzle)
    run, values = (q_star, lookahead(puzzle, h)) if search == "q-star" else (a_star, h)
    found = searched({"search": search}, puzzle, values, starts, shortest, PANCAKES | {"weight": 0.2})
    alone = [run(puzzle, values, start[None], weight=0.2)[0] for start in starts]
    assert found["nodes/25"] == np.mean([s.nodes_generated for s in alone])
    assert found["evaluated/25"] == np.mean([s.heuristic_calls for s in alone])
    assert found["cost/25"] == pytest.approx(np.mean([s.cost / d for s, d in zip(alone, shortest, strict=True)]))
    assert found["MiB/25"] == np.mean([s.node_bytes + s.edge_bytes for s in alone]) / 2**20
    assert found["solved/25"] == 1.0 and found["seconds/25"] > 0


def test_exact_costs_lead_straight_to_the_goal(tmp_path):
    found = trial({"search": "q-star", "learned": False}, range(2), PANCAKES, tmp_path / "x" / "y" / "z" / "seeds-0-1")
    for evaluation in found.values():
        means = evaluation.means()
        assert means["cost/4"] == means["cost/16"] == 1.0
        assert means["growth"] == pytest.approx(math.log2(means["nodes/16"] / means["nodes/4"]))
    assert found[0].means() != found[1].means()  # each seed has instances of its own


@pytest.mark.slow
def test_the_searches_share_what_was_learned(tmp_path):
    results = {}
    for label in ("q-star", "a-star"):
        directory = tmp_path / "07" / "pancakes" / label / "seeds-0-1"
        results[label] = trial(get_claim(7).arms[label], range(2), PANCAKES, directory)
    assert len(list((tmp_path / "07" / "shared").iterdir())) == 2  # one for each action set
    for found in results.values():
        assert all(e.means()["solved/4"] == 1.0 and e.means()["cost/16"] >= 1.0 for e in found.values())


def test_the_claim_can_fail_in_every_criterion():
    claim = get_claim(7)
    assert {c.where for c in claim.criteria} <= set(claim.settings)
    assert {label for c in claim.criteria for label in (c.arm, c.rival)} <= set(claim.arms)
    for criterion in claim.criteria:
        actions = {str(make_puzzle(name).actions) for name in claim.settings[criterion.where]["puzzles"]}
        assert not criterion.metric or criterion.metric.partition("/")[2] in actions
