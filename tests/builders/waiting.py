"""Waits for what other processes do, with deadlines for a machine that is busy."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import psutil

DEADLINE_SECONDS = 600.0
"""Only a failing test waits this long."""


def wait_for(
    met: Callable[[], object], message: Callable[[], str] = lambda: "", seconds: float = DEADLINE_SECONDS
) -> None:
    """Waits until a condition is met."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {message()}"
        time.sleep(0.2)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended stays in the table where nobody asks for its exit code (in a container)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_served(url: str, server: subprocess.Popen[bytes]) -> None:
    """Waits until a server answers, with an error or without."""

    def answers() -> bool:
        assert server.poll() is None, f"the server at {url} has ended"
        try:
            urllib.request.urlopen(url, timeout=60).close()  # noqa: S310 - a local server of the test
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    wait_for(answers, lambda: f"{url} does not answer")
