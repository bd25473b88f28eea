"""Judging control policies: episodes that start alike for every policy, one evaluation for each seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from guerdon.errors import ConfigError
from guerdon.evaluation.metrics import EVALUATION, Evaluation, save_evaluations
from guerdon.training.config import ControlTraining

if TYPE_CHECKING:
    from guerdon.control.policy import ControlPolicy
    from guerdon.training.control import ControlRun


def evaluate_policies(policy: ControlPolicy, env: str, episodes: int) -> dict[int, Evaluation]:
    """Seed -> what its policy reached in `episodes` episodes; the return decides.

    Episode e starts from the same state for every policy. The policies act greedily.
    """
    from guerdon.control.rollout import evaluate

    found = {{"length": "steps"}.get(name, name): values for name, values in evaluate(policy, env, episodes).items()}
    items = [f"episode {e}" for e in range(episodes)]
    settings = {"env": env, "episodes": episodes}
    return {
        seed: Evaluation(items, {name: values[i] for name, values in found.items()}, "return", settings)
        for i, seed in enumerate(policy.seeds)
    }


def evaluate_control(policy: str | Path, config: ControlTraining) -> dict[int, Evaluation]:
    """Judge the policies of a run, or `random`, in `config.env`; `ConfigError` where nothing says which that is."""
    from guerdon.control.policy import ControlPolicy
    from guerdon.control.rollout import random_policy

    if str(policy) == "random":
        env = config.env or _data_env(config)
        judged = random_policy(env, list(range(config.seed, config.seed + config.seeds)))
    else:
        judged = ControlPolicy.load(policy)
        env = config.env or judged.env or _data_env(config)
    return evaluate_policies(judged, env, config.eval_episodes)


def _data_env(config: ControlTraining) -> str:
    from guerdon.control.datasets import read_transitions

    env = read_transitions(config.data).env if config.data else None
    if env is None:
        raise ConfigError("evaluate: nothing says which environment the policy is judged in: give --env.")
    return env


def evaluate_control_run(run: ControlRun) -> dict[str, list[float]]:
    """Judge a run's policies and write `evaluation.json` into its directory; means as lists over the seeds."""
    found = evaluate_policies(run.policy, str(run.env), run.config.eval_episodes)
    save_evaluations(run.directory / EVALUATION, found)
    rows = [evaluation.means() | {"score": evaluation.means()[evaluation.primary]} for evaluation in found.values()]
    return {f"eval/{name}": [row[name] for row in rows] for name in rows[0]}
