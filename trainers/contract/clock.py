"""The clock of a run: Unix seconds that move on evenly, also when somebody sets the machine's clock meanwhile.

The driver's clock is the wall clock of its start, moved on by the machine's monotonic clock. The workers take it over:
those on the same machine exactly, since they read the same monotonic clock, the others as well as an answer from there
allows.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

READINGS = 5
"""How often a clock is read; the reading with the fastest answer counts."""

TOLERANCE_SECONDS = 2.0
"""How far a wall clock may be off the run's before that is noted."""

VARIABLE = "BENCHMARK_CLOCK"
"""Hands the clock on to child processes: the machine's boot, and the offset."""


def _steady() -> float:
    """Seconds that nobody sets; a suspended machine's count too, where the system has such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return str(uuid.getnode())


def _ahead(read: Callable[[], float]) -> float:
    """How far a clock is ahead of the steady one; a busy machine may stop this process in the middle of a reading.

    A reading is set against the middle between question and answer (F. Cristian, Probabilistic clock synchronization,
    1989), which is wrong by half of the time between them at most.
    """
    readings = []
    for _ in range(READINGS):
        asked = _steady()
        theirs = read()
        answered = _steady()
        readings.append((answered - asked, theirs - (asked + answered) / 2))
    return min(readings)[1]


_offset = _ahead(time.time)


def now() -> float:
    """The run's time (Unix seconds)."""
    return _offset + _steady()


def anchor() -> str:
    """This process's clock, for `adopt` in another one."""
    return f"{_boot()} {_offset!r}"


def adopt(given: str) -> bool:
    """Takes over another process's clock, if it is on this machine; so do processes that are started from here.

    Returns:
        Whether it is.
    """
    global _offset
    boot, _, offset = given.partition(" ")
    if boot == _boot():
        _offset = float(offset)
        os.environ[VARIABLE] = given
        return True
    return False


def follow(read: Callable[[], float]) -> None:
    """Takes over the clock of a process on another machine; so do processes that are started from here.

    Args:
        read: Returns the other process's `now()`.
    """
    global _offset
    _offset = _ahead(read)
    os.environ[VARIABLE] = anchor()


def not_before(moment: float) -> None:
    """Moves the clock on where it is behind a moment of the same run: the wall clock was set back before it went on."""
    global _offset
    _offset = max(_offset, moment - _steady())


def deviation() -> float:
    """How far the wall clock is ahead of the run's: 0 until somebody sets it."""
    return _ahead(time.time) - _offset


class Laps:
    """Cuts the time since a moment (Unix seconds) into parts."""

    def __init__(self, start: float) -> None:
        self._last = start
        self.seconds: dict[str, float] = {}
        """Seconds by part, in order."""

    def lap(self, part: str) -> None:
        """Ends a part."""
        moment = now()
        self.seconds[part], self._last = moment - self._last, moment


if VARIABLE in os.environ:
    adopt(os.environ[VARIABLE])


def utc(when: float) -> str:
    """A moment (Unix seconds) as UTC in ISO 8601."""
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds")
