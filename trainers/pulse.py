"""Sends a rank's heartbeats and its node's load from a background thread, and keeps the driver's latest command."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainers import machine
from trainers.contract import clock
from trainers.contract.channel import ENDED, Channel, Command, Placement
from trainers.contract.events import Heartbeat, Section, SystemSampled

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
SYSTEM_SAMPLE_SECONDS = 10.0


@dataclass(slots=True)
class Activity:
    """What the training thread is doing; read by the thread that sends heartbeats."""

    section: Section = "setup"
    part: str = ""
    """`data`, `forward`, `backward`, `optimizer`; empty outside steps."""
    iteration: int = 0
    """Iterations done."""
    since: float = field(default_factory=clock.now)
    """When the section began (Unix seconds); every step begins a new section."""
    image_files: tuple[str, ...] = ()
    """Images of the current batch."""

    def enter(self, section: Section, part: str = "") -> None:
        """Marks the beginning of a section, or of a part of a step."""
        if section != self.section or part in ("", "data"):
            self.since = clock.now()
        self.section, self.part = section, part


class Pulse:
    """Runs within its `with` block; `event` makes an event of the rank from its class and fields."""

    def __init__(self, event: Callable[..., Any], placement: Placement, channel: Channel, activity: Activity) -> None:
        self._event, self._placement, self._channel, self._activity = event, placement, channel, activity
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self.command: Command = "run"
        """The driver's answer to the last heartbeat."""

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        next_sample = 0.0
        while not self._ended.is_set():
            self._beat(self._activity.part)
            if self._placement.local_rank == 0 and time.monotonic() >= next_sample:
                next_sample = time.monotonic() + SYSTEM_SAMPLE_SECONDS
                values = machine.system_metrics()
                self._channel.push(self._event(SystemSampled, host=self._placement.host, values=values))
            self._ended.wait(HEARTBEAT_SECONDS)
        self._beat(ENDED)

    def _beat(self, part: str) -> None:
        activity = self._activity
        heartbeat = self._event(
            Heartbeat,
            section=activity.section,
            part=part,
            iteration=activity.iteration,
            since=activity.since,
            image_files=activity.image_files,
        )
        try:
            command = self._channel.beat(heartbeat)
        except Exception as error:  # noqa: BLE001 - the driver may be away for a while; training goes on
            logger.debug("no answer from the driver: %r", error)
            return
        if command != self.command:
            logger.info("The driver's command: %s", command)
        self.command = command
