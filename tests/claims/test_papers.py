"""What the trials of the claims measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guerdon.claims import get_claim, paper_62
from guerdon.claims.paper_56 import trial
from guerdon.claims.training import late_returns, learned, shared, trained
from guerdon.errors import GuerdonError
from guerdon.methods.demonstrations.sft import SFT
from guerdon.training.rundir import RunDir


def run_with(tmp_path, returns: list[list[float]], counts: list[list[float]]) -> RunDir:
    run = RunDir.create(tmp_path / "run", "stream-q", {}, {})
    for i, (mean, count) in enumerate(zip(returns, counts, strict=True)):
        run.append(10 * (i + 1), {"episode/return": mean, "episode/count": count})
    return run


def test_late_returns_are_those_of_the_last_episodes_and_count_each_once(tmp_path):
    run = run_with(
        tmp_path,
        [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 30.0], [10.0, float("nan")]],
        [[9, 9], [9, 9], [9, 9], [3, 1], [1, 0]],
    )
    assert late_returns(run, [5, 6], 0.4) == pytest.approx([(3 * 4 + 10) / 4, 30.0])
    assert late_returns(run, [5], 0.2) == pytest.approx([10.0])
    with pytest.raises(GuerdonError, match="no episode of seed 6 ended in the last 20%"):
        late_returns(run, [5, 6], 0.2)


@pytest.mark.slow
def test_streaming_trains_its_seeds_in_one_run(tmp_path):
    arm = get_claim(56).arms["stream-q"]
    settings = {"env": "CartPole-v1", "steps": 500}
    found = trial(arm, range(3, 5), settings, tmp_path)
    assert list(found) == [3, 4]
    run = RunDir.open(tmp_path / "run")
    assert run.config["training"]["seeds"] == 2 and run.config["options"]["hidden"] == [32, 32]
    for i, evaluation in enumerate(found.values()):
        late = [row for row in run.metrics(i) if row["step"] > 400 and row["episode/count"]]
        total = sum(row["episode/return"] * row["episode/count"] for row in late)
        assert evaluation.means()["return"] == pytest.approx(total / sum(row["episode/count"] for row in late))
    again = trial(arm, range(3, 5), settings, tmp_path)  # of the finished run
    assert [e.means() for e in again.values()] == [e.means() for e in found.values()]


def test_a_trial_that_fails_says_why(tmp_path):
    with pytest.raises(GuerdonError, match=r"train: exit status 2\n.*lr=1 is a step size for ObGD"):
        trained("stream-q", {"optimizer": "sgd"}, {"env": "CartPole-v1", "max_samples": 10, "seed": 0}, tmp_path)


def test_trials_share_what_they_need_and_train_it_once(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    policies, times = [], []
    for arm, seed in (("a", 0), ("b", 0), ("a", 1)):
        with shared(tmp_path / "11/here" / arm / f"seeds-{seed}-{seed}", seed=seed, size=3) as place:
            options = {"model": "tiny:layers=1,width=16,heads=2", "data": str(tmp_path / "data.jsonl"), "seed": seed}
            policies.append(learned(SFT(max_length=32), place / "sft", **options))
            times.append((place / "sft/policy/model.safetensors").stat().st_mtime_ns)
    assert policies[0] == policies[1] != policies[2] and times[0] == times[1]
    assert RunDir.open(place / "sft").status["state"] == "done"


def test_on_policy_negative_aware_learning_has_the_gradient_of_dr_grpo():
    rng = torch.Generator().manual_seed(0)
    correct = (torch.rand(6, 8, 1, generator=rng) < 0.5).float()
    pass_rate = correct.mean(1, keepdim=True).expand_as(correct)
    gradients = []
    for arm in ("nft", "dr-grpo"):
        log_ratio = torch.zeros(6, 8, 2, requires_grad=True)
        paper_62.answer_loss(get_claim(62).arms[arm], log_ratio, correct, pass_rate).backward()
        gradients.append(log_ratio.grad)
    assert torch.allclose(*gradients, atol=1e-7) and gradients[0].abs().max() > 0


def test_rejection_fine_tuning_learns_from_right_answers_alone():
    correct = torch.tensor([[[1.0], [0.0]]])
    log_ratio = torch.zeros(1, 2, 2, requires_grad=True)
    paper_62.answer_loss(get_claim(62).arms["rft"], log_ratio, correct, torch.full((1, 2, 1), 0.5)).backward()
    assert torch.equal(log_ratio.grad, torch.tensor([[[-0.5, -0.5], [0.0, 0.0]]]))


@pytest.mark.parametrize(("right", "size", "count"), [("many", 6, 12), ("one", 7, 1)])
def test_worlds_have_the_right_answers_that_they_should(right, size, count):
    right_answers = paper_62.world(size, right, torch.Generator().manual_seed(1))
    x = torch.randn(200, paper_62.WIDTH, generator=torch.Generator().manual_seed(2))
    found = right_answers(x)
    assert found.shape == (200, size, size) and (found.sum((1, 2)) == count).all()
    assert len(found.flatten(1).unique(dim=0)) >= 3
    weights = [torch.zeros(size, 12), torch.zeros(size, size, 12)]
    first, second = paper_62.token_logps(weights, x)
    assert float((first[:, :, None] + second).exp()[found].sum()) / 200 == pytest.approx(count / size**2, rel=1e-5)
    answers = torch.tensor([[size + 2]]).expand(200, 1)
    first[:, 1], second[:, 1, 2] = -3.0, -4.0
    assert paper_62.chosen_logps(first, second, answers)[0, 0].tolist() == [-3.0, -4.0]


def test_learning_raises_the_probability_of_a_right_answer():
    settings = get_claim(62).version(quick=True)["many-answers"]
    learned = paper_62.trial(get_claim(62).arms["nft"], [0, 1], settings, None)
    assert np.mean([e.means()["reward"] for e in learned.values()]) > 0.6  # a third of the answers are right
