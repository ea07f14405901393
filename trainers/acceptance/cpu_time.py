"""The CPU time that threads could have had: what other processes take from them does not count as slow hardware."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainers.contract.cpus import control_groups

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Burst:
    """What some threads did in a while."""

    work: float
    """Units of work of all threads."""
    wall_seconds: float
    """Sum over the threads."""
    contended_seconds: float
    """Sum over the threads of the time in which other processes had the CPUs that they were ready to use."""
    num_threads: int

    @property
    def rate(self) -> float:
        """Units of work that all threads do in a second in which no other process is in their way."""
        return self.num_threads * self.work / (self.wall_seconds - self.contended_seconds)

    @property
    def cpu_share(self) -> float:
        """Share of the time, in percent, in which no other process was in the threads' way."""
        return 100 * (1 - self.contended_seconds / self.wall_seconds)


def run_burst(work: Callable[[], float], num_threads: int, seconds: float) -> Burst:
    """Repeats work in some threads at once for a while.

    A thread that is ready to run but has no CPU waits for another process (which Linux counts, see
    Documentation/scheduler/sched-stats.rst), or its control group has used up its quota (`cpu.stat`), or, where that
    cannot be seen from a container, CPUs are idle meanwhile. Only the first is no property of the node.

    Args:
        work: Does one piece of work and returns its size; called in all threads, and must release Python's lock.
        num_threads: How many.
        seconds: How long.

    Raises:
        Exception: Whatever `work` raises.
    """
    states = [_Thread(work, seconds) for _ in range(num_threads)]
    idle, throttled = _idle_seconds(), _throttled_seconds()
    for state in states:
        state.start()
    for state in states:
        state.join()
    kept_back = max(0.0, _idle_seconds() - idle) + max(0.0, _throttled_seconds() - throttled)
    for state in states:
        if state.error:
            raise state.error
    wall, waited = sum(each.wall for each in states), sum(each.waited for each in states)
    # At least one thread ran at any moment in which it was counted; the rest is the noise of the counters.
    contended = min(max(0.0, waited - kept_back), 0.99 * wall)
    return Burst(sum(each.work_done for each in states), wall, contended, num_threads)


class _Thread(threading.Thread):
    def __init__(self, work: Callable[[], float], seconds: float) -> None:
        super().__init__(daemon=True)
        self._work, self._seconds = work, seconds
        self.work_done = self.wall = self.waited = 0.0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            waited, began = _waited_seconds(), time.perf_counter()
            while (wall := time.perf_counter() - began) < self._seconds or not self.work_done:
                self.work_done += self._work()
            self.wall, self.waited = wall, _waited_seconds() - waited
        except Exception as error:  # noqa: BLE001 - raised again where the threads are joined
            self.error = error


def _throttled_seconds() -> float:
    """CPU time that quotas have kept back from this process's control groups so far; the largest of them."""
    found = [0.0]
    for folder in control_groups():
        with suppress(OSError, ValueError):
            values = dict(line.split() for line in (folder / "cpu.stat").read_text(encoding="ascii").splitlines())
            found.append(int(values.get("throttled_time", 0)) / 1e9 or int(values.get("throttled_usec", 0)) / 1e6)
    return max(found)


def _waited_seconds() -> float:
    """How long the calling thread has been ready to run without a CPU so far; 0 where the kernel does not count it."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    return 0.0


def _idle_seconds() -> float:
    """Time that the CPUs which this process may use have been idle so far, summed over them."""
    usable, ticks = os.sched_getaffinity(0), 0
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
            name, *values = line.split()
            if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in usable:
                ticks += int(values[3]) + int(values[4])
    return ticks / TICKS_PER_SECOND
