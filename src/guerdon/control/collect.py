"""Making logged transitions: policies act in an environment, and their episodes become a Minari dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from guerdon.control.minari_files import Episode, write_minari
from guerdon.control.policy import ControlPolicy
from guerdon.control.spaces import Spec
from guerdon.control.streams import generator_of
from guerdon.errors import ConfigError
from guerdon.plugins import import_function

Act = Callable[[np.ndarray], Any]  # an observation (*obs) to an action


def collect(
    env: str,
    *,
    policies: Sequence[str],
    out: str,
    episodes: int,
    noises: Sequence[float] = (0.0,),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Let policies act, each in an equal share of the episodes and in turn, so that the data set is their mixture.

    Args:
        env: id of the environment.
        policies: `random`; run directories, of whose seeds the episodes take turns (and of an unfinished run the
            checkpoints cannot be taken: finish it with fewer steps for a mediocre one); or `python:module.function`, a
            script that takes an observation and returns an action.
        out: `minari:NAME-v0`, or a directory; it appears whole or not at all.
        noises: chance that a step takes a uniformly random action instead: one for all policies, or one for each.
        seed: of resets and actions; the same call collects the same data.
        progress: is told after each episode how many there are, and of how many.

    Returns:
        `episodes`, `steps`, `return` (mean), and `policies`: name -> mean return of its episodes.

    Raises:
        ConfigError: an unknown policy or environment, policies of other environments, or noise that is no chance.
        DataError: `out` exists already.
    """
    from guerdon.control.simulators import make, spec_of

    if len(noises) not in (1, len(policies)):
        raise ConfigError(
            f"collect: {len(policies)} policies and {len(noises)} values of noise: give one, or one each."
        )
    if wrong := [noise for noise in noises if not 0 <= noise <= 1]:
        raise ConfigError(f"collect: noise is {wrong[0]}: it is the chance of a random action, from 0 to 1.")
    made = make(env)
    spec = spec_of(made)
    each = list(noises) if len(noises) > 1 else list(noises) * len(policies)
    actors = [(name, _actors(name, spec), noise) for name, noise in zip(policies, each, strict=True)]
    returns: dict[str, list[float]] = {name: [] for name in policies}
    steps = 0

    def played() -> Iterator[Episode]:
        nonlocal steps
        for index in range(episodes):
            name, acts, noise = actors[index % len(actors)]
            act = acts[index // len(actors) % len(acts)]
            rng = generator_of(seed, f"collect {index}")
            episode = _play(made, spec, act, noise, rng)
            returns[name].append(float(episode.rewards.sum()))
            steps += len(episode.rewards)
            yield episode
            progress(index + 1, episodes)

    try:
        write_minari(played(), out, spec, env, behaviour=", ".join(policies))
    finally:
        made.close()
    everything = [value for values in returns.values() for value in values]
    means = {name: float(np.mean(values)) for name, values in returns.items() if values}
    return {"episodes": episodes, "steps": steps, "return": float(np.mean(everything)), "policies": means}


def _actors(name: str, spec: Spec) -> list[Act | None]:
    """What acts in turn; None is blind chance."""
    if name == "random":
        return [None]
    if name.startswith("python:"):
        return [import_function(name.removeprefix("python:"))]
    if not ControlPolicy.is_at(name):
        raise ConfigError(
            f"collect: there is no policy '{name}': it is random, a run directory, or python:module.function."
        )
    policy = ControlPolicy.load(name)
    if (policy.spec.observation, policy.spec.discrete, policy.spec.actions) != (
        spec.observation,
        spec.discrete,
        spec.actions,
    ):
        raise ConfigError(
            f"collect: the policy of {name} is for {policy.env or 'another environment'}, not for this one."
        )

    def of(one: ControlPolicy) -> Act:
        return lambda obs: one.act(obs[None, None])[0, 0]

    return [of(policy.take(i)) for i in range(len(policy.seeds))]


def _play(env: Any, spec: Spec, act: Act | None, noise: float, rng: np.random.Generator) -> Episode:
    reset = int(rng.integers(2**31))
    obs, _ = env.reset(seed=reset)
    low, high = np.array(spec.low, np.float32), np.array(spec.high, np.float32)
    first = int(getattr(env.action_space, "start", 0))
    observations, actions, rewards = [obs], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        if act is None or (noise and rng.random() < noise):
            action: Any = (
                int(rng.integers(spec.actions)) if spec.discrete else rng.uniform(low, high).astype(np.float32)
            )
        else:
            action = act(obs)
            action = int(action) if spec.discrete else np.clip(action, low, high).astype(np.float32)
        taken = action + first if spec.discrete else action.reshape(env.action_space.shape)
        obs, reward, terminated, truncated, _ = env.step(taken)
        observations.append(obs)
        actions.append(action)
        rewards.append(float(reward))
    return Episode(np.array(observations), np.array(actions), np.array(rewards), terminated, truncated, reset)
