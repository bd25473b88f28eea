"""Sheet of step-level Q-value models (arXiv 2409.09345): its numbers and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from guerdon.language.forward import Outputs
from guerdon.language.groups import Group
from guerdon.language.packing import pack
from guerdon.methods.planning.mcts import MCTS, Node, back_up, uct
from guerdon.methods.planning.step_q import q_values
from guerdon.methods.preferences.dpo import DPO, implicit_rewards, preference_loss


def root_with(children: dict[str, list[float]]) -> Node:
    """A root whose children have had these returns, one rollout for each."""
    root = Node(None, "")
    for name, returns in children.items():
        child = Node(name, "", depth=1, parent=root)
        root.children.append(child)
        for ret in returns:
            back_up(Node("end", "", reward=ret, depth=2, over=True, parent=child), MCTS())
    return root


def test_1_backpropagation_and_the_two_forms_of_uct():
    root = root_with({"A": [1, 0, 1], "B": [0]})
    a, b = root.children
    assert (a.visits, b.visits, root.visits) == (3, 1, 4)
    assert (a.value, b.value, root.value) == pytest.approx((2 / 3, 0, 0.5))
    proper = [uct(child.value, child.visits, root.visits) for child in (a, b)]
    divided = [uct(child.value, child.visits, root.visits, divide=True) for child in (a, b)]
    assert proper == pytest.approx([1.628018, 1.665109], abs=1e-6)
    assert divided == pytest.approx([1.183573, 1.665109], abs=1e-6)
    assert proper[1] - proper[0] == pytest.approx(0.037, abs=5e-4)
    assert divided[1] - divided[0] == pytest.approx(0.482, abs=5e-4)


def test_2_step_dpo():
    logps = torch.tensor([-10.0, -9.0], dtype=torch.float64, requires_grad=True)
    rewards = implicit_rewards(logps - torch.tensor([-12.0, -8.0]), torch.ones(2), beta=0.05)
    loss = preference_loss(rewards[:1], rewards[1:], beta=0.05).sum()
    loss.backward()
    assert (rewards[0] - rewards[1]).item() == pytest.approx(0.15)
    assert loss.item() == pytest.approx(0.620957, abs=1e-6)
    assert logps.grad.tolist() == pytest.approx([-0.0231285, 0.0231285], abs=1e-7)


def test_2_it_is_the_loss_that_the_method_takes_of_a_group():
    group = Group.of([1], [[2, 3], [4]], pairs=[(0, 1)])
    for segment, ref in zip(group.segments[1:], ([-7.0, -5.0], [-8.0]), strict=True):
        segment.values["ref_logps"] = np.array(ref, np.float32)
    method = DPO(beta=0.05)
    batch = pack([group], totals=method.totals([group]))
    logps = torch.tensor([-6.0, -4.0, -9.0], requires_grad=True)
    loss, metrics = method.loss(Outputs(logps=logps), batch)
    loss.backward()
    assert loss.item() == pytest.approx(0.620957, abs=1e-6)
    assert metrics["preference/margin"].item() == pytest.approx(0.15, abs=1e-6)
    assert logps.grad.tolist() == pytest.approx([-0.0231285, -0.0231285, 0.0231285], abs=1e-6)


def test_3_scores_are_true_log_ratios():
    policy, ref = torch.tensor([[2.0, 0, -1], [0.5, 1, 0]]), torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    action = torch.tensor([[0], [1]])
    logps, ref_logps = (x.log_softmax(-1).gather(1, action)[:, 0].numpy() for x in (policy, ref))
    assert (logps - ref_logps).tolist() == pytest.approx([0.381599, 0.871175], abs=1e-6)
    assert q_values([logps], [ref_logps], beta=1.0)[0] == pytest.approx(1.252774, abs=1e-6)
    assert q_values([logps], [ref_logps], beta=0.1)[0] == pytest.approx(0.1252774, abs=1e-7)
    shortcut = (policy - ref).log_softmax(-1).gather(1, action)[:, 0]
    assert shortcut.tolist() == pytest.approx([-0.407606, -0.554957], abs=1e-6)
    assert shortcut.mean().item() == pytest.approx(-0.481281, abs=1e-6)


def test_4_the_reduction_decides_between_long_and_short_actions():
    ratios = [np.full(3, 0.4), np.array([0.9])]
    nothing = [np.zeros(3), np.zeros(1)]
    assert q_values(ratios, nothing, beta=1.0).tolist() == pytest.approx([1.2, 0.9])
    assert q_values(ratios, nothing, beta=1.0, reduction="mean").tolist() == pytest.approx([0.4, 0.9])


def test_5_where_the_policy_is_its_start_all_actions_are_worth_the_same():
    logps = [np.array([-1.0, -2.0]), np.array([-0.5])]
    values = q_values(logps, logps)
    assert values.tolist() == [0.0, 0.0] and int(np.argmax(values)) == 0
    assert DPO().start_loss() == pytest.approx(math.log(2))
