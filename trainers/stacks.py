"""Has a worker write down what each of its threads is doing when another process asks for it, whatever it is doing.

The interpreter's own handler answers (`faulthandler`): it needs neither the GIL nor the thread that is stuck. It writes
into a file in memory that has no name, so that nothing is left of a process that was never asked. Linux only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

NAME = "benchmark-stacks"
"""By which others find the file among those that the process has open."""

REQUEST = signal.SIGUSR1

ANSWER_TIMEOUT_SECONDS = 2.0
"""Longest wait for all answers; writing takes milliseconds."""

POLL_INTERVAL_SECONDS = 0.05


def answer_requests() -> None:
    """Has this process answer from now on."""
    if hasattr(os, "memfd_create"):
        faulthandler.register(REQUEST, os.memfd_create(NAME), all_threads=True)


def request(pids: Sequence[int]) -> dict[int, str]:
    """Asks processes of this machine what their threads are doing.

    Args:
        pids: Numbers of the processes; those that do not answer requests are not sent a signal.

    Returns:
        For each process that is there, its state and the stacks of its threads, for a person; a process that is frozen
        has a state alone.
    """
    files: dict[int, Path] = {}
    texts: dict[int, str] = {}
    for pid in pids:
        with contextlib.suppress(OSError, psutil.Error):
            status = psutil.Process(pid).status()
            texts[pid] = f"process {pid}, {status}\n"
            for descriptor in Path(f"/proc/{pid}/fd").iterdir() if status != psutil.STATUS_STOPPED else ():
                if NAME in str(descriptor.readlink()):
                    files[pid] = descriptor
                    os.kill(pid, REQUEST)
    deadline = time.monotonic() + ANSWER_TIMEOUT_SECONDS
    for pid, file in files.items():
        with contextlib.suppress(OSError):
            texts[pid] += _answer(file, deadline)
    return texts


def _answer(file: Path, deadline: float) -> str:
    """What a process has written, once that grows no longer."""
    before, stacks = "", file.read_text(errors="replace")
    while (not stacks or stacks != before) and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_SECONDS)
        before, stacks = stacks, file.read_text(errors="replace")
    return stacks
