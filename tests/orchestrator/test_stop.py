"""Stopping a run: what is left of the time that a job server gives."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator

import pytest

from orchestrator.execution import stop
from orchestrator.execution.stop import AT_ONCE, STOP_SIGNALS, StopRequest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The only time that `stop` sees; a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def request_() -> Iterator[StopRequest]:
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, AT_ONCE)}
    found = StopRequest(60.0)
    found.install()
    yield found
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_job_that_is_stopped_knows_how_long_it_still_lives(
    request_: StopRequest, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "120")
    assert request_.seconds_left == math.inf, "nobody has stopped it"
    os.kill(os.getpid(), signal.SIGTERM)
    clock[0] += 45.0
    assert request_.requested and request_.seconds_left == 75.0
    clock[0] += 100.0
    assert request_.seconds_left == 0.0


def test_a_run_that_is_no_job_is_killed_by_nobody(
    request_: StopRequest, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    os.kill(os.getpid(), signal.SIGINT)
    assert request_.requested and not request_.overdue and request_.seconds_left == math.inf
    clock[0] += 61.0
    assert request_.overdue


def test_only_the_parent_of_the_driving_process_hurries_it(request_: StopRequest, clock: list[float]) -> None:
    for number in (*STOP_SIGNALS, *STOP_SIGNALS):  # a job server sends its signal to both
        os.kill(os.getpid(), number)
    assert request_.requested and not request_.overdue
    os.kill(os.getpid(), AT_ONCE)
    assert request_.overdue
