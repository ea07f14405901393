"""Ctrl-C, SIGTERM and `ray job stop`: the first asks the workers for a last checkpoint, the second ends at once."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable


class StopRequest:
    """Whether somebody wants this run to end, and how long the workers still have.

    Args:
        grace_seconds: How long workers may take for a last checkpoint after the first signal.
        on_request: Called with these seconds at the first signal.
    """

    def __init__(self, grace_seconds: float, on_request: Callable[[float], None] | None = None) -> None:
        self._grace_seconds, self._on_request = grace_seconds, on_request
        self._first: float | None = None
        self._signals = 0

    def install(self) -> None:
        """Handles SIGINT and SIGTERM; to be called after `ray.init`, which replaces the handler of SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._on_signal())

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    @property
    def overdue(self) -> bool:
        """Whether to wait no longer: time is up, or a second signal has come."""
        if self._first is None:
            return False
        return self._signals > 1 or time.monotonic() - self._first > self._grace_seconds

    @property
    def seconds_left(self) -> float:
        """Until a job server kills this process; infinite where nobody does."""
        limit = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")
        if self._first is None or not limit:
            return math.inf
        return max(0.0, float(limit) - (time.monotonic() - self._first))

    def _on_signal(self) -> None:
        self._signals += 1
        if self._first is None:
            self._first = time.monotonic()
            if self._on_request:
                self._on_request(self._grace_seconds)


def grace_seconds() -> float:
    """Time for a last checkpoint: what a job server leaves before it kills, less 5 s; 60 s elsewhere."""
    limit = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")
    return max(1.0, float(limit) - 5.0) if limit else 60.0
