"""What the trials of paper 12 are made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from guerdon.claims import get_claim, paper_12
from guerdon.claims.paper_12 import Learned, World, grown, pick, rows_of, searched, success, trial
from guerdon.methods.planning.step_q import best_end, step_pairs

CLAIM = get_claim(12)
STATED = dict(CLAIM.settings["keys"])


def test_the_agent_presses_the_right_key_nine_times_as_often():
    p = World(STATED).policy("3-5", 1, 9)
    assert p.argmax() == 5 and p[5] / p[0] == pytest.approx(9) and p.sum() == pytest.approx(1)
    margin = next(each.margin for each in CLAIM.criteria if each.rival == "no-q" and each.where == "keys")
    assert margin == pytest.approx((9 / 16) ** 3, abs=5e-4)  # what no Q reaches: above it by as much is twice it


def test_tasks_to_be_judged_by_are_new_draws_or_unseen_pairs():
    drawn, unseen = World(STATED), World(CLAIM.settings["unseen-keys"])
    assert set(drawn.drawn("test", 400, 0)) & set(drawn.drawn("train", 200, 0))
    assert not set(unseen.drawn("test", 400, 0)) & set(unseen.drawn("train", 200, 0))
    assert drawn.drawn("test", 9, 0) == drawn.drawn("test", 9, 0) != drawn.drawn("test", 9, 1)


def test_with_sums_what_is_shown_says_the_keys_modulo_their_number():
    world = World(CLAIM.settings["wrong-q"])
    for task in ("0-0", "3-11", "7-2"):
        x, y, *_ = world.inputs(task, ())
        y -= world.actions + 1
        assert [(x + y) % 12, (x + 2 * y) % 12] == [int(key) for key in task.split("-")]
    assert len({tuple(world.inputs(task, ())) for task in world.tasks["train"]}) == 144


def test_what_q_sees_tells_all_states_apart():
    world = World(STATED)
    states = [("1-2", ()), ("2-1", ()), ("1-2", (0,)), ("1-2", (1,)), ("1-2", (1, 0)), ("1-2", (0, 1))]
    assert len({tuple(world.inputs(*state)) for state in states}) == len(states)
    assert {len(world.inputs(*state)) for state in states} == {world.depth + 2}


def small(**said):
    return {**STATED, "tasks": 6, "iterations": 25, "updates": 60, **said}


def test_pairs_are_last_steps_and_arms_share_them(tmp_path):
    settings = small()
    world = World(settings)
    said = searched(world, settings, 0, tmp_path / "12" / "keys" / "step-q" / "seeds-0-0")
    trees = grown(world, "train", 6, settings, 0)
    assert said["solved"] == sum(best_end(tree) is not None for tree in trees.values()) > 0
    assert len(said["step pairs"]) == sum(len(step_pairs(tree)) for tree in trees.values())
    for chosen, rejected in said["step pairs"]:
        ((task, before, key),), ((other, same, wrong),) = chosen, rejected
        assert (task, before) == (other, same) and key != wrong
    name, tree = next((name, tree) for name, tree in trees.items() if best_end(tree))
    rows = rows_of(name, best_end(tree).path)
    assert [key for *_, key in rows] == [int(name.split()[0].split("-")[i % 2]) for i in range(3)]
    again = searched(world, settings, 0, tmp_path / "12" / "keys" / "no-q" / "seeds-0-0")
    assert again == said and len(list((tmp_path / "12" / "shared").iterdir())) == 1


def test_the_losses_are_dpo_and_the_log_likelihood():
    world = World(STATED)
    pairs = [([("1-2", (), 1)], [("1-2", (), 3)]), ([("4-2", (4,), 2)], [("4-2", (4,), 7)])]
    q = Learned(world, None, seed=0)
    assert q.margins(pairs).abs().max() == 0
    losses = []
    q.step = lambda loss: losses.append(loss.item())
    q.prefer(pairs, 1)
    assert losses == pytest.approx([math.log(2)])
    q = Learned(world, None, seed=0)
    q.prefer(pairs, 50)
    assert (q.margins(pairs) > 0.1).all()
    agent = Learned(world, 9, seed=0)
    start = agent.logps(agent.network, agent.inputs([("1-2", (), 0)]))
    torch.testing.assert_close(start[0].exp(), torch.from_numpy(world.policy("1-2", 0, 9)).float())
    agent.imitate([("1-2", (), 1)], 50)
    assert agent.q([("1-2", ())])[0].argmax() == 1


def test_keys_are_picked_by_vote_and_by_q():
    p, q, rng = np.array([0.98, 0.01, 0.01]), np.array([0.0, 2.0, 1.0]), np.random.default_rng(0)
    assert pick({"candidates": 5, "choice": "vote"}, p, q, rng) == 0
    assert pick({"candidates": 3, "distinct": True, "choice": "q"}, p, q, rng) == 1
    assert pick({"candidates": 1, "choice": "q"}, p, q, rng) == 0


def test_success_without_q_is_what_it_must_be():
    world = World(STATED)
    found = [success(world, CLAIM.arms["no-q"], None, STATED, seed) for seed in range(3)]
    assert np.mean(found) == pytest.approx((9 / 16) ** 3, abs=0.04)


def test_a_trial_says_what_was_learned_from(tmp_path):
    arm = CLAIM.arms["step-q"]
    found = trial(arm, [0], small(), tmp_path / "12" / "keys" / "step-q" / "seeds-0-0")[0]
    assert list(found.metrics) == ["return", "solved", "pairs", "pair accuracy"] and found.primary == "return"
    assert found.means()["pairs"] > 0
    nothing = small(weight=1e-9, acts=9, iterations=1)
    empty = trial(arm, [0], nothing, tmp_path / "12" / "none" / "step-q" / "seeds-0-0")[0]
    assert empty.means()["pairs"] == 0 and np.isnan(empty.metrics["pair accuracy"]).all()
    assert paper_12.EPISODES == 400
