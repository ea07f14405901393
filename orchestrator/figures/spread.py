"""How sure a figure is: repeats summed up, and a ratio of two runs with its 95 % interval; deterministic, no sampling.

The steps of one run resemble their neighbours, so counting each as a measurement by itself would make intervals far too
narrow: they are gathered into a few long batches first. Only repeats see what differs from run to run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.figures.records import CurvePoint
from orchestrator.figures.scaling_records import Spread
from orchestrator.figures.throughput import join_points, rate

MAX_BATCHES = 10
"""Batches a run's steps are gathered into; Schmeiser, "Batch size effects in the analysis of simulation output",
Operations Research 30 (1982), finds nothing gained by more than 10 to 30."""

MIN_BATCHES = 4
"""Fewer say nothing of a spread."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    """The figure."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""


def t_975(degrees: float) -> float:
    """97.5 % point of Student's t, for intervals of 95 %.

    Args:
        degrees: Degrees of freedom; a fraction is allowed, as Welch's are.
    """
    from scipy import stats

    return float(stats.t.ppf(0.975, degrees))


def spread(values: Sequence[float]) -> Spread | None:
    """Sums up a figure's values over repeats; None of none. The interval is of the mean, by Student's t."""
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


def ratio_within_runs(above: Sequence[CurvePoint], below: Sequence[CurvePoint]) -> Interval | None:
    """Ratio of two runs' throughputs with an interval from the spread within each run.

    Each throughput is a ratio estimator over batches (Cochran, "Sampling Techniques", 1977, section 6.3); the variances
    of the two logarithms add up, and the degrees of freedom are Welch's.

    Args:
        above: Drift curve of the run that is compared, cut to what is compared.
        below: Drift curve of the run it is compared with.

    Returns:
        None where a run has too few points to have a spread, or no throughput.
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


def _relative_variance(points: Sequence[CurvePoint]) -> tuple[float, int] | None:
    """Variance of the logarithm of a run's throughput, and its degrees of freedom, by batches of points."""
    batches = join_points(points, max(1, math.ceil(len(points) / MAX_BATCHES)))
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
