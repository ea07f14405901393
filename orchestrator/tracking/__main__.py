"""`python -m orchestrator.tracking`: the process that follows a run log; `Tracker.start` in `driver.py` starts it."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from pathlib import Path

from orchestrator.tracking.driver import POLL_INTERVAL_SECONDS, RETRY_SECONDS, Tracker


def _follow(run_dir: Path, uri: str) -> bool:
    """Tracks a run until its end is tracked, or what its driver left: stdin ends with the driver.

    Returns:
        Whether the run's end has been tracked.
    """
    tracker, failures, closing = Tracker(run_dir, uri), 0, 0.0
    while True:
        try:
            if tracker.sync():
                return True
            if closing:
                return False
            failures = 0
        except Exception as error:
            failures += 1
            if failures == 1:
                print(f"MLflow at {tracker.place} does not take events; they are kept: {error}", flush=True)
            if closing and time.monotonic() - closing > RETRY_SECONDS:
                return False
        if closing:
            time.sleep(0.1)
        elif select.select([sys.stdin], [], [], min(RETRY_SECONDS, POLL_INTERVAL_SECONDS * 2**failures))[0]:
            closing = time.monotonic()


if __name__ == "__main__":
    # Ctrl-C and `ray job stop` are for the driver to hear.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(19)
    where, store = json.loads(sys.stdin.readline())
    sys.exit(0 if _follow(Path(where), store) else 1)
