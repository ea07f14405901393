"""Decides when training has improved nothing for too long (`protocol.patience`). Standard library only.

The worker stops by it, and the driver says by it why a trial was stopped.
"""

from __future__ import annotations

import math
from typing import Any

TOLERANCE = 1e-9
"""Differences of two figures are rounded: 37.3 - 37.2 is a little less than 0.1."""


class Patience:
    """Counts evaluations since the last one that was an improvement.

    Args:
        limit: Evaluations without an improvement after which training ends; None for never.
        min_improvement: By how much an evaluation must be better than the last improvement to be one.
    """

    def __init__(self, limit: int | None, min_improvement: float) -> None:
        self._limit, self._min_improvement = limit, min_improvement
        self.best: float | None = None
        """Rating of the last improvement; None before the first."""
        self.best_iteration: int | None = None
        """Iterations after which it was evaluated."""
        self.num_since = 0
        """Evaluations since then."""

    @property
    def exhausted(self) -> bool:
        """Whether training ends."""
        return self._limit is not None and self.num_since >= self._limit

    def add(self, iteration: int, rating: float | None) -> None:
        """Counts an evaluation.

        Args:
            iteration: Iterations done; evaluations come in their order.
            rating: The higher the better; an evaluation without one (None, NaN) is no improvement.
        """
        if rating is not None and not math.isnan(rating) and self._improves(rating):
            self.best, self.best_iteration, self.num_since = rating, iteration, 0
        else:
            self.num_since += 1

    def _improves(self, rating: float) -> bool:
        if self.best is None:
            return True
        return rating > self.best and rating - self.best >= self._min_improvement - TOLERANCE

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"best": self.best, "best_iteration": self.best_iteration, "num_since": self.num_since}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.best, self.best_iteration, self.num_since = (
            state[name] for name in ("best", "best_iteration", "num_since")
        )
