"""Finds the rank that holds the others up, from the last heartbeat of every rank.

When one rank is stuck, all others wait for it in the next collective and look just as stuck: the one to blame is the
least advanced.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.execution.event_pump import HeartbeatSample
from trainers.contract.channel import ENDED
from trainers.contract.events import Heartbeat

SECTIONS = ("setup", "report", "evaluation", "checkpoint", "step")
"""In the order in which a rank goes through them between two values of `iteration`."""

PARTS = ("", "data", "forward", "backward", "optimizer")

CONFIRM_TIMEOUT_SECONDS = 2.0
"""How long a verdict must hold: after a sleep of the whole machine, the last heartbeats of all ranks are old."""


@dataclass(frozen=True, slots=True)
class Stuck:
    """A rank that holds the others up."""

    rank: int
    """Its number."""
    message: str
    """What it does or does not do, and for how long."""
    last: Heartbeat | None
    """Its last heartbeat; None where it never sent one."""
    began: float
    """Since when it has been stuck (Unix seconds of the driver's host)."""


class Watchdog:
    """Watches the ranks of one attempt.

    Args:
        timeouts: Seconds by section, and `heartbeat`.
        world_size: Number of ranks.
        started: When the attempt was started (Unix seconds of the driver's host).
    """

    def __init__(self, timeouts: dict[str, float], world_size: int, started: float) -> None:
        self._timeouts, self._world_size, self._started = timeouts, world_size, started
        self._suspected: tuple[set[int], float] = (set(), 0.0)

    def look(self, samples: dict[int, HeartbeatSample], now: float) -> list[Stuck]:
        """The ranks that are stuck, once that is certain.

        Args:
            samples: The last heartbeat of each rank.
            now: When they were fetched (Unix seconds of the driver's host).
        """
        found = self._find(samples, now)
        ranks, since = {stuck.rank for stuck in found}, self._suspected[1]
        if ranks != self._suspected[0]:
            self._suspected = (ranks, now)
            return []
        return found if found and now - since >= CONFIRM_TIMEOUT_SECONDS else []

    def all_ended(self, samples: dict[int, HeartbeatSample], now: float) -> bool:
        """Whether all ranks ended longer ago than `heartbeat`: Ray Train, which ends soon after them, is stuck.

        Args:
            samples: The last heartbeat of each rank.
            now: When they were fetched (Unix seconds of the driver's host).
        """
        ended = [sample.received for sample in samples.values() if sample.heartbeat.part == ENDED]
        begun = bool(ended) and min(ended) > self._started  # else they are of the attempt before
        return begun and len(ended) == self._world_size and now - max(ended) > self._timeouts["heartbeat"]

    def _find(self, samples: dict[int, HeartbeatSample], now: float) -> list[Stuck]:
        running = {rank: sample for rank, sample in samples.items() if sample.heartbeat.part != ENDED}
        silent = [
            Stuck(rank, f"no sign of life for {now - sample.received:.0f} s", sample.heartbeat, sample.received)
            for rank, sample in running.items()
            if now - sample.received > self._timeouts["heartbeat"]
        ]
        if silent:
            return silent
        elapsed = now - self._started
        absent = [rank for rank in range(self._world_size) if rank not in samples]
        if absent and elapsed > self._timeouts["setup"]:
            return [Stuck(rank, f"did not start within {elapsed:.0f} s", None, self._started) for rank in absent]
        if not any(self._is_overdue(sample, now) for sample in running.values()):
            return []
        # A rank that waits for the others is overdue as well: they wait for the least advanced one.
        behind = min(_progress(sample.heartbeat) for sample in running.values())
        return [
            Stuck(rank, _description(sample.heartbeat, seconds), sample.heartbeat, now - seconds)
            for rank, sample in samples.items()
            if _progress(sample.heartbeat) == behind
            for seconds in [sample.seconds_in_section(now)]
        ]

    def _is_overdue(self, sample: HeartbeatSample, now: float) -> bool:
        return sample.seconds_in_section(now) > self._timeouts[sample.heartbeat.section]


def _progress(heartbeat: Heartbeat) -> tuple[int, int, int]:
    part = PARTS.index(heartbeat.part) if heartbeat.part in PARTS else len(PARTS)
    return heartbeat.iteration, SECTIONS.index(heartbeat.section), part


def _description(heartbeat: Heartbeat, seconds: float) -> str:
    part = f" ({heartbeat.part})" if heartbeat.part else ""
    return f"{heartbeat.section}{part} of iteration {heartbeat.iteration} has taken {seconds:.0f} s"
