from __future__ import annotations

import pytest

from guerdon.training import progress
from guerdon.training.progress import Silent, Terminal

METRICS = {"loss/total": 0.51234, "time/tokens_per_second": 1834.2, "reward/mean": 0.25, "eval/pass@1": 0.75}


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_every_few_seconds_where_there_is_no_terminal(capsys, clock):
    shown = Terminal()
    assert not shown.live
    shown.begin(10, 0.1)
    for step in range(11, 31):  # 10% of the run takes 10 steps of one second
        clock[0] += 1.0
        shown.update(step, step / 100, METRICS if step == 11 else {"loss/total": 0.5})
    shown.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "step 11/100  1:29 left  1834 tok/s  loss 0.5123  reward 0.25  eval/pass@1 0.75"
    assert [line.split()[1] for line in lines] == ["11/100", "16/100", "21/100", "26/100", "30/100"]
    assert lines[-1] == "step 30/100  1:10 left  1834 tok/s  loss 0.5  reward 0.25  eval/pass@1 0.75"


def test_a_live_bar_in_a_terminal(monkeypatch, capsys, clock):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    shown = Terminal()
    assert shown.live
    shown.begin(0, 0.0)
    clock[0] += 3600.0
    shown.update(1, 0.25, METRICS)
    shown.note("a note with [brackets]")
    shown.close()
    err = capsys.readouterr().err
    assert "step 1/4  3:00:00 left" in err and "a note with [brackets]" in err


def test_silent_says_nothing(capsys):
    shown = Silent()
    shown.begin(0, 0.0)
    shown.update(1, 1.0, METRICS)
    shown.note("nothing")
    shown.close()
    assert capsys.readouterr() == ("", "")
