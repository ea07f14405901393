"""A worker's task, rank and node, and its connection to the driver. Standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trainers.contract.events import Event, Heartbeat
from trainers.contract.plan import TrialPlan

Command = Literal["run", "preempt", "stop"]
"""The driver's order: go on; end with a checkpoint, to be started again elsewhere; end with a checkpoint."""

ENDED = "ended"
"""Part of a step that a rank's last heartbeat names: there is none after it."""


@dataclass(frozen=True, slots=True)
class Start:
    """What workers are to train."""

    plan: TrialPlan
    """The trial."""
    attempt: int
    """Number of this start of it, from 0."""
    telemetry: Any
    """Handle of the actor that takes their events."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which of a trial's workers this is, and where it runs; `local_…` within its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    node_id: str = ""
    """Ray's id of the node; empty outside Ray."""

    @property
    def num_nodes(self) -> int:
        """Hosts of the workers, which lie equally on them."""
        return self.world_size // self.local_world_size


@dataclass(frozen=True, slots=True)
class Channel:
    """A worker's connection to the driver."""

    push: Callable[[Event], None]
    """Sends an event without waiting."""
    beat: Callable[[Heartbeat], Command]
    """Sends a heartbeat and returns the driver's command; may take a while, and raises when there is no answer."""
    flush: Callable[[], None] = lambda: None
    """Waits until all events that this rank has pushed have left its process."""
    wait_until_persisted: Callable[[], bool] = lambda: True
    """Waits until all events received so far, from any rank, are on the driver's disk; returns whether they are."""
