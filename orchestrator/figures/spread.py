"""How sure a figure is: repeats summed up, and a ratio of two runs with its interval. Deterministic, no sampling.

The trap it protects against: the steps of one run resemble their neighbours, so counting each as a measurement of its
own makes intervals far too narrow. Steps are gathered into a few long batches first, and two runs are best compared by
repeats, which alone see what differs from run to run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.figures.records import Spread
from trainers.clock import Stretch, join_stretches, rate

MAX_BATCHES = 10
"""Batches a run's steps are gathered into; Schmeiser, "Batch size effects in the analysis of simulation output",
Operations Research 30 (1982), finds nothing gained by more than 10 to 30."""

MIN_BATCHES = 4
"""Fewer say nothing of a spread."""

_T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
"""97.5 % points of Student's t for 1 to 30 degrees of freedom (any statistical table)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval.

    Attributes:
        value: The figure.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def t_975(degrees: float) -> float:
    """97.5 % point of Student's t, for intervals of 95 %.

    Between whole degrees of freedom the smaller one's point is taken, which is on the safe side. Above 30 it is the
    expansion in 1 / degrees (Abramowitz and Stegun, 26.7.5), good to four decimals there.

    Raises:
        ValueError: Below one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"no spread with {degrees} degrees of freedom")
    if degrees <= 30:
        return _T_975[int(degrees) - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def spread(values: Sequence[float]) -> Spread | None:
    """Sums up the values repeats gave; None of none. The interval is of the mean, by Student's t."""
    if not values:
        return None
    ordered = sorted(values)
    mean = statistics.fmean(ordered)
    half = None
    if len(ordered) > 1:
        half = t_975(len(ordered) - 1) * statistics.stdev(ordered) / math.sqrt(len(ordered))
    return Spread(
        num_values=len(ordered),
        median=statistics.median(ordered),
        minimum=ordered[0],
        maximum=ordered[-1],
        mean=mean,
        low=mean - half if half is not None else None,
        high=mean + half if half is not None else None,
        trimmed_mean=statistics.fmean(ordered[1:-1]) if len(ordered) >= 5 else None,
    )


def ratio_within_runs(above: Sequence[Stretch], below: Sequence[Stretch]) -> Interval | None:
    """Ratio of two runs' throughputs with an interval from the spread within each run.

    Each throughput is a ratio estimator over batches (Cochran, "Sampling Techniques", 1977, section 6.3); the variances
    of the two logarithms add up, and the degrees of freedom are Welch's.

    Args:
        above: Drift curve of the run that is compared, cut to what is compared.
        below: Drift curve of the run it is compared with.

    Returns:
        None where a run has too few stretches to have a spread, or no throughput.
    """
    rates = rate(above), rate(below)
    variances = _relative_variance(above), _relative_variance(below)
    if not rates[0] or not rates[1] or variances[0] is None or variances[1] is None:
        return None
    return _ratio(rates[0] / rates[1], [variances[0], variances[1]])


def ratio_between_repeats(above: Sequence[float], below: Sequence[float]) -> Interval | None:
    """Ratio of the medians of two sets of repeats, with Welch's interval on the logarithm.

    Returns:
        None with fewer than two values on a side, or where one is not positive.
    """
    if min(len(above), len(below)) < 2 or min(*above, *below) <= 0:
        return None
    logs = [[math.log(value) for value in values] for values in (above, below)]
    variances = [(statistics.variance(values) / len(values), len(values) - 1) for values in logs]
    return _ratio(statistics.median(above) / statistics.median(below), variances)


def _relative_variance(points: Sequence[Stretch]) -> tuple[float, int] | None:
    """Variance of the logarithm of a run's throughput, and its degrees of freedom, by batches of stretches."""
    batches = join_stretches(points, max(1, math.ceil(len(points) / MAX_BATCHES)))
    mean_rate = rate(batches)
    if len(batches) < MIN_BATCHES or not mean_rate:
        return None
    residuals = [batch.seconds - batch.num_images / mean_rate for batch in batches]
    seconds = sum(batch.seconds for batch in batches)
    count = len(batches)
    return count / (count - 1) * sum(r * r for r in residuals) / seconds**2, count - 1


def _ratio(ratio: float, variances: Sequence[tuple[float, int]]) -> Interval:
    total = sum(variance for variance, _ in variances)
    if total == 0:
        return Interval(ratio, ratio, ratio)
    # Welch–Satterthwaite.
    degrees = total**2 / sum(variance**2 / freedom for variance, freedom in variances)
    half = t_975(degrees) * math.sqrt(total)
    return Interval(ratio, ratio * math.exp(-half), ratio * math.exp(half))
