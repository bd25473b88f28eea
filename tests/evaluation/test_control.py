"""Control policies judged and compared: seeds in blocks, each with its own numbers, in real processes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import guerdon
from guerdon.cli import main
from guerdon.control.rollout import evaluate, random_policy
from guerdon.errors import ConfigError
from guerdon.evaluation.compare import _trials, compare, load_comparison, training_of
from guerdon.evaluation.control import evaluate_control, evaluate_policies
from guerdon.evaluation.metrics import load_evaluations, save_evaluations
from guerdon.evaluation.trials import Progress, guerdon_command
from guerdon.training.config import ControlTraining
from guerdon.training.rundir import RunDir

SETTINGS = {
    "methods": [
        {"label": "iql", "name": "iql", "options": {"hidden": []}},
        {"label": "bc", "name": "bc", "options": {}},
    ],
    "training": {"data": "d.npz", "env": "CartPole-v1", "corrupt": [], "compile": False},
    "budget": {"updates": 5},
}


def blocks(seeds: int, *looks: int) -> list[tuple[str, list[int], str]]:
    found = _trials({**SETTINGS, "seeds": seeds}, Path("out"), [{"seeds": look} for look in looks])
    return [(trial.label, list(trial.seeds), trial.directory.name) for trial in found]


def test_seeds_are_trained_together_and_later_ones_apart():
    assert blocks(3) == [("base", [0], "seed-0"), ("iql", [0, 1, 2], "seeds-0-2"), ("bc", [0, 1, 2], "seeds-0-2")]
    assert blocks(1)[1:] == [("iql", [0], "seed-0"), ("bc", [0], "seed-0")]
    assert blocks(5, 2, 2, 4) == [
        ("base", [0], "seed-0"),
        ("iql", [0, 1], "seeds-0-1"), ("bc", [0, 1], "seeds-0-1"),
        ("iql", [2, 3], "seeds-2-3"), ("bc", [2, 3], "seeds-2-3"),
        ("iql", [4], "seed-4"), ("bc", [4], "seed-4"),
    ]  # fmt: skip


def test_what_a_trial_is_started_with():
    base, iql, _ = _trials({**SETTINGS, "seeds": 2}, Path("out"), [])
    assert (base.start, base.name, iql.name) == ("random", "base", "iql seeds 0 to 1")
    command = guerdon_command(iql, "train")[3:]
    assert command[:2] == ["train", "iql"]
    flags = " ".join(command)
    assert "--max-updates 5 --seed 0 --seeds 2 --out out/trials/iql/seeds-0-1" in flags
    assert flags.endswith("--hidden")  # an empty tuple is told too, and is no default
    judged = guerdon_command(base, "evaluate")[3:]
    assert judged[:2] == ["evaluate", "random"] and "--max-updates" not in judged and "--model" not in judged


def test_one_kind_of_policy():
    assert training_of(["bc", "dqn"]) is ControlTraining
    with pytest.raises(ConfigError, match=r"bc a control policy and dpo a language policy"):
        training_of(["bc", "dpo"])


def test_evaluations_are_those_of_the_episodes(tmp_path):
    policy = random_policy("CartPole-v1", [3, 7])
    found = evaluate_policies(policy, "CartPole-v1", 5)
    raw = evaluate(random_policy("CartPole-v1", [3, 7]), "CartPole-v1", 5)
    assert list(found) == [3, 7]
    for index, seed in enumerate(found):
        np.testing.assert_array_equal(found[seed].metrics["return"], raw["return"][index])
        np.testing.assert_array_equal(found[seed].metrics["steps"], raw["length"][index])
        assert found[seed].primary == "return" and found[seed].items == [f"episode {e}" for e in range(5)]
        assert found[seed].settings == {"env": "CartPole-v1", "episodes": 5}
    assert not np.array_equal(found[3].metrics["return"], found[7].metrics["return"])

    save_evaluations(tmp_path / "evaluation.json", found)
    again = load_evaluations(tmp_path / "evaluation.json")
    assert list(again) == [3, 7]
    np.testing.assert_array_equal(again[7].metrics["return"], found[7].metrics["return"])
    save_evaluations(tmp_path / "evaluation.json", {7: found[7]})
    (alone,) = load_evaluations(tmp_path / "evaluation.json").values()
    np.testing.assert_array_equal(alone.metrics["return"], found[7].metrics["return"])


def test_blind_chance_is_judged_for_each_seed():
    config = ControlTraining(env="CartPole-v1", seed=2, seeds=2, eval_episodes=3)
    found = evaluate_control("random", config)
    assert list(found) == [2, 3] and all(5 < evaluation.means()["return"] < 100 for evaluation in found.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """CartPole as a fair script plays it, for 20 steps at a time."""
    import gymnasium

    env, rng, rows = gymnasium.make("CartPole-v1"), np.random.default_rng(0), []
    for episode in range(12):
        obs, _ = env.reset(seed=episode)
        for step in range(20):
            action = int(obs[2] + 0.5 * obs[3] > 0) if rng.random() < 0.9 else int(rng.integers(2))
            after, reward, terminated, _, _ = env.step(action)
            rows.append((obs, action, reward, after, terminated, step == 19))
            obs = after
            if terminated:
                break
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    path = tmp_path_factory.mktemp("data") / "cartpole.npz"
    np.savez(path, **{name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})
    return str(path)


@pytest.fixture
def source_in_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(guerdon.__file__).parents[1]))


@pytest.mark.slow
def test_a_comparison_of_offline_methods_is_enlarged_by_a_seed(tmp_path, data, source_in_path, capsys):
    (tmp_path / "slow.yaml").write_text("method: bc\noptions: {lr: 1.0e-9, hidden: []}\n")
    out = tmp_path / "comparison"
    argv = ["compare", "bc", str(tmp_path / "slow.yaml"), "--data", data, "--env", "CartPole-v1", "--out", str(out)]
    argv += ["--budget-updates", "150", "--log-every", "50", "--eval-episodes", "8", "--jobs", "2", "--json"]
    assert main([*argv, "--seeds", "2"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert {row["label"]: row["seeds"] for row in first["rows"]} == {"base": [0], "bc": [0, 1], "slow": [0, 1]}
    trials = {path.name for path in (out / "trials" / "bc").iterdir() if path.is_dir()}
    assert trials == {"seeds-0-1"}
    before = (out / "trials" / "bc" / "seeds-0-1.json").read_text()
    assert RunDir.open(out / "trials" / "slow" / "seeds-0-1").config["options"]["hidden"] == []

    assert main([*argv, "--seeds", "3"]) == 0
    printed, said = capsys.readouterr()
    started = sorted(re.findall(r"^(.*): train$", said, re.MULTILINE))
    assert started == ["bc seed 2", "slow seed 2"] and "evaluate" not in said
    assert (out / "trials" / "bc" / "seeds-0-1.json").read_text() == before
    second = {row["label"]: row for row in json.loads(printed)["rows"]}
    assert second["bc"]["seeds"] == second["slow"]["seeds"] == [0, 1, 2]
    assert second["bc"]["seed_scores"][:2] == next(r for r in first["rows"] if r["label"] == "bc")["seed_scores"]

    found = load_comparison(out)
    assert found.looks == [{"seeds": 2, "methods": ["bc", "slow"]}]
    row = next(row for row in found.rows if row.label == "bc")
    assert row.scores.shape == (3, 8) and row.directories[0] == row.directories[1] != row.directories[2]
    assert found.primary == "return"
    # What it costs is told for each seed: two that are trained together share their time.
    together = Progress.of(out / "trials" / "bc" / "seeds-0-1")
    assert row.costs[0]["cpu"] == row.costs[1]["cpu"] == pytest.approx(together.cpu / 2)
    # The scores are those that the policies of the block reach, seed by seed.
    for directory, seeds in (("seeds-0-1", [0, 1]), ("seed-2", [2])):
        judged = guerdon.load_policy(out / "trials" / "bc" / directory)
        assert judged.seeds == seeds
        returns = evaluate(judged, "CartPole-v1", 8)["return"]
        np.testing.assert_array_equal(row.scores[seeds], returns)

    page = guerdon.write_report(out).read_text()
    assert "bc, seed 0: an episode of" in page and "slow, seed 0: an episode of" in page
    assert any("enlarged after an earlier look (seeds then: 2)" in line for line in found.verdict)
    run = guerdon.write_report(out / "trials" / "bc" / "seeds-0-1").read_text()
    assert "finished after 150 updates" in run and "0 to 1" in run
    assert "The policies of its 2 seeds reach" in run


@pytest.mark.slow
def test_a_comparison_in_an_environment(tmp_path, source_in_path):
    found = compare(
        [
            {"name": "dqn", "options": {"learning_starts": 20, "hidden": [8]}},
            {"name": "stream-q", "options": {"hidden": [8]}},
        ],
        training={"env": "CartPole-v1", "eval_episodes": 4, "log_every": 100},
        seeds=2,
        budget={"samples": 200},
        out=tmp_path,
        jobs=2,
    )
    rows = {row.label: row for row in found.rows}
    assert set(rows) == {"base", "dqn", "stream-q"}
    for name in ("dqn", "stream-q"):
        assert not rows[name].failed, rows[name].failed
        assert rows[name].scores.shape == (2, 4)
        assert rows[name].costs[0]["samples"] == 200 and "tokens" not in rows[name].costs[0]
    assert rows["base"].scores.shape == (1, 4)
    run = guerdon.write_report(tmp_path / "trials" / "dqn" / "seeds-0-1").read_text()
    assert "finished after 200 environment steps" in run


def test_evaluate_prints_the_mean_and_every_seed(tmp_path, data, capsys):
    options = {
        "data": data,
        "max_updates": 3,
        "log_every": 3,
        "eval_episodes": 2,
        "hidden": (4,),
        "seeds": 2,
        "seed": 5,
    }
    guerdon.train("bc", **options, out=str(tmp_path / "run"))  # nothing says where it acts, so that nothing is judged
    assert not (tmp_path / "run" / "evaluation.json").exists()
    argv = ["evaluate", str(tmp_path / "run"), "--env", "CartPole-v1", "--json", "--eval-episodes", "3"]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["seeds"]) == ["5", "6"]
    assert told["return"] == pytest.approx(np.mean([told["seeds"][seed]["return"] for seed in "56"]))
    kept = load_evaluations(tmp_path / "run" / "evaluation.json")
    assert kept[6].means()["return"] == told["seeds"]["6"]["return"] and len(kept[5].items) == 3
