"""`python -m orchestrator.tracking`: the process that follows a run log; `Tracker.start` in `driver.py` starts it."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from pathlib import Path

from tenacity import RetryCallState, Retrying, stop_after_delay, wait_exponential, wait_fixed

from orchestrator.tracking.driver import POLL_INTERVAL_SECONDS, RETRY_SECONDS, Tracker


class _Driver:
    """The process that started this one; it closes the pipe to stdin when it ends or has nothing more to track."""

    gone = False

    def wait(self, seconds: float) -> None:
        """Waits for that many seconds, or until the driver is gone."""
        self.gone = bool(select.select([sys.stdin], [], [], seconds)[0])


def _follow(tracker: Tracker) -> bool:
    """Tracks a run until its end is tracked, or what there is once the driver is gone.

    Returns:
        Whether the run's end has been tracked.
    """

    def report(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            error = state.outcome.exception()
            print(f"MLflow at {tracker.place} does not take events; they are tracked later: {error}", flush=True)

    def give_up(_: RetryCallState) -> bool:
        return False

    driver = _Driver()
    while_running = Retrying(
        wait=wait_exponential(multiplier=2 * POLL_INTERVAL_SECONDS, max=RETRY_SECONDS), stop=lambda _: driver.gone,
        sleep=driver.wait, before_sleep=report, retry_error_callback=give_up,
    )  # fmt: skip
    at_the_end = Retrying(
        wait=wait_fixed(0.1), stop=stop_after_delay(RETRY_SECONDS), before_sleep=report, retry_error_callback=give_up
    )
    while not driver.gone:
        if while_running(tracker.sync):
            return True
        if not driver.gone:
            driver.wait(POLL_INTERVAL_SECONDS)
    return at_the_end(tracker.sync)


if __name__ == "__main__":
    # Ctrl-C and `ray job stop` are for the driver to handle.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(19)
    where, store = json.loads(sys.stdin.readline())
    sys.exit(0 if _follow(Tracker(Path(where), store)) else 1)
