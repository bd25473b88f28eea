"""A chain whose preferences come from searches of its own policy: agent, trees, Q."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from guerdon import chains
from guerdon.api import evaluate
from guerdon.chains import Search, plan, read_chain
from guerdon.errors import ConfigError, DataError
from guerdon.evaluation.metrics import load_evaluations
from guerdon.methods.planning.step_q import QModel
from guerdon.methods.planning.trees import Trees
from guerdon.tasks.text.agent import opening

ROOT = Path(__file__).parent.parent
ENV = "text:keys:?depth=1&actions=3"
SEARCH = {"trees": 6, "iterations": 6, "candidates": 3, "max_depth": 1, "max_length": 300, "max_new_tokens": 4}


def chain(directory: Path, **search: Any) -> Path:
    """A recipe, and demonstrations of an agent that knows the words and nothing more."""
    env = chains.make_text(ENV.removeprefix("text:"))
    rows = []
    for task in env.tasks("train"):
        observation, info = env.reset(seed=0, options={"task": task})
        for action in info["actions"]:
            said = {"role": "assistant", "content": action}
            rows.append({"prompt": [opening(env, observation)], "completion": [said]})
    (directory / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {
        "training": {
            "model": "tiny:layers=1,width=32,heads=2,vocab=word,context=300",
            "threads": 1,
            "env": ENV,
            "eval_samples": 2,
            "eval_max_new_tokens": 4,
        },
        "stages": [
            {
                "name": "agent",
                "method": "sft",
                "options": {"lr": 3e-2, "batch_size": 8, "epochs": 20, "max_length": 300},
                "training": {"data": str(directory / "steps.jsonl"), "holdout": 0},
            },
            {"name": "trees", "method": "mcts", "options": SEARCH | search},
            {
                "name": "q",
                "method": "dpo",
                "options": {"lr": 1e-3, "batch_size": 8, "epochs": 2, "max_length": 300},
                "training": {
                    "data": {"stage": "trees"},
                    "holdout": 0,
                    "eval_agent": {"stage": "agent"},
                    "eval_candidates": 3,
                },
            },
        ],
    }
    path = directory / "chain.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def test_an_agent_its_trees_and_a_q_that_chooses_for_it(tmp_path: Path) -> None:
    run = chains.start(chain(tmp_path), {"out": str(tmp_path / "runs")})
    trees = list(Trees(tmp_path / "runs" / "2-trees" / "trees.jsonl"))
    assert len(trees) == 6 and run.path.name == "3-q"
    found = load_evaluations(run.path / "evaluation.json")[0]
    assert found.primary == "success" and found.settings["agent"].endswith("guided by Q")
    assert found.settings["eval_candidates"] == 3 and len(found.items) == 2
    again = evaluate(run.path)[0]
    assert again.means() == found.means()
    q = QModel.load(run.path)
    pair = json.loads((tmp_path / "runs" / "2-trees" / "trees.step-preference.jsonl").read_text().splitlines()[0])
    values = q.score(pair["prompt"], [pair[side][0]["content"] for side in ("chosen", "rejected")])
    assert q.beta == 0.1 and q.max_length == 300 and values[0] > values[1]
    assert chains.resume(tmp_path / "runs").path == run.path


def test_trees_without_what_is_asked_of_them_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stage 'trees': the trees in .* give no step-preference: search more"):
        chains.start(chain(tmp_path, trees=1, iterations=1, min_gap=5.0), {"out": str(tmp_path / "runs")})


@pytest.mark.parametrize(
    ("training", "options", "message"),
    [
        ({"env": None}, {}, "mcts searches the tasks of an environment: give env, and neither task nor data"),
        ({"data": "x.jsonl"}, {}, "mcts searches the tasks of an environment"),
        ({}, {"iterations": 0}, "iterations is 0"),
        ({}, {"feedback": "all"}, "'feedback' has to be one of step-preference, preference, sft"),
        ({}, {"temperature": -1}, "temperature is -1"),
    ],
)
def test_searches_that_cannot_be(tmp_path: Path, training: dict, options: dict, message: str) -> None:
    said = read_chain(chain(tmp_path, **options))
    said["stages"][1]["training"] = training
    with pytest.raises(ConfigError, match=message):
        plan({**said, "given": {}}, tmp_path / "runs", "recipe")


def test_options_of_a_search_go_to_it(tmp_path: Path) -> None:
    stages = plan({**read_chain(chain(tmp_path, weight=2.5, divide=True)), "given": {}}, tmp_path / "runs", "recipe")
    work = stages[1].work
    assert isinstance(work, Search) and (work.weight, work.divide, work.candidates) == (2.5, True, 3)
    assert stages[2].training.data == str(tmp_path / "runs" / "2-trees" / "trees.step-preference.jsonl")
    assert stages[2].training.eval_agent == str(tmp_path / "runs" / "1-agent" / "policy")


def test_the_data_of_the_laptop_recipe_is_made_by_its_script(tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "recipes" / "make_keys.py"))
    made["main"](tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "demonstrations.jsonl").open()]
    assert len(rows) == 3 * made["EPISODES"]
    right = sum(
        row["prompt"][0]["content"].split("The keys are ")[1].split(".")[0].split(" and ")[len(row["prompt"]) // 2 % 2]
        == row["completion"][0]["content"].split()[1]
        for row in rows
    )
    assert abs(right / len(rows) - 9 / 16) < 0.03
