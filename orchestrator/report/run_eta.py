"""Estimates when a run ends, from the trials that have ended and those that are under way."""

from __future__ import annotations

import heapq
import statistics


class RunEta:
    """The time to the end of a run's trials.

    A trial that has not begun counts as long as the mean of the others, and begins where one of those ends that are
    under way at a time.

    Args:
        num_trials: How many there are to run; 0 where that is not known.
    """

    def __init__(self, num_trials: int) -> None:
        self.num_trials, self.num_ended = num_trials, 0
        self._began: dict[str, float] = {}
        self._etas: dict[str, float | None] = {}
        self._durations: list[float] = []
        self._most = 1

    @property
    def any_live(self) -> bool:
        """Whether a trial is under way."""
        return bool(self._began)

    def began(self, trial: str, when: float) -> None:
        """Takes the beginning of a trial (Unix seconds)."""
        self._began[trial], self._etas[trial] = when, None
        self._most = max(self._most, len(self._began))

    def ended(self, trial: str, when: float) -> None:
        """Takes the end of a trial (Unix seconds)."""
        self.num_ended += 1
        self._etas.pop(trial, None)
        if (began := self._began.pop(trial, None)) is not None:
            self._durations.append(when - began)

    def left(self, trial: str, eta: float | None, when: float) -> float | None:
        """Seconds to the end of the run; None where a trial that is under way does not know its own.

        Args:
            trial: The trial that has news.
            eta: Seconds to its end; None for not known.
            when: The time of its news (Unix seconds).
        """
        self._etas[trial] = eta
        known = [each for each in self._etas.values() if each is not None]
        if len(known) < len(self._etas):
            return None
        whole = [when - self._began[name] + each for name, each in self._etas.items() if each is not None]
        usual = statistics.fmean([*self._durations, *whole])
        slots = sorted(known + [0.0] * (self._most - len(known)))
        for _ in range(self.num_trials - self.num_ended - len(known)):
            heapq.heappush(slots, heapq.heappop(slots) + usual)
        return max(slots)
