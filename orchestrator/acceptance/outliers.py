"""Which of some values of one quantity fall behind the others: by median and median absolute deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from orchestrator.acceptance.quantities import Quantity

NORMAL = 1.4826
"""Median absolute deviation to standard deviation of a normal distribution (Rousseeuw and Croux, 1993)."""

DEVIATIONS = 5.0
"""Standard deviations by which a value must be worse; of a thousand healthy ones, none is."""

MAX_TOLERANCE = 2.0
"""Tolerances by which a value is worse in any case: of a few values, the deviation is known poorly."""

PAIR_TOLERANCE = 1.5
"""How much wider the tolerance is between two values: their difference has the spread of both."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Outlier(Generic[K]):
    """A value that falls behind."""

    name: K
    value: float
    typical: float
    """Median of all, or the other one of two."""
    num_peers: int
    """How many others there are."""


def outliers(values: Mapping[K, float], quantity: Quantity) -> list[Outlier[K]]:
    """Finds the values that are worse than their peers by more than healthy ones are, the worst first.

    The logarithm of a value is compared with the median of all: it must be worse by more than the quantity's tolerance
    and more than five standard deviations, which are estimated from the median absolute deviation, or by more than
    twice the tolerance. So fewer than half of the values may be bad without hiding each other. Of two values there is
    no majority: the worse one is named where it is worse by half as much again. One value has no peers.

    Args:
        values: Positive values by name.
        quantity: What they are of.
    """
    if len(values) < 2 or statistics.median_high(values.values()) < quantity.idle_from:
        return []
    sign = -1.0 if quantity.less_is_better else 1.0
    logs = {name: sign * math.log(max(value, 1e-12)) for name, value in values.items()}
    if len(values) == 2:
        center, limit = max(logs.values()), PAIR_TOLERANCE * quantity.tolerance
    else:
        center = statistics.median(logs.values())
        deviation = NORMAL * statistics.median(abs(value - center) for value in logs.values())
        limit = min(max(quantity.tolerance, DEVIATIONS * deviation), MAX_TOLERANCE * quantity.tolerance)
    behind = sorted((name for name, value in logs.items() if center - value > limit), key=lambda name: logs[name])
    return [Outlier(name, values[name], math.exp(sign * center), len(values) - 1) for name in behind]
