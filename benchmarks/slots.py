"""Runs whole commands in slots: a few seconds of one, while all processes of the others are suspended.

A machine's speed changes, and starts, evaluations and ends have no steps to take in turns (`benchmarks.turns`).
"""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

SLOT_SECONDS = 5.0
"""How long a command runs before another one does: less than the time in which the machine's speed changes."""

Slots = list[tuple[float, float]]
"""When a command ran: from and to, in Unix seconds."""


def in_slots(commands: Sequence[Sequence[str]], threads: int = 1) -> list[Slots]:
    """Runs commands to their end, for a few seconds each in turn; all processes of the others are suspended meanwhile.

    Args:
        commands: Each may start further processes.
        threads: Their OMP_NUM_THREADS.

    Returns:
        When each ran; see `ran`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    running: dict[int, psutil.Popen] = {}
    slots: list[Slots] = [[] for _ in commands]
    left = dict(enumerate(commands))
    with tempfile.TemporaryDirectory() as folder:
        try:
            while left:
                for i, command in list(left.items()):
                    log, began = Path(folder, str(i)), time.time()
                    if i in running:
                        resume(running[i])
                    else:
                        with log.open("wb") as output:
                            running[i] = psutil.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
                    with suppress(psutil.TimeoutExpired):
                        running[i].wait(SLOT_SECONDS)
                    slots[i].append((began, time.time()))
                    code = running[i].poll()
                    if code is None:
                        suspend(running[i])
                        continue
                    del left[i]
                    if code:
                        raise RuntimeError(f"{command!r} failed:\n{log.read_text(errors='replace')[-3000:]}")
        finally:
            for i in left:
                if i in running:
                    resume(running[i])
                    running[i].terminate()  # Ray's driver ends its cluster
                    running[i].wait()
    return slots


def ran(slots: Slots, begin: float = 0.0, end: float = math.inf) -> float:
    """Seconds that a command ran between two moments (Unix seconds)."""
    return sum(max(min(to, end) - max(since, begin), 0.0) for since, to in slots)


def _family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def resume(process: psutil.Process) -> None:
    """Lets a process and all its descendants run; nothing where it has ended."""
    with suppress(psutil.NoSuchProcess):
        for each in _family(process):
            with suppress(psutil.NoSuchProcess):
                each.resume()


def suspend(process: psutil.Process) -> None:
    """Suspends a process and all its descendants, including those that are being started."""
    suspended: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):
        while new := [each for each in _family(process) if each not in suspended]:
            for each in new:
                suspended.add(each)
                with suppress(psutil.NoSuchProcess):
                    each.suspend()


def kill(process: psutil.Process) -> None:
    """Ends a process and all its descendants without asking them."""
    with suppress(psutil.NoSuchProcess):
        for each in _family(process):
            with suppress(psutil.NoSuchProcess):
                each.kill()
