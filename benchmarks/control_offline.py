"""IQL against CORL's and d3rlpy's: updates per second of each seed, batches drawn from a million transitions.

    python -m benchmarks.control_offline --corl DIRECTORY

DIRECTORY is a checkout of github.com/tinkoff-ai/CORL, whose file is run as it is; d3rlpy has to be installed (without
what it depends on: Gym and scikit-learn are made up where they are missing, since no update needs them). The data are
random numbers in the shape of Hopper's, all networks have the same hidden layers, and ours is the method's loop as
users run it. First, updates of CORL's and of ours from the same weights on the same batches must have the same losses.
Last, eight seeds together against the same eight one after another, on one thread and on all that there are.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

from benchmarks import common

common.PACKAGES = (*common.PACKAGES, "d3rlpy")
ROWS, OBS, ACTIONS, EPISODE = 1_000_000, 11, 3, 1000
BATCH, SEEDS, HORIZON = 256, 8, 1_000_000
UPDATES = 80  # of each seed in one timed step; of eight seeds against a peer a share, so that both sides do as much
WIDE, SMALL = (256, 256), (64, 64)
BARS = {"corl": 2.5, "d3rlpy": 4.0}
BAR_SEEDS = 3.0
FAKES = ("gym", "d4rl", "pyrallis", "wandb", "sklearn")


def write_data(directory: str) -> str:
    """A file of random transitions, in D4RL's layout."""
    rng = np.random.default_rng(0)
    ends = np.arange(ROWS) % EPISODE == EPISODE - 1
    arrays = {
        "observations": rng.standard_normal((ROWS, OBS), np.float32),
        "actions": rng.random((ROWS, ACTIONS), np.float32) * 1.98 - 0.99,
        "rewards": rng.standard_normal(ROWS, np.float32),
        "next_observations": rng.standard_normal((ROWS, OBS), np.float32),
        "terminals": ends & (rng.random(ROWS) < 0.5),
    }
    arrays["timeouts"] = ends & ~arrays["terminals"]
    path = Path(directory) / "random.npz"
    np.savez(path, **arrays)
    return str(path)


# Ours


def our_run(data: str, hidden: tuple[int, ...], seeds: tuple[int, ...], precision: str, updates: int) -> Any:
    """A method and its run, set up."""
    from guerdon.methods.offline.iql import IQL
    from guerdon.training.config import ControlTraining
    from guerdon.training.control import ControlRun
    from guerdon.training.distributed import Distribution

    method = IQL(hidden=hidden, batch_size=BATCH)
    config = ControlTraining(
        data=data,
        max_updates=HORIZON,
        seed=seeds[0],
        seeds=len(seeds),
        precision=precision,  # type: ignore[arg-type]
        log_every=updates,
        checkpoint_every=0,
    )
    run = ControlRun(method, config, Distribution(), Path(tempfile.mkdtemp()))
    method.setup(run)
    return method, run


def ours(data: str, hidden: tuple[int, ...], seeds: tuple[int, ...], precision: str, updates: int) -> Callable[[], Any]:
    method, run = our_run(data, hidden, seeds, precision, updates)
    common.OPEN.enter_context(run.threads())  # as in `guerdon train`
    steps = method.learn(run)

    def step() -> None:
        next(steps)

    return step


def one_after_another(data: str, hidden: tuple[int, ...], precision: str, updates: int) -> Callable[[], None]:
    runs = [ours(data, hidden, (seed,), precision, updates) for seed in range(SEEDS)]

    def step() -> None:
        for run in runs:
            run()

    return step


# Theirs


class Fakes:
    """Finds packages that are missing and that no update needs."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in FAKES else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(name=spec.name, VERSION="0.26.2")  # of Gym, which d3rlpy looks at

    def exec_module(self, module: Any) -> None:
        pass


@contextmanager
def without_missing() -> Iterator[None]:
    fakes: Any = Fakes()
    sys.meta_path.append(fakes)
    try:
        yield
    finally:
        sys.meta_path.remove(fakes)


def corl_trainer(directory: str, hidden: tuple[int, ...]) -> Any:
    """CORL's module and trainer, put together as its `train` does."""
    from torch.optim import Adam

    spec = importlib.util.spec_from_file_location("corl_iql", Path(directory) / "algorithms" / "offline" / "iql.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with without_missing():
        spec.loader.exec_module(module)
    config = module.TrainConfig(device="cpu")
    sizes: dict[str, int] = {"hidden_dim": hidden[0], "n_hidden": len(hidden)}
    q, v = module.TwinQ(OBS, ACTIONS, **sizes), module.ValueFunction(OBS, **sizes)
    actor = module.GaussianPolicy(OBS, ACTIONS, 1.0, **sizes)
    trainer = module.ImplicitQLearning(
        max_action=1.0,
        actor=actor,
        actor_optimizer=Adam(actor.parameters(), lr=config.actor_lr),
        q_network=q,
        q_optimizer=Adam(q.parameters(), lr=config.qf_lr),
        v_network=v,
        v_optimizer=Adam(v.parameters(), lr=config.vf_lr),
        iql_tau=config.iql_tau,
        beta=config.beta,
        max_steps=HORIZON,
        discount=config.discount,
        tau=config.tau,
        device="cpu",
    )
    return module, trainer


def corl(directory: str, data: str, hidden: tuple[int, ...]) -> Callable[[], None]:
    module, trainer = corl_trainer(directory, hidden)
    replay = module.ReplayBuffer(OBS, ACTIONS, ROWS, "cpu")
    replay.load_d4rl_dataset(dict(np.load(data)))

    def step() -> None:
        for _ in range(UPDATES):
            trainer.train([part.to("cpu") for part in replay.sample(BATCH)])

    return step


def d3rlpy(data: str, hidden: tuple[int, ...]) -> Callable[[], None]:
    """d3rlpy's update on batches of its buffer, as its `fit` takes them, without the loggers of that."""
    with without_missing():
        import d3rlpy
    arrays = np.load(data)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    dataset = d3rlpy.dataset.MDPDataset(**{name: arrays[name] for name in names})
    encoder = d3rlpy.models.VectorEncoderFactory(hidden_units=list(hidden))
    nets = {f"{name}_encoder_factory": encoder for name in ("actor", "critic", "value")}
    learner = d3rlpy.algos.IQLConfig(batch_size=BATCH, **nets).create(device="cpu:0")
    learner.create_impl((OBS,), ACTIONS)

    def step() -> None:
        for _ in range(UPDATES):
            learner.update(dataset.sample_transition_batch(BATCH))

    return step


# The same losses


def agreement(directory: str, data: str, updates: int = 3) -> dict[str, Any]:
    """Losses of CORL's and of ours in the first updates from the same weights on the same batches.

    CORL's actor ends in a tanh, ours in none: for this check theirs goes without.

    Raises:
        SystemExit: they differ.
    """
    import torch

    from guerdon.control.replay import Replay

    method, run = our_run(data, WIDE, (0,), "fp32", UPDATES)
    _, trainer = corl_trainer(directory, WIDE)
    trainer.actor.net.net[-1] = torch.nn.Identity()

    def fill(theirs: Any, weights: list[Any]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(theirs.parameters(), weights, strict=True):
                parameter.copy_(weight)

    fill(trainer.vf, [p[0] for p in method.value.parameters()])
    for net, mine in ((trainer.qf, method.critic), (trainer.q_target, method.target)):
        fill(net, [p[0, k] for k in range(2) for p in mine.parameters()])
    log_std, *layers = (p[0] for p in method.pi.parameters())
    fill(trainer.actor, [log_std[0], *layers])
    replay = Replay.of(run.data, 1, run.streams)
    named = {"loss/value": "value_loss", "loss/q": "q_loss", "loss/policy": "actor_loss"}
    found: dict[str, Any] = {"tolerance": common.TOLERANCE}
    for update in range(updates):
        batch = replay.sample(BATCH)
        fields = (batch.obs, batch.action, batch.reward[..., None], batch.next_obs, batch.terminated[..., None].float())
        losses = trainer.train([field[0] for field in fields])
        method.before_update(update, HORIZON)
        metrics = method.update(batch)
        for mine, their in named.items():
            a, b = metrics[mine].item(), losses[their]
            error = abs(a - b) / max(abs(b), 1e-8)
            found[f"{mine} of update {update + 1}"] = {"ours": a, "peer": b, "error": error}
            if not error <= common.TOLERANCE:
                raise SystemExit(f"{mine} of update {update + 1}: ours {a:.8g}, CORL {b:.8g}")
    return found


def useful_flops(hidden: tuple[int, ...]) -> float:
    """FLOPs of the products of one update: 3 networks (V, 2 Q) and the actor learn, V and 2 Q are only asked.

    A learning one needs 2 B x weights forward, as many for the weights' gradients, and for those of the inputs as many
    again without its first layer.
    """

    def network(inputs: int, outputs: int, learns: bool) -> float:
        sizes = [inputs, *hidden, outputs]
        each = [i * o for i, o in pairwise(sizes)]
        return 2.0 * BATCH * (sum(each) + learns * (sum(each) + sum(each[1:])))

    asked = network(OBS, 1, False) + 2 * network(OBS + ACTIONS, 1, False)
    return asked + network(OBS, 1, True) + 2 * network(OBS + ACTIONS, 1, True) + network(OBS, ACTIONS, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corl", required=True, help="a checkout of tinkoff-ai/CORL")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on each side")
    parser.add_argument("--repeats", type=int, default=9, help="counted steps of each side")
    options = parser.parse_args()
    how = {"threads": options.threads, "repeats": options.repeats}
    peaks = {precision: common.matmul_peak(precision, options.threads) for precision in ("fp32", "bf16")}
    found: dict[str, Any] = {}

    def keep(name: str, row: dict[str, Any], updates: int, **beside: Any) -> None:
        row["updates_per_s"] = {side: updates / taken[row["clock"]]["median"] for side, taken in row["steps"].items()}
        found[name] = {**row, **beside}
        common.show(name, found[name])

    with tempfile.TemporaryDirectory() as directory:
        data = write_data(directory)
        found["equality_fp32"] = agreement(options.corl, data)
        peers: dict[str, tuple[Any, ...]] = {"corl": (corl, options.corl, data, WIDE), "d3rlpy": (d3rlpy, data, WIDE)}
        flops = useful_flops(WIDE)
        for peer, bar in BARS.items():
            for seeds in (1, SEEDS):
                for precision, peak in peaks.items():
                    mine = ours, data, WIDE, tuple(range(seeds)), precision, UPDATES // seeds
                    row = common.compare(mine, {peer: peers[peer]}, bar, **how)
                    fraction = flops * UPDATES / row["steps"]["ours"][row["clock"]]["median"] / peak
                    beside = {"matmul_peak_gflops": peak / 1e9, "fraction_of_peak": fraction}
                    keep(f"{seeds} seeds {precision} against {peer}", row, UPDATES, **beside)
        for hidden, bar in ((SMALL, BAR_SEEDS), (WIDE, 1.0)):
            together = ours, data, hidden, tuple(range(SEEDS)), "fp32", UPDATES
            apart = {"one after another": (one_after_another, data, hidden, "fp32", UPDATES)}
            for threads in common.thread_counts():
                row = common.compare(together, apart, bar, threads, options.repeats)
                keep(f"{SEEDS} seeds {hidden[0]} wide, threads {threads}", row, UPDATES * SEEDS)
    common.save("control_offline", options.threads, {"useful_gflop": flops / 1e9, **found})


if __name__ == "__main__":
    main()
