"""Ctrl-C, SIGTERM, a closed terminal, `ray job stop`: the first asks for a last checkpoint, the second ends at once.

A job server sends its signal to every process of a job, so the process that drives a run may have one twice: from
there, and from the parent that passes it on (`supervisor.py`). Only `AT_ONCE`, which that parent sends, is a second.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
"""What asks a run to end: SIGHUP comes with the end of a terminal, SIGQUIT from its keyboard, the last two from batch
systems that announce the end of a job."""

AT_ONCE = signal.SIGURG
"""Sent to the process that drives a run when somebody has asked for its end a second time. Nothing else uses it."""

INTERRUPTED = 130
"""Exit code of a command that a signal ended, whichever signal it was."""


class StopRequest:
    """Whether somebody wants this run to end, and how long the workers still have.

    Args:
        grace_seconds: How long workers may take for a last checkpoint after the first signal.
        on_request: Called with these seconds at the first signal.
    """

    def __init__(self, grace_seconds: float, on_request: Callable[[float], None] | None = None) -> None:
        self._grace_seconds, self._on_request = grace_seconds, on_request
        self._first: float | None = None
        self._at_once = False

    def install(self) -> None:
        """Handles the signals from now on."""
        handle_stop_signals(self._on_signal)
        signal.signal(AT_ONCE, self._on_signal)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    @property
    def overdue(self) -> bool:
        """Whether to wait no longer: time is up, or a second signal has come."""
        if self._first is None:
            return False
        return self._at_once or time.monotonic() - self._first > self._grace_seconds

    @property
    def seconds_left(self) -> float:
        """Until a job server kills this process; infinite where nobody does."""
        limit = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")
        if self._first is None or not limit:
            return math.inf
        return max(0.0, float(limit) - (time.monotonic() - self._first))

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._at_once |= number == AT_ONCE
        if self._first is None:
            self._first = time.monotonic()
            if self._on_request:
                self._on_request(self._grace_seconds)


def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Has a function called on `STOP_SIGNALS`; where SIGHUP is ignored, as under `nohup`, it stays so."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def grace_seconds() -> float:
    """Time for a last checkpoint: what a job server leaves before it kills, less 5 s; 60 s elsewhere."""
    limit = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")
    return max(1.0, float(limit) - 5.0) if limit else 60.0
