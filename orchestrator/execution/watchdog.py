"""Finds the rank that holds the others up, from what every rank last said of itself.

The trap it protects against: when one rank is stuck, all others wait for it in the next collective and look just as
stuck. The one to blame is the one that has come least far.
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
"""How long a verdict must hold: after a sleep of the whole machine, everybody's last sign is old."""


@dataclass(frozen=True, slots=True)
class Stuck:
    """A rank that holds the others up.

    Attributes:
        rank: Which.
        message: What it does or does not do, and for how long.
        last: Its last heartbeat; None where it never sent one.
        began: Since when it is so (Unix seconds of the driver's host).
    """

    rank: int
    message: str
    last: Heartbeat | None
    began: float


class Watchdog:
    """Looks at the ranks of one attempt.

    Args:
        timeouts: Seconds by section, and `heartbeat`.
        world_size: Number of ranks.
        started: When the attempt was begun (Unix seconds of the driver's host).
    """

    def __init__(self, timeouts: dict[str, float], world_size: int, started: float) -> None:
        self._timeouts, self.world_size, self._started = timeouts, world_size, started
        self._suspected: tuple[set[int], float] = (set(), 0.0)

    def look(self, signs: dict[int, HeartbeatSample], now: float) -> list[Stuck]:
        """The ranks that are stuck, once that is certain.

        Args:
            signs: The last sign of life of each rank.
            now: When those were looked up (Unix seconds of the driver's host).
        """
        found = self._find(signs, now)
        ranks, since = {stuck.rank for stuck in found}, self._suspected[1]
        if ranks != self._suspected[0]:
            self._suspected = (ranks, now)
            return []
        return found if found and now - since >= CONFIRM_TIMEOUT_SECONDS else []

    def _find(self, signs: dict[int, HeartbeatSample], now: float) -> list[Stuck]:
        silent = [
            Stuck(rank, f"no sign of life for {now - sign.received:.0f} s", sign.heartbeat, sign.received)
            for rank, sign in signs.items()
            if sign.heartbeat.part != ENDED and now - sign.received > self._timeouts["heartbeat"]
        ]
        if silent:
            return silent
        if now - self._started > self._timeouts["setup"]:
            absent = [rank for rank in range(self.world_size) if rank not in signs]
            if absent:
                message = f"did not start within {now - self._started:.0f} s"
                return [Stuck(rank, message, None, self._started) for rank in absent]
        slow = {rank: sign for rank, sign in signs.items() if self._overdue(sign, now)}
        if not slow:
            return []
        # Whoever waits for the others is overdue as well: the least advanced rank is the one they wait for.
        behind = min(_progress(sign.heartbeat) for sign in signs.values() if sign.heartbeat.part != ENDED)
        return [
            Stuck(rank, _where(sign.heartbeat, seconds), sign.heartbeat, now - seconds)
            for rank, sign in signs.items()
            if _progress(sign.heartbeat) == behind
            for seconds in [sign.seconds_in_section(now)]
        ]

    def _overdue(self, sign: HeartbeatSample, now: float) -> bool:
        heartbeat = sign.heartbeat
        return heartbeat.part != ENDED and sign.seconds_in_section(now) > self._timeouts[heartbeat.section]


def _progress(heartbeat: Heartbeat) -> tuple[int, int, int]:
    part = PARTS.index(heartbeat.part) if heartbeat.part in PARTS else len(PARTS)
    return heartbeat.iteration, SECTIONS.index(heartbeat.section), part


def _where(heartbeat: Heartbeat, seconds: float) -> str:
    part = f" ({heartbeat.part})" if heartbeat.part else ""
    return f"{heartbeat.section}{part} of iteration {heartbeat.iteration} has taken {seconds:.0f} s"
