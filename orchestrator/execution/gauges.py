"""Shows the figures of running trials as gauges of Ray, which every node exports for Prometheus."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from ray.util.metrics import Gauge

from orchestrator.execution.cluster import start_thread
from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.gauges import GAUGES, TAGS, LiveFigures
from trainers.contract.events import Event

logger = logging.getLogger(__name__)

REFRESH_INTERVAL_SECONDS = 5.0
"""How often each gauge is set: Ray exports a value once, within 10 s, and its node shows it for 20 s after that."""

GOODPUT_INTERVAL_SECONDS = 30.0
"""How often the goodput is computed, which takes all events of a trial."""


class Gauges:
    """Keeps gauges at the latest figures of a run while it is entered, in a thread.

    A trial that has ended, or lost its driver, is not shown any more half a minute later.

    Args:
        events: All events of the run so far, to which others are added meanwhile.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        self._events, self._num_taken, self._figures = events, 0, LiveFigures()
        self._gauges = {name: Gauge(name, _ascii(FIGURES[key].definition), TAGS) for key, name in GAUGES.items()}
        self._next_goodput = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> Gauges:
        start_thread(self._run, "gauges")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def refresh(self) -> None:
        """Takes the events that are new, and sets every gauge."""
        new = self._events[self._num_taken :]
        self._num_taken += len(new)
        for event in new:
            self._figures.take(event)
        if time.monotonic() >= self._next_goodput:
            self._next_goodput = time.monotonic() + GOODPUT_INTERVAL_SECONDS
            self._figures.take_goodput(self._events[: self._num_taken])
        for name, labels, value in self._figures.values():
            self._gauges[name].set(value, dict(zip(TAGS, map(_ascii, labels), strict=True)))

    def _run(self) -> None:
        while not self._ended.wait(REFRESH_INTERVAL_SECONDS):
            try:
                self.refresh()
            except Exception:  # what is shown must not end what is trained
                logger.exception("the gauges cannot be set")
                return


def _ascii(text: str) -> str:
    """A text as Ray takes it for a description or a label."""
    return text.replace("–", "-").encode("ascii", "backslashreplace").decode()
