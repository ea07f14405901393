"""The clock of a run moves on evenly, whatever is done to the machine's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from trainers.contract import clock


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(clock, "_offset", time.time() - clock._steady())  # as of now, and restored afterwards
    yield
    os.environ.pop(clock.VARIABLE, None)


@pytest.mark.parametrize("seconds", [-7200.0, 7200.0])
def test_a_clock_that_is_set_changes_no_duration_and_is_seen(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    real, before = time.time, clock.now()
    assert abs(clock.deviation()) < 1
    monkeypatch.setattr(time, "time", lambda: real() + seconds)
    assert 0 <= clock.now() - before < 600
    assert clock.deviation() == pytest.approx(seconds, abs=1)


def test_a_process_that_is_stopped_between_two_clocks_takes_none_for_set(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, stops = [1000.0], iter([30.0, 0.0, 5.0, 0.0, 9.0])
    monkeypatch.setattr(clock, "_steady", lambda: steady[0])
    monkeypatch.setattr(clock, "_offset", 500.0)

    def wall() -> float:
        seen = 500.0 + steady[0]
        steady[0] += next(stops)
        return seen

    monkeypatch.setattr(time, "time", wall)
    assert clock.deviation() == 0


def test_another_process_of_the_machine_and_its_children_take_the_clock_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_offset", clock._offset - 7200)
    child = "from trainers.contract import clock; print(clock.now())"
    code = (
        "import subprocess, sys; from trainers.contract import clock; clock.adopt(sys.argv[1]); print(clock.now());"
        "print(subprocess.run([sys.executable, '-c', sys.argv[2]], capture_output=True, text=True).stdout)"
    )
    before = clock.now()
    done = subprocess.run(
        [sys.executable, "-c", code, clock.anchor(), child], capture_output=True, text=True, check=True
    )
    times = [float(line) for line in done.stdout.split()]
    assert len(times) == 2 and before < times[0] < times[1] < clock.now()


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
def test_the_clock_of_another_machine_is_read_and_handed_on(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    steady, delays = [1000.0], iter([0.3, 0.01, 0.2, 0.4, 0.1])
    monkeypatch.setattr(clock, "_steady", lambda: steady[0])

    def read() -> float:
        """Of the time of a call, a tenth passes before the reading: so it is wrong by 0.4 of it."""
        delay = next(delays)
        steady[0] += delay
        return seconds + steady[0] - 0.9 * delay

    clock.follow(read)
    assert clock.now() == pytest.approx(seconds + steady[0] - 0.004), "the fastest answer counts"
    assert os.environ[clock.VARIABLE] == clock.anchor()


def test_the_clock_of_another_machine_is_not_taken_over_unread() -> None:
    before = clock.now()
    assert clock.adopt(clock.anchor())
    os.environ.pop(clock.VARIABLE)
    assert not clock.adopt("another-boot 0.0")
    assert 0 <= clock.now() - before < 600 and clock.VARIABLE not in os.environ


def test_a_run_that_goes_on_after_the_clock_was_set_back_never_goes_back_in_time() -> None:
    later = time.time() + 7200
    clock.not_before(later)
    assert later <= clock.now() < later + 600 and clock.deviation() == pytest.approx(-7200, abs=1)
    clock.not_before(0.0)
    assert clock.now() >= later
