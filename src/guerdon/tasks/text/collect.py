"""Collecting trajectories: policies act in an environment in words, and what they did becomes a store and feedback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guerdon.errors import ConfigError, DataError
from guerdon.feedback.writers import write_feedback
from guerdon.language.sampling.base import Sampling
from guerdon.plugins import import_function
from guerdon.tasks.collect import kept
from guerdon.tasks.text.agent import Agent, LanguageAgent, Random, Scripted, play
from guerdon.tasks.text.names import make_text
from guerdon.tasks.text.trajectories import FEEDBACK, Store, Trajectory, check_kinds, collection_of

if TYPE_CHECKING:
    from guerdon.language.policy import Policy


def collect(
    env: str,
    *,
    policies: Sequence[str],
    out: str | Path,
    episodes: int,
    n: int = 1,
    split: str = "train",
    noise: float = 0.0,
    thoughts: bool = False,
    feedback: Sequence[str] = (),
    sampling: Sampling,
    sampler: str = "local",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Let policies act in turn and add their episodes to the store `out`; see `guerdon.tasks.text.agent.play`.

    Called again with the same arguments after it was killed, it goes on where it stopped; with other arguments it adds
    to what is there. Each kind of `feedback` is made of the whole store and written beside it, `NAME.KIND.jsonl`.

    Args:
        env: spec of the environment, see `make_text`.
        policies: `random`, `scripted`, `python:module.function` (which makes an `Agent`), language models, or addresses
            of black-box ones as `guerdon.llm.make_client` takes them.
        episodes: of all policies together.
        feedback: names of `FEEDBACK`.

    Returns:
        Plain data: `episodes`, `resumed` (found in the store), `others` (episodes of other collections in it), `steps`,
        `return` (mean), `success` and `admissible` (shares of episodes and of actions), `policies` (name -> the same
        four), `shortened` (conversations of which a policy did not see the whole), `feedback` (file -> rows).

    Raises:
        ConfigError: an environment, policy, split or kind that there is not.
        DataError: a store that cannot be read, or feedback that cannot be made because the episodes say nothing of it.
    """
    check_kinds(feedback)
    if not 0 <= noise <= 1:
        raise ConfigError(f"noise is {noise}: it is the chance of a random action, from 0 to 1.")
    store = Store(out)
    first = make_text(env)
    first.tasks(split)  # type: ignore[arg-type]
    agents = [make_agent(name, sampling, sampler) for name in policies]
    collection = collection_of(env, split, [agent.identity for agent in agents], n, noise, thoughts, seed)
    whole = list(store)
    ours = [t for t in whole if t.collection == collection and t.index < episodes]
    there = {t.index for t in ours}
    resumed = len(there)
    progress(resumed, episodes)
    made = iter([first])
    with kept(store.path):
        for trajectory in play(
            lambda: next(made, None) or make_text(env),
            agents,
            [index for index in range(episodes) if index not in there],
            split=split,
            n=n,
            noise=noise,
            thoughts=thoughts,
            seed=seed,
            collection=collection,
        ):
            store.append(trajectory)
            whole.append(trajectory)
            ours.append(trajectory)
            progress(len(ours), episodes)
    files = {}
    for kind in feedback:
        rows = FEEDBACK[kind](whole)
        if not rows:
            raise DataError(f"{store.path}: the episodes make no {kind} feedback: {_WHY[kind]}.")
        file = store.path.with_name(f"{store.path.stem}.{kind}.jsonl")
        files[str(file)] = write_feedback(file, rows)
    names = dict.fromkeys(agent.name for agent in agents)
    return {
        "episodes": len(ours),
        "resumed": resumed,
        "others": len(whole) - len(ours),
        **_summary(ours),
        "policies": {name: _summary([t for t in ours if t.policy == name]) for name in names},
        "shortened": sum(getattr(agent, "shortened", 0) for agent in agents),
        "feedback": files,
    }


_WHY = {
    "sft": "none succeeded",
    "sft-each": "none succeeded",
    "preference": "no task has two with different returns, which more episodes of each task (--n) may bring",
    "step-preference": "no history has two actions with different returns, which more episodes of each task may bring",
    "unpaired": "no agent said anything",
    "scored": "no agent said anything",
}


def make_agent(name: str, sampling: Sampling, sampler: str = "local") -> Agent:
    """The agent that a name stands for; see `collect`. `sampler` is as `make_sampler` takes it.

    Raises:
        ConfigError: there is no such model, address, function or sampler.
    """
    if (agent := other_agent(name, sampling)) is not None:
        return agent
    from guerdon.language.policy import Policy

    return language_agent(Policy.load(name), name, sampling, sampler)


def other_agent(name: str, sampling: Sampling) -> Agent | None:
    """The agent that a name stands for where that is no language policy of this process; see `make_agent`."""
    if name == "random":
        return Random()
    if name == "scripted":
        return Scripted()
    if name.startswith("python:"):
        agent: Agent = import_function(name.removeprefix("python:"))()
        for part in ("name", "identity", "propose"):
            if not hasattr(agent, part):
                what = f"{name} gives {type(agent).__name__}, which has no '{part}'"
                raise ConfigError(f"{what}: `guerdon.tasks.text.agent.Agent` says what an agent is.")
        return agent
    if name.startswith(("http://", "https://", "cassette:")):
        from guerdon.tasks.text.clients import ClientAgent

        return ClientAgent.load(name, sampling)
    return None


def language_agent(policy: Policy, name: str, sampling: Sampling, sampler: str = "local") -> LanguageAgent:
    """A language policy as an agent; see `make_agent`."""
    from guerdon.language.models import fingerprint, learned_positions
    from guerdon.language.sampling import make_sampler
    from guerdon.language.templates import stop_ids

    tokenizer, model = policy.tokenizer, policy.model.model
    return LanguageAgent(
        name,
        make_sampler(sampler, policy.model, tokenizer, stop_ids(tokenizer, model)),
        tokenizer,
        sampling,
        identity=[fingerprint(model), asdict(sampling)],
        context=learned_positions(model) or getattr(model.config, "max_position_embeddings", None),
    )


def _summary(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    steps = [step for t in trajectories for step in t.steps]
    return {
        "steps": len(steps),
        "return": float(np.mean([t.total for t in trajectories])),
        "success": float(np.mean([t.success for t in trajectories])),
        "admissible": float(np.mean([step.admissible for step in steps])),
    }
