"""Keeps a second driver off a run's folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from orchestrator.experiment.spec import SpecError

LOCK, OWNER = "driver.lock", "driver.json"
"""Lock of a run's folder, and the process that holds it."""

LOCK_TIMEOUT_SECONDS = 5.0
"""Longest wait for the lock: a driver that was killed may still be ending what it started."""

TAKE_OVER_SECONDS = 120.0
"""Longest wait of a job that is started again for another host's lock: a file server keeps the locks of a lost host
until its lease ends, with Linux's NFS server 90 s later."""


class LockError(SpecError):
    """The file system of a run's folder refuses its lock."""


@contextmanager
def only_driver(run_dir: Path, owner_pid: int | None = None, timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[None]:
    """Keeps other drivers off a run's folder; the lock ends with the process, however that ends.

    Args:
        run_dir: The folder.
        owner_pid: The process that is named to others; None for this one.
        timeout: Longest wait for another driver to end, in seconds.

    Raises:
        LockError: The file system has no locks, or cannot be written.
        SpecError: Another driver is at work there.
    """
    import filelock

    # Where there is no flock, filelock would mark the folder with a file instead, which a killed driver leaves.
    lock, owner = filelock.FileLock(run_dir / LOCK, fallback_to_soft=False), run_dir / OWNER
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout as error:
        known = _owner(run_dir)
        text = f"process {known['pid']} on {known['host']}" if known else "another process"
        raise SpecError(f"{run_dir}: {text} is still running it; stop that one first") from error
    except OSError as error:
        raise LockError(f"{run_dir}: it cannot be locked: {error}") from error
    try:
        with suppress(OSError):  # for messages alone
            owner.write_bytes(orjson.dumps({"pid": owner_pid or os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        lock.release()


def take_over_timeout(run_dir: Path) -> float:
    """How long a job that is started again waits for the lock of a run's last driver, in seconds."""
    elsewhere = _owner(run_dir).get("host") != socket.gethostname()
    return TAKE_OVER_SECONDS if elsewhere else LOCK_TIMEOUT_SECONDS


def _owner(run_dir: Path) -> dict[str, Any]:
    """The last driver's `pid` and `host`; empty where they are not known."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = orjson.loads((run_dir / OWNER).read_bytes())
        return {"pid": known["pid"], "host": known["host"]}
    return {}
