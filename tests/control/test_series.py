from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import guerdon
from guerdon.control.series import Forecast, read_series, running_means
from guerdon.errors import ConfigError, DataError
from methods.online_problems import begin


@pytest.fixture(scope="module")
def waves(tmp_path_factory) -> str:
    """A cycle of 24 rows, as its phase and as a level with noise."""
    t = np.arange(3001)
    level = 5 + np.sin(2 * np.pi * t / 24) + 0.1 * np.random.default_rng(0).normal(size=len(t))
    path = tmp_path_factory.mktemp("series") / "waves.csv"
    phases = [np.sin(2 * np.pi * t / 24), np.cos(2 * np.pi * t / 24), level]
    np.savetxt(path, np.column_stack(phases), "%.6f", ",", header="sin,cos,level", comments="")
    return str(path)


def test_rows_become_steps(tmp_path):
    (tmp_path / "x.csv").write_text("time,load,heat\n2026-01-01,1,0.5\n2026-01-02,2,1.5\n2026-01-03,4,2.5\n")
    found = read_series(str(tmp_path / "x.csv"))
    np.testing.assert_array_equal(found.observations, [[1, 0.5], [2, 1.5]])
    np.testing.assert_array_equal(found.next_observations, [[2, 1.5], [4, 2.5]])
    np.testing.assert_array_equal(found.rewards, [1.5, 2.5])  # of the last column, a row later
    assert found.truncated.tolist() == [False, True] and not found.terminated.any()
    assert any("no numbers in time" in note for note in found.notes)
    parquet.write_table(pa.table({"load": [1, 2, 4], "heat": [0.5, 1.5, 2.5]}), tmp_path / "x.parquet")
    other = read_series(f"{tmp_path / 'x.parquet'}?target=load")
    np.testing.assert_array_equal(other.observations, found.observations)
    np.testing.assert_array_equal(other.rewards, [2, 4])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("x.csv?target=lod", "load\n1\n2\n", "'lod'.*load"),
        ("x.csv?goal=load", "load\n1\n2\n", "target=COLUMN"),
        ("x.csv", "load\n1\n\n3\n", "row 2 has no finite number"),
        ("x.csv", "load,heat\n1,2\n,3\n", "row 2 has no finite number in 'load'"),
        ("x.csv", "when\nmonday\ntuesday\n", "0 columns of numbers"),
        ("x.csv", "load\n1\n", "1 rows"),
        ("y.csv", "load\n1\n2\n", "no such file"),
        ("x.txt", "load\n1\n2\n", "not a file of columns"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, name, text, told):
    (tmp_path / f"x{name.partition('?')[0][1:]}").write_text(text)
    if name.startswith("y"):
        (tmp_path / "x.csv").unlink()
    with pytest.raises(DataError, match=told):
        read_series(str(tmp_path / name))


def test_running_means_have_no_bias():
    x = np.random.default_rng(0).normal(size=(50, 2)) + 3
    means = running_means(x, 0.9)
    weights = 0.9 ** np.arange(50)[::-1]
    np.testing.assert_allclose(means[-1], (weights[:, None] * x).sum(0) / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(means[0], x[0], rtol=1e-6)
    np.testing.assert_allclose(running_means(x, 0.0), x, rtol=1e-6)


def test_a_forecast_is_held_against_what_came():
    forecast = Forecast(2, np.arange(1.0, 21.0), 0.5)
    expected = [np.sum(0.5 ** np.arange(20 - t) * np.arange(t + 1, 21)) for t in range(3)]
    np.testing.assert_allclose(forecast.returns[:3], expected)
    assert np.isnan(forecast.returns[-6:]).all() and np.isfinite(forecast.returns[:-6]).all()  # 2^-7 < 1% < 2^-6
    forecast.values[:] = forecast.returns + np.array([[1.0], [2.0]])
    told = forecast.errors(0, 20)
    assert told["error/rmse"] == pytest.approx([1, 2])
    assert told["error/share"] == pytest.approx(np.array([1, 4]) / np.nanvar(forecast.returns))
    assert forecast.errors(15, 20) == {}


def test_the_future_of_a_series_is_learned_in_one_pass(waves, tmp_path):
    out = guerdon.train(
        "stream-td",
        data=waves,
        gamma=0.9,
        trace=0.0,
        connect_all=True,
        seeds=2,
        log_every=1000,
        out=str(tmp_path / "a"),
    )
    rows = out.metrics()
    assert [row["step"] for row in rows] == [1000, 2000, 3000]
    shares = [json.loads(line)["error/share"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert max(shares[-1]) < 0.3 < min(shares[0])
    with open(tmp_path / "a" / "predictions.csv", encoding="utf-8") as file:
        said = list(csv.DictReader(file))
    assert len(said) == 3000 and list(said[0]) == ["row", "return", "seed-0", "seed-1"]
    late = np.array([[float(row["return"]), float(row["seed-0"])] for row in said[2000:2900]])
    assert np.corrcoef(late.T)[0, 1] > 0.9 and abs(late.mean(0)[0] - late.mean(0)[1]) < 2


@pytest.mark.parametrize("compiled", [True, False])
def test_a_run_goes_on_bit_for_bit(waves, tmp_path, monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr("guerdon.control.streaming.learners.find_spec", lambda name: None)
    how = {"env": None, "data": waves, "seeds": 2, "log_every": 100, "max_updates": 300, "hidden": (16,), "gamma": 0.9}

    def fresh():
        return begin("stream-td", path=tmp_path, **how)

    method, run = fresh()
    steps = method.learn(run)
    next(steps)
    run.save(tmp_path)
    rest = list(steps)
    again, back = fresh()
    back.restore(tmp_path)
    assert str(list(again.learn(back))) == str(rest) and len(rest) == 2
    np.testing.assert_array_equal(again.forecast.values, method.forecast.values)


def test_a_series_is_not_acted_in(waves, tmp_path):
    for options in ({"env": "CartPole-v1"}, {"corrupt": ("reward:0.3",)}):
        with pytest.raises(ConfigError, match=f"leave {next(iter(options))} out"):
            guerdon.train("stream-td", data=waves, out=str(tmp_path / "a"), **options)
    with pytest.raises(ConfigError, match="trace"):
        guerdon.train("stream-td", data=waves, trace=1.0, out=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match="give env instead of data"):
        guerdon.train("stream-q", data=waves, out=str(tmp_path / "a"))
