"""Calls in a child process: results, limits, errors, and a clean channel whatever happens."""

from __future__ import annotations

import signal
import threading

import pytest

from guerdon.errors import ConfigError
from guerdon.rewards.isolation import Isolated, Stopped


def evaluated(source: str, **limits: float) -> Isolated:
    return Isolated("builtins.eval", source, **limits)


def test_results_come_back_in_order_and_prints_do_not_mix_with_them() -> None:
    square = evaluated("lambda n: print('noise') or [n * n, str(n)]")
    assert [square(n) for n in range(50)] == [[n * n, str(n)] for n in range(50)]


def test_a_loop_in_c_code_is_stopped_and_the_next_call_works() -> None:
    power = evaluated("lambda n: len(str(10**n % 7)) if n < 99 else 10 ** (10**n)", seconds=0.3)
    with pytest.raises(Stopped, match=r"more than 0\.3 s of CPU time"):
        power(99)
    assert power(3) == 1


def test_memory_is_limited() -> None:
    size = evaluated("lambda n: len(bytearray(n))", memory=2**29)
    with pytest.raises(Stopped, match="memory"):
        size(2**31)
    assert size(10) == 10


def test_works_in_any_thread_and_from_several_at_once() -> None:
    double = evaluated("lambda n: 2 * n")
    found: dict[int, int] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: double(n)})) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: 2 * n for n in range(8)}


def test_a_defect_keeps_its_traceback_and_the_child_goes_on() -> None:
    inverse = evaluated("lambda n: 1 / n")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        inverse(0)
    assert inverse(4) == 0.25


def test_a_mistake_of_the_user_stays_one() -> None:
    with pytest.raises(ConfigError, match="no generator 'chain_sun'"):
        Isolated("guerdon.tasks.reasoning.generators")("chain_sun", {}, 0, 0)


def test_an_interrupted_call_leaves_no_late_reply() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    sleep = evaluated("lambda s: __import__('time').sleep(s) or s")
    assert sleep(0) == 0
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            sleep(1.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert sleep(0.01) == 0.01
