"""The events of a run as its driver has them: written to the outbox first, then given to the listeners.

The trials that are under way share it, each from threads of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from orchestrator.runlog.outbox import Outbox, RunFolderError
from trainers.contract import clock
from trainers.contract.events import Event

logger = logging.getLogger(__name__)

RETRY_INTERVAL_SECONDS = 1.0
"""Pause after events could not be written to disk."""

GIVE_UP_SECONDS = 30.0
"""How long events that cannot be written are tried again: somebody may make room. Meanwhile no checkpoint counts."""


class EventLog:
    """Takes events from any thread, one call after the other.

    Args:
        outbox: Where events are persisted; those that it holds already are the beginning of `events`.
        listeners: Called with every event once it is on disk; an exception of one is logged, not raised.
    """

    def __init__(self, outbox: Outbox, listeners: list[Callable[[Event], None]]) -> None:
        self.outbox, self._listeners = outbox, listeners
        self.events: list[Event] = [event for event, _ in outbox.read()]
        """All events of the run; it only grows."""
        clock.not_before(max((event.time for event in self.events), default=0.0))
        self.failure: RunFolderError | None = None
        """Why the run's folder cannot be written any more, which ends all trials; None while it can be."""
        self._lock = threading.Lock()

    def emit(self, *events: Event) -> None:
        """Takes events.

        Raises:
            RunFolderError: They cannot be written, also after a while.
        """
        with self._lock:
            self._append(events)
            self.events.extend(events)
            for event in events:
                for listener in self._listeners:
                    try:
                        listener(event)
                    except Exception:
                        logger.exception("a listener failed on %s", event.kind)

    def check(self) -> None:
        """Raises the RunFolderError for which the run cannot go on, if there is one."""
        if self.failure:
            raise self.failure

    def give_up(self, error: RunFolderError) -> None:
        """Ends all trials, for an error of a write elsewhere in the run's folder."""
        self.failure = self.failure or error

    def _append(self, events: Sequence[Event]) -> None:
        began = time.monotonic()
        while True:
            self.check()
            try:
                return self.outbox.append(*events)
            except RunFolderError as error:
                if error.gone or time.monotonic() - began > GIVE_UP_SECONDS:
                    self.failure = error
                    raise
                time.sleep(RETRY_INTERVAL_SECONDS)
