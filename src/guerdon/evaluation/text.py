"""Judging agents in environments in words: episodes that begin alike for all of them, one item for each task."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from guerdon.evaluation.metrics import Evaluation
from guerdon.language.sampling.base import Sampling
from guerdon.methods.planning.step_q import QGuidedAgent, QModel, Voting
from guerdon.tasks.text import make_text
from guerdon.tasks.text.agent import Agent, play
from guerdon.tasks.text.collect import language_agent, make_agent, other_agent
from guerdon.tasks.text.trajectories import Trajectory
from guerdon.training.config import TEXT, LanguageTraining

if TYPE_CHECKING:
    from guerdon.evaluation.evaluate import Annotate
    from guerdon.language.policy import Policy


def judge_agent(agent: Agent, how: LanguageTraining) -> Evaluation:
    """Success (primary), return, steps, share of admissible actions in `how.eval_samples` episodes of each test task.

    Tasks and chance are the same for every agent and seed; of the tasks there are at most `how.eval_items`.
    """
    env = str(how.env).removeprefix(TEXT)
    first = make_text(env)
    free = iter([first])
    episodes = range(min(how.eval_items, len(first.tasks("test"))) * how.eval_samples)
    played = play(lambda: next(free, None) or make_text(env), [agent], episodes, split="test", n=how.eval_samples)
    by_task = {task: list(group) for task, group in groupby(played, key=lambda episode: episode.task)}
    each: dict[str, Callable[[Trajectory], float]] = {
        "success": lambda episode: episode.success,
        "return": lambda episode: episode.total,
        "steps": lambda episode: len(episode.steps),
        "admissible": lambda episode: float(np.mean([step.admissible for step in episode.steps])),
    }
    metrics = {name: np.array([np.mean([*map(value, t)]) for t in by_task.values()]) for name, value in each.items()}
    settings = {name: value for name, value in vars(how).items() if name == "env" or name.startswith("eval_")}
    return Evaluation(list(by_task), metrics, "success", settings | {"agent": agent.name})


def other_agent_of(name: str, how: LanguageTraining) -> Agent | None:
    """The agent of that name, where it is not a language policy: random, scripted, an address."""
    return other_agent(name, _sampling(how))


def agent_of(policy: Policy, start: Annotate, how: LanguageTraining, max_length: int) -> Agent:
    """How a policy takes part: it acts, or, where `how.eval_agent` acts, it chooses among that agent's replies by Q.

    Args:
        start: sets the log-probs of the policy that training started from, see `QModel`.
        max_length: tokens of a history with a reply, for Q.
    """
    if how.eval_agent is not None:
        agent = make_agent(how.eval_agent, _sampling(how), how.sampler)
        return QGuidedAgent(agent, QModel(policy, start, max_length=max_length), how.eval_candidates)
    acting = language_agent(policy, how.model, _sampling(how))
    return Voting(acting, how.eval_candidates) if how.eval_choose == "vote" else acting


def _sampling(how: LanguageTraining) -> Sampling:
    return Sampling(max_new_tokens=how.eval_max_new_tokens, temperature=how.eval_temperature)
