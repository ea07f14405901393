"""`python -m orchestrator.tracking`: the process that follows a run log; `Tracker.start` in `driver.py` starts it."""

from __future__ import annotations

import json
import select
import signal
import sys
import time
from pathlib import Path

from orchestrator.process import prepare_process
from orchestrator.runlog.outbox import RunFolderError
from orchestrator.tracking.driver import POLL_INTERVAL_SECONDS, RETRY_SECONDS, Tracker, TrackingError


def _follow(tracker: Tracker) -> bool:
    """Tracks a run until its end is tracked (True), or what there is once its driver is gone: stdin ends with it.

    A driver that cannot write events any more says why before it goes; then the run is marked as failed.
    """
    failures, driver_gone, reason = 0, None, ""
    while True:
        try:
            if reason:
                tracker.fail(reason)
                return True
            if tracker.sync():
                return True
            failures = 0
        except TrackingError as error:
            failures += 1
            if failures == 1 and not isinstance(error.__cause__, RunFolderError):  # which the driver notices itself
                print(error, flush=True)
        if driver_gone is not None:
            if not failures or time.monotonic() - driver_gone > RETRY_SECONDS:
                return False
            time.sleep(0.1)
        elif select.select([sys.stdin], [], [], min(RETRY_SECONDS, POLL_INTERVAL_SECONDS * 2 ** min(failures, 9)))[0]:
            driver_gone, reason = time.monotonic(), sys.stdin.read()


if __name__ == "__main__":
    # Ctrl-C, a closed terminal and `ray job stop` are for the driver to handle.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prepare_process()  # a driver that is gone reads nothing
    where, store = json.loads(sys.stdin.readline())
    sys.exit(0 if _follow(Tracker(Path(where), store)) else 1)
