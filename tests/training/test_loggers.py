from __future__ import annotations

from importlib.util import find_spec

import pytest

from guerdon.errors import ConfigError
from guerdon.training.loggers import check_sinks, open_sinks
from guerdon.training.rundir import RunDir


def curve(path, name="loss/total"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_by_default_and_purged_on_resume(tmp_path):
    rundir = RunDir.create(tmp_path / "run", "dpo", {}, {})
    [sink] = open_sinks(rundir, ())
    for step in range(1, 6):
        sink.log(step, {"loss/total": float(step), "eval/pass@1": 0.5})
    sink.close()
    assert curve(rundir.path) == [(step, float(step)) for step in range(1, 6)]
    assert len(curve(rundir.path, "eval/pass@1")) == 5
    rundir.save_checkpoint(3, lambda directory: None, keep=1)
    [sink] = open_sinks(rundir, ())
    sink.log(4, {"loss/total": 40.0})
    sink.close()
    assert curve(rundir.path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_unknown_and_missing_sinks():
    with pytest.raises(ConfigError, match=r"--log-to wanb: known are wandb, mlflow, trackio\. Did you mean 'wandb'\?"):
        check_sinks(["wanb"])
    for name in ("wandb", "mlflow", "trackio"):
        if find_spec(name) is None:
            with pytest.raises(ConfigError, match=rf"{name} is not installed. `pip install 'guerdon\[{name}\]'`"):
                check_sinks([name])
