"""A worker's place among the others, and its connection to the driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainers.contract.events import Event, Heartbeat

Command = Literal["run", "preempt", "stop"]
"""What the driver wants: go on; end with a checkpoint and be started again elsewhere; end with a checkpoint."""


ENDED = "ended"
"""Part that a rank's last heartbeat names: it is silent from then on."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a worker stands among the others.

    Attributes:
        rank: Rank among all workers.
        world_size: Number of workers.
        local_rank: Rank within its node.
        local_world_size: Workers on its node.
        host: Host name.
        node_id: Ray's id of the node, or "".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class Channel:
    """A worker's way to the driver.

    Attributes:
        push: Sends an event without waiting.
        beat: Sends a heartbeat and returns what the driver wants; may take a while, raises when there is no answer.
        flush: Waits until all that this rank has pushed has left its process.
        kept: Waits until all that has arrived from any rank is on the driver's disk; returns whether it is.
    """

    push: Callable[[Event], None]
    beat: Callable[[Heartbeat], Command]
    flush: Callable[[], None] = lambda: None
    kept: Callable[[], bool] = lambda: True
