"""From a trial's workers to the driver: an actor that takes events without making a worker wait, and its thread."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

import ray

from orchestrator.execution.cluster import start_thread
from orchestrator.execution.event_log import EventLog
from orchestrator.execution.nodes import NODE_ID
from orchestrator.runlog.outbox import RunFolderError
from trainers.contract import clock
from trainers.contract.channel import Command
from trainers.contract.events import Event, Heartbeat

logger = logging.getLogger(__name__)

DRAIN_INTERVAL_SECONDS = 0.25
"""How often the driver fetches events."""

RPC_TIMEOUT_SECONDS = 120.0
"""Longest wait for the actor, on a machine that has far too much to do; after it, the actor counts as lost."""

CLOSE_TIMEOUT_SECONDS = 60.0
"""Longest wait for the last events."""


@dataclass(frozen=True, slots=True)
class HeartbeatSample:
    """A heartbeat, and when it was received."""

    heartbeat: Heartbeat
    """What the rank reported."""
    received: float
    """When the actor received it (Unix seconds of the driver's host)."""

    def seconds_in_section(self, now: float) -> float:
        """How long the rank has been in its section; only times of one host's clock are subtracted."""
        return self.heartbeat.time - self.heartbeat.since + now - self.received


class Telemetry:
    """The actor between workers and driver: holds events until the driver has persisted them."""

    def __init__(self, driver_clock: str) -> None:
        clock.adopt(driver_clock)
        self._events: list[Event] = []
        self._persisted = 0
        self._heartbeats: dict[int, HeartbeatSample] = {}
        self._command: Command = "run"
        self._trial, self._attempt = "", 0

    def now(self) -> float:
        """The run's time (Unix seconds), for workers on other machines."""
        return clock.now()

    def push(self, event: Event) -> None:
        """Takes an event from a worker."""
        self._events.append(event)

    def beat(self, heartbeat: Heartbeat) -> Command:
        """Takes a heartbeat and returns the driver's command."""
        if heartbeat.trial != self._trial or heartbeat.attempt < self._attempt:
            return "stop"  # it was cut off, and its trial was started again, or has ended, without it
        self._heartbeats[heartbeat.rank] = HeartbeatSample(heartbeat, clock.now())
        return self._command

    def received(self) -> int:
        """Number of events that workers have sent so far."""
        return self._persisted + len(self._events)

    def persisted(self) -> int:
        """Number of them that the driver is known to have on disk."""
        return self._persisted

    def drain(self, persisted: int) -> tuple[list[Event], int, dict[int, HeartbeatSample], float]:
        """Events after the first `persisted`, their number in all, each rank's last heartbeat, and the time."""
        del self._events[: persisted - self._persisted]
        self._persisted = persisted
        return self._events, persisted + len(self._events), self._heartbeats, clock.now()

    def order(self, command: Command, trial: str, attempt: int) -> None:
        """Sets what a trial's workers of an attempt are ordered with their next heartbeat; "run" drops earlier ones."""
        self._command, self._trial, self._attempt = command, trial, attempt
        if command == "run":
            self._heartbeats = {}


class EventPump:
    """Moves the events of one trial's workers from the actor to the run's events, in a thread.

    Args:
        log: The events of the run, which other trials that are under way add to as well.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self.heartbeats: dict[int, HeartbeatSample] = {}
        """The last heartbeat of each rank of the running attempt."""
        self.drained = 0.0
        """When they were fetched (Unix seconds)."""
        self.actor = self._start_actor()
        """Where the workers of the running attempt send their events."""
        self.lost = False
        """Whether the actor died or no longer answers; the next attempt gets a new one."""
        self._persisted = 0
        self._drain_lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = start_thread(self._run, "event-pump")

    @property
    def events(self) -> list[Event]:
        """All events of the run."""
        return self._log.events

    def emit(self, *events: Event) -> None:
        """Takes events of the driver itself; raises RunFolderError as `EventLog.emit` does."""
        self._log.emit(*events)

    def check(self) -> None:
        """Raises the RunFolderError for which workers' events can no longer be written, if there is one."""
        self._log.check()

    def begin(self, trial: str, attempt: int) -> None:
        """Prepares for the workers of a trial's new attempt."""
        if self.lost:
            self.actor, self._persisted, self.lost = self._start_actor(), 0, False
        self.heartbeats = {}
        self.order("run", trial, attempt)

    def order(self, command: Command, trial: str, attempt: int) -> None:
        """Orders all workers of a trial's attempt to go on or to end; the actor takes calls in their order."""
        self.actor.order.remote(command, trial, attempt)

    def drain(self) -> None:
        """Moves the events that there are."""
        with self._drain_lock:
            if self.lost:
                return
            try:
                drained = ray.get(self.actor.drain.remote(self._persisted), timeout=RPC_TIMEOUT_SECONDS)
            except ray.exceptions.RayError as error:  # GetTimeoutError among them
                logger.warning("the actor that takes the workers' events is lost: %s", error)
                self.lost = True
                return
            events, total, self.heartbeats, self.drained = drained
            if events:
                self.emit(*events)
            self._persisted = total

    def close(self) -> None:
        """Moves the rest and ends the thread."""
        self._ended.set()
        self._thread.join(timeout=CLOSE_TIMEOUT_SECONDS)

    @staticmethod
    def _start_actor() -> Any:
        # On the driver's node: the actor lives and dies with the driver, and no spot node takes it away.
        here = {NODE_ID: ray.get_runtime_context().get_node_id()}
        return ray.remote(Telemetry).options(num_cpus=0, label_selector=here).remote(clock.anchor())

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.drain()
            except RunFolderError:  # for the trial's thread, which asks for it
                return
            self._ended.wait(DRAIN_INTERVAL_SECONDS)
