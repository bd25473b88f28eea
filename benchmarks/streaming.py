"""Streaming learners against the official code of their paper: environment steps per second on one core.

    python -m benchmarks.streaming --official DIRECTORY

DIRECTORY is a checkout of github.com/mohmdelsayed/streaming-drl. That code is CC BY-NC: it is run here from where the
user put it, and is no part of guerdon. Both sides act in Gymnasium environments and learn from every step; ours is the
method's loop as users run it. First, the same initial weights and the same transitions must lead to the same weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common

STEPS = 2000  # of the environment in one timed step
BARS = {("q", "CartPole-v1"): 8.0, ("ac", "Pendulum-v1"): 8.0, ("ac", "Hopper-v5"): 8.0}
EPSILON = 0.01
HORIZON = 10_000_000  # of the exploration schedule, both sides: so far off that it does not move


def official_env(env_id: str) -> Any:
    """The environment as the paper's experiments wrap it: true returns inside, scaled rewards, normalised features."""
    import gymnasium
    from normalization_wrappers import NormalizeObservation, ScaleReward
    from time_wrapper import AddTimeInfo

    env = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make(env_id))
    if isinstance(env.action_space, gymnasium.spaces.Box):
        env = gymnasium.wrappers.ClipAction(env)
    return AddTimeInfo(NormalizeObservation(ScaleReward(env, gamma=0.99)))


def official_agent(kind: str, env: Any) -> Any:
    import stream_ac_continuous
    import stream_q

    width = env.observation_space.shape[0]
    if kind == "q":
        options = {"epsilon_start": EPSILON, "epsilon_target": EPSILON, "total_steps": HORIZON}
        return stream_q.StreamQ(n_obs=width, n_actions=int(env.action_space.n), **options)
    return stream_ac_continuous.StreamAC(n_obs=width, n_actions=env.action_space.shape[0])


def official(directory: str, kind: str, env_id: str) -> Callable[[], float]:
    sys.path.insert(0, directory)
    import torch

    torch.manual_seed(0)
    np.random.seed(0)
    env = official_env(env_id)
    agent = official_agent(kind, env)
    obs = env.reset(seed=0)[0]

    def step() -> float:
        nonlocal obs
        for _ in range(STEPS):
            obs = official_step(kind, agent, env, obs)[0]
        return 0.0

    return step


def official_step(kind: str, agent: Any, env: Any, obs: Any) -> tuple[Any, Any, bool]:
    """Act once and learn from it; the next observation, the action, and whether it explored."""
    chosen = agent.sample_action(obs)
    action, explored = chosen if kind == "q" else (chosen, False)
    seen, reward, terminated, truncated, _ = env.step(action)
    agent.update_params(obs, action, reward, seen, terminated or truncated, explored if kind == "q" else 0.01)
    return (env.reset()[0] if terminated or truncated else seen), action, explored


def ours(kind: str, env_id: str, seeds: int) -> Callable[[], float]:
    from guerdon.methods.base import get_method
    from guerdon.training.config import ControlTraining
    from guerdon.training.control import ControlRun
    from guerdon.training.distributed import Distribution

    options = {"epsilon_start": EPSILON, "epsilon_end": EPSILON} if kind == "q" else {}
    method = get_method(f"stream-{kind}")(**options)
    config = ControlTraining(env=env_id, max_samples=HORIZON, seeds=seeds, log_every=STEPS, checkpoint_every=0)
    run = ControlRun(method, config, Distribution(), Path(tempfile.mkdtemp()))
    method.setup(run)
    steps = method.learn(run)

    def step() -> float:
        next(steps)
        return 0.0

    return step


def agreement(kind: str, env_id: str, steps: int) -> dict[str, Any]:
    """Run the official agent, and ours on the same raw transitions and actions from the same initial weights.

    Returns:
        `steps`, and the first of them at which any weight, or a greedy action, differed: None if none did.
    """
    import gymnasium
    import torch

    from guerdon.control.ingredients import ActorCriticIngredients, ValueIngredients
    from guerdon.control.simulators import spec_of
    from guerdon.control.streaming.learners import KernelLearner
    from guerdon.control.streams import Streams

    class Recorded(gymnasium.Wrapper):
        """Keeps what the environment really said."""

        def step(self, action: Any) -> Any:
            self.last = self.env.step(action)
            return self.last

        def reset(self, **options: Any) -> Any:
            self.first = self.env.reset(**options)
            return self.first

    torch.manual_seed(0)
    np.random.seed(0)
    env = official_env(env_id)
    inner = env
    while not isinstance(inner.env, gymnasium.wrappers.RecordEpisodeStatistics):
        inner = inner.env
    raw = inner.env = Recorded(inner.env)
    agent = official_agent(kind, env)
    limit = raw.spec.max_episode_steps
    learner = KernelLearner(
        kind,
        ValueIngredients() if kind == "q" else ActorCriticIngredients(),
        spec_of(raw.unwrapped),
        Streams([0]),
        time_limit=limit,
    )

    def weights() -> dict[str, np.ndarray]:
        """The official networks' parameters in our order, the two heads of the actor being one."""
        named = {name: p.detach().numpy() for name, p in agent.named_parameters()}
        if kind == "q":
            return {"value": np.concatenate([p.ravel() for p in named.values()])}
        policy = [p for name, p in named.items() if name.startswith("policy")]
        heads = [np.concatenate([policy[4], policy[6]]), np.concatenate([policy[5], policy[7]])]
        value = [p for name, p in named.items() if name.startswith("value")]
        parts = {"policy": [*policy[:4], *heads], "value": value}
        return {name: np.concatenate([p.ravel() for p in part]) for name, part in parts.items()}

    for name, net in learner.nets.items():
        net.rows[0, 0] = weights()[name]
    obs = env.reset(seed=0)[0]
    greedy = learner.begin(np.float32(raw.first[0])[None])
    first: dict[str, int | None] = {"weights": None, "actions": None}
    for t in range(steps):
        seen, action, explored = official_step(kind, agent, env, obs)
        if kind == "q":
            if first["actions"] is None and not explored and int(greedy[0]) != int(action):
                first["actions"] = t
            learner.explored[0] = explored
        learner.action[0] = action
        final, reward, terminated, truncated, _ = raw.last
        shown = raw.first[0] if terminated or truncated else final
        greedy = learner.step(
            np.float32(shown)[None],
            np.array([reward], np.float32),
            np.array([terminated]),
            np.array([truncated]),
            np.float32(final)[None],
        )
        obs = seen
        apart = max(np.abs(learner.nets[name].rows[0, 0] - w).max() for name, w in weights().items())
        if first["weights"] is None and not apart <= common.TOLERANCE:
            first["weights"] = t
            break
    return {"steps": steps, "tolerance": common.TOLERANCE, "first_apart": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", required=True, help="a checkout of mohmdelsayed/streaming-drl")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on each side")
    parser.add_argument("--repeats", type=int, default=7, help="counted steps of each side")
    parser.add_argument("--agree", type=int, default=5000, help="steps over which trajectories are compared")
    options = parser.parse_args()
    sys.path.insert(0, options.official)
    results = {}
    for (kind, env_id), bar in BARS.items():
        equality = agreement(kind, env_id, options.agree)
        sides = {"official": (official, options.official, kind, env_id)}
        row = common.compare((ours, kind, env_id, 1), sides, bar, options.threads, options.repeats)
        rates = {name: STEPS / taken[row["clock"]]["median"] for name, taken in row["steps"].items()}
        common.show(name := f"stream {kind} {env_id}", row)
        print(f"  steps/s: {', '.join(f'{side} {rate:,.0f}' for side, rate in rates.items())}; {equality}", flush=True)
        results[name] = {**row, "steps_per_second": rates, "equality": equality}
    common.save("streaming", options.threads, results)


if __name__ == "__main__":
    main()
