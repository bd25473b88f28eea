"""DQN and SAC against Stable-Baselines3 and CleanRL: environment steps per second, one update for each step.

    python -m benchmarks.control_online --cleanrl DIRECTORY

DIRECTORY is a checkout of github.com/vwxyzjn/cleanrl, whose scripts are run as they are; stable-baselines3 has to be
installed. All sides act in the same Gymnasium environment with the same networks, batches and updates; ours is the
method's loop as users run it. First, one update of Stable-Baselines3 and of ours from the same weights, on the same
batch and noise, must have the same losses. Last, eight seeds together against the same eight one after another, on one
thread and on all that there are.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import runpy
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import common

HORIZON = 10_000_000  # of schedules, all sides: so far off that nothing moves
SEEDS = 8
STEPS = {"dqn": 1000, "sac": 100}  # of the environment in one timed step; the first of these does not learn
ENV = {"dqn": "CartPole-v1", "sac": "Hopper-v5"}
SHAPES = {  # hidden layers and batch size; CleanRL's networks are fixed
    "dqn 120-84": ((120, 84), 128),
    "dqn 64-64": ((64, 64), 64),
    "sac 256-256": ((256, 256), 256),
}
SCRIPTS = {"dqn 120-84": "dqn.py", "sac 256-256": "sac_continuous_action.py"}
BAR, BAR_SEEDS = 2.0, 3.0
EPSILON, LR, BUFFER = 0.05, 2.5e-4, 100_000
Build = Callable[..., Callable[[], Any]]


def our_run(shape: str, like: str, seeds: tuple[int, ...], precision: str) -> tuple[Any, Any]:
    """A method and its run, set up to do what a peer does."""
    from guerdon.methods.base import get_method
    from guerdon.training.config import ControlTraining
    from guerdon.training.control import ControlRun
    from guerdon.training.distributed import Distribution

    kind, (hidden, batch) = shape.split()[0], SHAPES[shape]
    own: dict[str, Any] = {}
    if kind == "dqn":
        how = {"loss": "squared"} if like == "cleanrl" else {"max_grad_norm": 10.0}
        own = {"epsilon_start": EPSILON, "epsilon_end": EPSILON, **how}
    method = get_method(kind)(  # type: ignore[call-arg]
        hidden=hidden, batch_size=batch, buffer_size=BUFFER, learning_starts=STEPS[kind], lr=LR, **own
    )
    config = ControlTraining(
        env=ENV[kind],
        max_samples=HORIZON,
        seed=seeds[0],
        seeds=len(seeds),
        precision=precision,  # type: ignore[arg-type]
        log_every=STEPS[kind],
        checkpoint_every=0,
    )
    run = ControlRun(method, config, Distribution(), Path(tempfile.mkdtemp()))  # type: ignore[arg-type]
    method.setup(run)
    return method, run


def ours(shape: str, like: str, seeds: tuple[int, ...] = (0,), precision: str = "fp32") -> Callable[[], None]:
    method, run = our_run(shape, like, seeds, precision)
    common.OPEN.enter_context(run.threads())  # as in `guerdon train`
    steps = method.learn(run)

    def step() -> None:
        next(steps)

    step()
    return step


def one_after_another(shape: str, precision: str) -> Callable[[], None]:
    runs = [ours(shape, "sb3", (seed,), precision) for seed in range(SEEDS)]

    def step() -> None:
        for run in runs:
            run()

    return step


def sb3_model(shape: str, fused: bool) -> Any:
    """A model of Stable-Baselines3, with Adam as it comes or fused."""
    import stable_baselines3

    kind, (hidden, batch) = shape.split()[0], SHAPES[shape]
    own: dict[str, Any] = {"ent_coef": "auto"}
    if kind == "dqn":
        own = {"exploration_initial_eps": EPSILON, "exploration_final_eps": EPSILON, "target_update_interval": 500}
    return getattr(stable_baselines3, kind.upper())(
        "MlpPolicy",
        ENV[kind],
        batch_size=batch,
        buffer_size=BUFFER,
        learning_starts=STEPS[kind],
        learning_rate=LR,
        train_freq=1,
        gradient_steps=1,
        policy_kwargs={"net_arch": list(hidden), "optimizer_kwargs": {"fused": True} if fused else {}},
        device="cpu",
        seed=0,
        **own,
    )


def sb3(shape: str, fused: bool) -> Callable[[], None]:
    model, count = sb3_model(shape, fused), STEPS[shape.split()[0]]

    def step() -> None:
        model.learn(count, reset_num_timesteps=False)

    step()
    return step


def cleanrl(directory: str, shape: str) -> Callable[[], None]:
    """CleanRL's script in a thread; the loop over its steps waits wherever a timed step ends."""
    import gymnasium

    kind, (_, batch) = shape.split()[0], SHAPES[shape]
    begin, ended = threading.Semaphore(0), threading.Semaphore(0)

    def turns(n: int) -> Iterator[int]:
        for t in range(n):
            if t % STEPS[kind] == 0:
                if t:
                    ended.release()
                begin.acquire()
            yield t

    original = gymnasium.vector.SyncVectorEnv.step

    def with_final(self: Any, actions: Any) -> Any:
        """What Gymnasium before 1.0 told of ends: since then it is the observation itself that is the last one."""
        obs, reward, terminated, truncated, infos = original(self, actions)
        return obs, reward, terminated, truncated, {**infos, "final_observation": obs}

    gymnasium.vector.SyncVectorEnv.step = with_final
    own = {"q-lr": LR, "policy-lr": LR}
    if kind == "dqn":
        own = {"start-e": EPSILON, "end-e": EPSILON, "learning-rate": LR, "train-frequency": 1}
    given = {
        "env-id": ENV[kind],
        "total-timesteps": HORIZON,
        "learning-starts": STEPS[kind],
        "batch-size": batch,
        "buffer-size": BUFFER,
        **own,
    }
    script = Path(directory).resolve() / "cleanrl" / SCRIPTS[shape]
    sys.path.insert(0, directory)
    sys.argv = [str(script), "--no-cuda", *(text for k, v in given.items() for text in (f"--{k}", str(v)))]
    os.chdir(tempfile.mkdtemp())  # where it writes its logs

    def main() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            instead = {"range": lambda n: turns(n) if n == HORIZON else range(n)}
            runpy.run_path(str(script), init_globals=instead, run_name="__main__")

    thread = threading.Thread(target=main, daemon=True)
    thread.start()

    def step() -> None:
        begin.release()
        while not ended.acquire(timeout=1):
            if not thread.is_alive():
                raise SystemExit(f"{script} has ended by itself")

    step()
    return step


# The same losses


def agreement(shape: str, updates: int = 3) -> dict[str, Any]:
    """Losses of Stable-Baselines3 and of ours in the first updates from the same weights.

    Raises:
        SystemExit: they differ.
    """
    import numpy as np
    import torch

    method, run = our_run(shape, "sb3", (0,), "fp32")
    model, kind = sb3_model(shape, fused=False), shape.split()[0]
    rng, spec = np.random.default_rng(0), run.spec
    for _ in range(1000):
        obs, following = rng.normal(size=(2, 1, 1, *spec.observation)).astype(np.float32)
        action = rng.integers(spec.actions, size=(1, 1)) if spec.discrete else rng.uniform(-1, 1, (1, 1, spec.actions))
        reward, ended = rng.normal(size=(1, 1)), rng.random((1, 1)) < 0.1
        method.replay.add(obs, action, reward, following, ended, np.zeros_like(ended))
    copy_weights(kind, method, model)
    model._setup_learn(1)
    noise: list[Any] = []
    if kind == "sac":
        torch.distributions.Normal.rsample = lambda self: self.loc + self.scale * noise.pop(0)  # type: ignore[method-assign]
    named = {"dqn": {"loss/q": "loss"}, "sac": {"loss/q": "critic_loss", "loss/policy": "actor_loss"}}[kind]
    found: dict[str, Any] = {"tolerance": common.TOLERANCE}
    for update in range(1, updates + 1):
        batch = method.replay.sample(method.batch_size)
        if kind == "sac":
            drawn = run.streams.normal("noise", 2, *batch.action.shape[1:])
            noise += drawn[0].clone()
            method.streams = Given(drawn)
        model.replay_buffer.sample = lambda *_, batch=batch, **__: theirs(batch)
        model.train(1, method.batch_size)
        metrics = method.update(batch)
        for mine, their in named.items():
            a, b = float(metrics[mine][0]), float(model.logger.name_to_value[f"train/{their}"])
            error = abs(a - b) / max(abs(b), 1e-8)
            found[f"{mine} of update {update}"] = {"ours": a, "peer": b, "error": error}
            if not error <= common.TOLERANCE:
                raise SystemExit(f"{shape}, {mine} of update {update}: ours {a:.8g}, Stable-Baselines3 {b:.8g}")
        model.logger.name_to_value.clear()
        model.logger.name_to_count.clear()
    return found


class Given:
    """Streams whose next numbers are given."""

    def __init__(self, numbers: Any) -> None:
        self.numbers = numbers

    def normal(self, *_: Any) -> Any:
        return self.numbers


def theirs(batch: Any) -> Any:
    """Our batch as theirs."""
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    action = batch.action[0] if batch.action.ndim == 3 else batch.action[0][:, None]
    ended, reward = batch.terminated[0].float()[:, None], batch.reward[0][:, None]
    return ReplayBufferSamples(batch.obs[0], action, batch.next_obs[0], ended, reward)


def copy_weights(kind: str, method: Any, model: Any) -> None:
    """Give their networks the weights of ours."""
    import torch

    def fill(theirs: Any, weights: list[Any]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(theirs, weights, strict=True):
                parameter.copy_(weight)

    if kind == "dqn":
        for net, mine in ((model.q_net, method.q), (model.q_net_target, method.target)):
            fill(net.parameters(), [p[0] for p in mine.parameters()])
        return
    for net, mine in ((model.critic, method.critic), (model.critic_target, method.target)):
        fill(net.parameters(), [p[0, k] for k in range(2) for p in mine.parameters()])
    *hidden, weight, bias = (p[0] for p in method.actor.parameters())
    (mean, log_std), (mean_bias, log_std_bias) = weight.chunk(2), bias.chunk(2)
    fill(model.actor.parameters(), [*hidden, mean, mean_bias, log_std, log_std_bias])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cleanrl", required=True, help="a checkout of vwxyzjn/cleanrl")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on each side")
    parser.add_argument("--repeats", type=int, default=7, help="counted steps of each side")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help=", ".join(SHAPES))
    options = parser.parse_args()
    how = {"threads": options.threads, "repeats": options.repeats}
    found: dict[str, Any] = {}
    for shape in options.shapes:
        kind, equality = shape.split()[0], agreement(shape)
        libraries = {"sb3": {"sb3": (sb3, shape, False), "sb3 fused": (sb3, shape, True)}}
        if shape in SCRIPTS:
            libraries["cleanrl"] = {"cleanrl": (cleanrl, options.cleanrl, shape)}
        for precision in ("fp32", "bf16") if kind == "sac" else ("fp32",):
            for library, peers in libraries.items():
                side = ours, shape, library, (0,), precision
                found[f"{shape} {precision}, {library}"] = common.compare(side, peers, BAR, **how)
        together = ours, shape, "sb3", tuple(range(SEEDS))
        bar = BAR_SEEDS if kind == "dqn" else 1.0
        apart = {"one after another": (one_after_another, shape, "fp32")}
        for threads in common.thread_counts():
            row = common.compare(together, apart, bar, threads, options.repeats)
            found[f"{shape}, {SEEDS} seeds, threads {threads}"] = row
        for name, row in found.items():
            if not name.startswith(shape):
                continue
            count = STEPS[kind] * (SEEDS if "one after another" in row["ratio"] else 1)
            row["steps_per_s"] = {side: count / taken[row["clock"]]["median"] for side, taken in row["steps"].items()}
            row["equality"] = equality
            common.show(name, row)
    common.save("control_online", options.threads, found)


if __name__ == "__main__":
    main()
