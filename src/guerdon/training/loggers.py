"""Where metrics go beside `metrics.jsonl`: TensorBoard where it is installed, and W&B, MLflow or Trackio by request."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from guerdon.errors import ConfigError, near
from guerdon.training.rundir import RunDir


class Sink(Protocol):
    """Takes metrics step by step. A step may come twice: its evaluation follows its training metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under `tensorboard/`; on resume, steps after the checkpoint are purged."""

    def __init__(self, rundir: RunDir) -> None:
        from torch.utils.tensorboard import SummaryWriter

        checkpoint = rundir.latest_checkpoint()
        purge = int(checkpoint.name.removeprefix("step-")) + 1 if checkpoint else 0
        self.writer = SummaryWriter(str(rundir.path / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, configured by its own environment variables; a resumed run goes on under the same id."""

    def __init__(self, rundir: RunDir) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "guerdon"),
            name=rundir.path.name,
            id=rundir.environment["id"],
            resume="allow",
            dir=str(rundir.path),
            config=rundir.config,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow, configured by its own environment variables; a resumed run is found again by its tag."""

    def __init__(self, rundir: RunDir) -> None:
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "guerdon"))
        tag = rundir.environment["id"]
        found = mlflow.search_runs(filter_string=f"tags.guerdon_run = '{tag}'", output_format="list")
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=rundir.path.name, tags={"guerdon_run": tag})
            mlflow.log_dict(rundir.config, "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # MLflow refuses '@' in names.
        self.mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class Trackio:
    """Trackio, local-first; a resumed run goes on under the same name."""

    def __init__(self, rundir: RunDir) -> None:
        import trackio

        name = f"{rundir.path.name}-{rundir.environment['id']}"
        self.run = trackio.init(project="guerdon", name=name, config=rundir.config, resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


_BY_REQUEST: dict[str, Any] = {"wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


def check_sinks(log_to: Iterable[str]) -> None:
    """`ConfigError` for an unknown name or a package that is not installed; cheap, to be asked before a run starts."""
    for name in log_to:
        if name not in _BY_REQUEST:
            raise ConfigError(f"--log-to {name}: known are {', '.join(_BY_REQUEST)}.{near(name, _BY_REQUEST)}")
        if find_spec(name) is None:
            raise ConfigError(f"--log-to {name}: {name} is not installed. `pip install 'guerdon[{name}]'` installs it.")


def open_sinks(rundir: RunDir, log_to: Iterable[str]) -> list[Sink]:
    """The sinks of a run: TensorBoard where it is installed, and those that `log_to` names; checks them first."""
    names = list(log_to)
    check_sinks(names)
    kinds = [*([TensorBoard] if find_spec("tensorboard") else []), *(_BY_REQUEST[name] for name in names)]
    return [kind(rundir) for kind in kinds]
