"""From the workers to the driver: an actor that takes events without making a worker wait, and the thread behind it."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from orchestrator.runlog.outbox import Outbox
from trainers.contract.channel import Command
from trainers.contract.events import Event, Heartbeat

logger = logging.getLogger(__name__)

DRAIN_INTERVAL_SECONDS = 0.25

RPC_TIMEOUT_SECONDS = 120.0
"""Longest wait for the actor, on a machine that has far too much to do; after it, the actor counts as lost."""


@dataclass(frozen=True, slots=True)
class HeartbeatSample:
    """A sign of life.

    Attributes:
        heartbeat: What the rank said.
        received: When it arrived (Unix seconds of the driver's host).
    """

    heartbeat: Heartbeat
    received: float

    def seconds_in_section(self, now: float) -> float:
        """How long the rank has been where it was last heard of; only differences of one host's clock are taken."""
        return self.heartbeat.time - self.heartbeat.since + now - self.received


class Telemetry:
    """The actor between workers and driver: keeps events until the driver has written them down."""

    def __init__(self) -> None:
        gc.enable()  # Ray's processes start without (`start_ray`), and this one lives as long as the run
        self._events: list[Event] = []
        self._taken = 0
        self._heartbeats: dict[int, HeartbeatSample] = {}
        self._command: Command = "run"
        self._attempt = 0

    def push(self, event: Event) -> None:
        """Takes an event from a worker."""
        self._events.append(event)

    def beat(self, heartbeat: Heartbeat) -> Command:
        """Takes a heartbeat and tells the worker what the driver wants."""
        if heartbeat.attempt < self._attempt:
            return "stop"  # it was cut off, and its trial was started again without it
        self._heartbeats[heartbeat.rank] = HeartbeatSample(heartbeat, time.time())
        return self._command

    def arrived(self) -> int:
        """Number of events that workers have sent so far."""
        return self._taken + len(self._events)

    def written(self) -> int:
        """Number of them that the driver is known to have on disk."""
        return self._taken

    def drain(self, taken: int) -> tuple[list[Event], int, dict[int, HeartbeatSample], float]:
        """Events after the first `taken`, how many there are by now, each rank's last heartbeat, and the time."""
        del self._events[: taken - self._taken]
        self._taken = taken
        return self._events, taken + len(self._events), self._heartbeats, time.time()

    def order(self, command: Command, attempt: int) -> None:
        """What workers of an attempt are told with their next heartbeat; "run" forgets the heartbeats before it."""
        self._command, self._attempt = command, attempt
        if command == "run":
            self._heartbeats = {}


class EventPump:
    """Moves events from the actor to the outbox and then to whoever shows them, in a thread of its own.

    Args:
        outbox: Where events are kept; those that are there already are the beginning of `events`.
        listeners: Called with every event once it is on disk; an exception of one is logged, not passed on.

    Attributes:
        events: All events of the run.
        actor: Where the workers of the running attempt send theirs.
        lost: Whether that died or answers no more; the next attempt gets a new one.
        heartbeats: The last of each rank of the running attempt.
        drained: When they were fetched (Unix seconds).
    """

    def __init__(self, outbox: Outbox, listeners: list[Callable[[Event], None]]) -> None:
        self.outbox, self._listeners = outbox, listeners
        self.events: list[Event] = [event for event, _ in outbox.read()]
        self.heartbeats: dict[int, HeartbeatSample] = {}
        self.drained = 0.0
        self.lost, self._taken = True, 0
        self._drain_lock = threading.Lock()
        self._renew()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event-pump", daemon=True)
        self._thread.start()

    def emit(self, *events: Event) -> None:
        """Takes events of the driver itself."""
        self.outbox.append(*events)
        self.events.extend(events)
        for event in events:
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:
                    logger.exception("a listener failed on %s", event.kind)

    def begin(self, attempt: int) -> None:
        """Prepares for the workers of a new attempt."""
        if self.lost:
            self._renew()
        self.heartbeats = {}
        self.order("run", attempt)

    def order(self, command: Command, attempt: int) -> None:
        """Tells all workers of an attempt to go on or to end; the actor takes calls in their order."""
        self.actor.order.remote(command, attempt)

    def drain(self) -> None:
        """Moves what is there now."""
        with self._drain_lock:
            if self.lost:
                return
            try:
                drained = ray.get(self.actor.drain.remote(self._taken), timeout=RPC_TIMEOUT_SECONDS)
            except ray.exceptions.RayError as error:  # GetTimeoutError among them
                logger.warning("the actor that takes the workers' events is lost: %s", error)
                self.lost = True
                return
            events, taken, self.heartbeats, self.drained = drained
            if events:
                self.emit(*events)
            self._taken = taken

    def close(self) -> None:
        """Moves the rest and ends the thread."""
        self._ended.set()
        self._thread.join(timeout=60)

    def _renew(self) -> None:
        # On the driver's node: the actor lives and dies with the driver, and no spot node takes it away.
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self.actor: Any = ray.remote(Telemetry).options(num_cpus=0, label_selector=here).remote()
        self.lost, self._taken = False, 0

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.drain()
            except OSError as error:
                logger.warning("events could not be written down: %s", error)
                time.sleep(1)
            self._ended.wait(DRAIN_INTERVAL_SECONDS)
