"""From the workers to the driver: an actor that takes events without making a worker wait, and the thread behind it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from orchestrator.outbox import Outbox
from trainers.contract import Event, Heartbeat
from trainers.worker import Command

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 0.25


class Telemetry:
    """The actor between workers and driver: keeps events until the driver has written them down."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._taken = 0
        self._heartbeats: dict[int, Heartbeat] = {}
        self._command: Command = "run"

    def push(self, event: Event) -> None:
        """Takes an event from a worker."""
        self._events.append(event)

    def beat(self, heartbeat: Heartbeat) -> Command:
        """Takes a heartbeat and tells the worker what the driver wants."""
        self._heartbeats[heartbeat.rank] = heartbeat
        return self._command

    def drain(self, taken: int) -> tuple[list[Event], int, dict[int, Heartbeat]]:
        """Events after the first `taken` of all, how many there are by now, and the last heartbeat of each rank."""
        del self._events[: taken - self._taken]
        self._taken = taken
        return self._events, taken + len(self._events), self._heartbeats

    def order(self, command: Command) -> None:
        """What workers are told with their next heartbeat; "run" also forgets the heartbeats of an earlier attempt."""
        self._command = command
        if command == "run":
            self._heartbeats = {}


class EventPump:
    """Moves events from the actor to the outbox and then to whoever shows them, in a thread of its own.

    Args:
        outbox: Where events are kept.
        listeners: Called with every event once it is on disk; an exception of one is logged, not passed on.
    """

    def __init__(self, outbox: Outbox, listeners: list[Callable[[Event], None]]) -> None:
        self.outbox, self._listeners = outbox, listeners
        # On the driver's node: the actor lives and dies with the driver, and no spot node takes it away.
        self.actor: Any = (
            ray.remote(Telemetry)
            .options(num_cpus=0, label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()})
            .remote()
        )
        self.heartbeats: dict[int, Heartbeat] = {}
        self.events: list[Event] = []
        self._taken = 0
        self._drain_lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event-pump", daemon=True)
        self._thread.start()

    def tell(self, *events: Event) -> None:
        """Takes events of the driver itself."""
        self.outbox.append(*events)
        self.events.extend(events)
        for event in events:
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:
                    logger.exception("a listener failed on %s", event.kind)

    def order(self, command: Command) -> None:
        """Tells all workers to go on or to stop."""
        ray.get(self.actor.order.remote(command), timeout=30)

    def drain(self) -> None:
        """Moves what is there now."""
        with self._drain_lock:
            events, self._taken, self.heartbeats = ray.get(self.actor.drain.remote(self._taken), timeout=30)
            if events:
                self.tell(*events)

    def close(self) -> None:
        """Moves the rest and ends the thread."""
        self._ended.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.drain()
            except Exception as error:
                logger.warning("events could not be fetched from the workers' side: %s", error)
                time.sleep(1)
            self._ended.wait(DRAIN_SECONDS)
