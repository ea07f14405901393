"""Compares trials with one another: repeats, speed-up and efficiency with 95 % intervals, and a projection.

Where both trials have a drift curve of measured steps, the same iterations are compared: a run that stopped early is
not compared with the slower second half of a longer one. The steps of one run resemble their neighbours, so counting
each as a measurement by itself would make intervals far too narrow: they are gathered into a few long batches first.
Only repeats see what differs from run to run.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from orchestrator.figures.records import CurvePoint, ExperimentResult, TrialResult
from orchestrator.figures.scaling_records import RepeatRow, ScalingFit, ScalingRow, Spread
from orchestrator.figures.step_terms import fit_terms, terms_at
from orchestrator.figures.steps import join_points, matched, rate
from trainers.contract.plan import Scaling

MAX_BATCHES = 10
"""Batches a run's steps are gathered into; Schmeiser, "Batch size effects in the analysis of simulation output",
Operations Research 30 (1982), finds nothing gained by more than 10 to 30."""

MIN_BATCHES = 4
"""Fewer say nothing of a spread."""

REPEATED_FIGURES = (
    "images_per_second", "wall_images_per_second", "time_to_train_seconds", "time_to_box_target_seconds",
    "mlperf_seconds", "schedule_seconds", "startup_seconds", "box_ap", "mask_ap", "keypoint_ap", "best_box_ap",
    "best_mask_ap", "best_keypoint_ap", "peak_memory_gib", "energy.joules_per_image", "energy.watt_hours_to_target",
)  # fmt: skip
"""Figures of a trial that are summed up over repeats."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the two ends of its 95 % interval."""

    value: float
    low: float
    high: float


def add_comparisons(result: ExperimentResult) -> None:
    """Sets what a run's trials show together: scaling, its projection, and the spread of repeats."""
    result.scaling, result.fits = scaling_rows(result.trials), scaling_fits(result.trials)
    result.repeats = repeat_rows(result.trials)


def repeat_rows(trials: Sequence[TrialResult]) -> list[RepeatRow]:
    """Every figure over the repeats of each recipe, kind of scaling and world size that was run more than once."""
    rows = []
    for (recipe, kind), sizes in _groups(trials).items():
        for world_size, repeats in sizes.items():
            if len(repeats) < 2:
                continue
            values = {name: [attrgetter(name)(trial) for trial in repeats] for name in REPEATED_FIGURES}
            spreads = {name: spread([v for v in found if v is not None]) for name, found in values.items()}
            rows.append(
                RepeatRow(
                    recipe=recipe,
                    kind=kind,
                    world_size=world_size,
                    num_trials=len(repeats),
                    num_target_met=sum(trial.time_to_train_seconds is not None for trial in repeats),
                    figures={name: found for name, found in spreads.items() if found},
                )
            )
    return rows


def scaling_rows(trials: Sequence[TrialResult]) -> list[ScalingRow]:
    """Speed-up and efficiency of every world size against the smallest of its recipe and kind; medians over repeats."""
    rows = []
    for (recipe, kind), sizes in _groups(trials).items():
        rated = {size: [t for t in repeats if t.images_per_second is not None] for size, repeats in sizes.items()}
        measured = {size: repeats for size, repeats in sorted(rated.items()) if repeats}
        if measured:
            base = min(measured)
            rows += [_scaling_row(recipe, kind, size, base, measured) for size in measured]
    return rows


def _scaling_row(
    recipe: str, kind: Scaling, world_size: int, base: int, measured: Mapping[int, Sequence[TrialResult]]
) -> ScalingRow:
    repeats, others = measured[world_size], measured[base]
    span = _matched_span([*repeats, *others]) if world_size != base else None

    def rate_of(trial: TrialResult) -> float | None:
        return rate(matched(trial.rate_curve, *span)) if span else trial.images_per_second

    above, below = ([value for trial in group if (value := rate_of(trial))] for group in (repeats, others))
    speed_up = statistics.median(above) / statistics.median(below)
    interval: Interval | None = None
    source: Literal["repeats", "within runs"] = "repeats"
    if world_size != base:
        interval = ratio_between_repeats(above, below)
        # The curve of a log is made of whole seconds: its spread is rounding, and says nothing of the run.
        if interval is None and span:
            interval, source = compare(repeats[0], others[0], span), "within runs"
    share = base / world_size
    return ScalingRow(
        recipe=recipe,
        kind=kind,
        world_size=world_size,
        base_world_size=base,
        speed_up=speed_up,
        efficiency=speed_up * share,
        efficiency_low=interval.low * share if interval else None,
        efficiency_high=interval.high * share if interval else None,
        interval_source=source if interval else None,
        matched_first_iteration=span[0] if span else None,
        matched_iteration=span[1] if span else None,
    )


def compare(above: TrialResult, below: TrialResult, span: tuple[int, int] | None = None) -> Interval | None:
    """Ratio of two trials' throughputs over matched iterations, with an interval from the spread within each run.

    Each throughput is a ratio estimator over batches (Cochran, "Sampling Techniques", 1977, section 6.3); the variances
    of the two logarithms add up, and the degrees of freedom are Welch's.

    Args:
        above: The trial that is compared.
        below: The trial it is compared with.
        span: First iteration, and iterations done at the end; None for all that both have.

    Returns:
        None where they have no matched iterations, or too few to have a spread.
    """
    span = span or _matched_span([above, below])
    if span is None:
        return None
    upper, lower = (_within_run(matched(trial.rate_curve, *span)) for trial in (above, below))
    return _ratio(upper[0] / lower[0], [upper[1], lower[1]]) if upper and lower else None


def scaling_fits(trials: Sequence[TrialResult]) -> list[ScalingFit]:
    """Fits the step time over the world size and projects it to twice the largest size.

    The terms are those of `step_terms`; with the batch per worker fixed, a serial part cannot be separated from
    computation. Two sizes separate computation and one more term: the serial part, or communication where that fits
    better. `orchestrator.prediction` fits the same terms to the parts of a step, where these were measured.
    """
    fits = (_scaling_fit(recipe, kind, sizes) for (recipe, kind), sizes in _groups(trials).items())
    return [fit for fit in fits if fit]


def _scaling_fit(recipe: str, kind: Scaling, sizes: Mapping[int, Sequence[TrialResult]]) -> ScalingFit | None:
    step_seconds, batches = {}, {}
    for world_size, repeats in sizes.items():
        rates, batch = [t.images_per_second for t in repeats if t.images_per_second], repeats[0].global_batch_size
        if rates and batch:
            step_seconds[world_size], batches[world_size] = batch / statistics.median(rates), batch
    if len(step_seconds) < 2:
        return None
    names = ("computation", "serial", "communication") if kind == "strong" else ("computation", "communication")

    def terms(size: int) -> dict[str, float]:
        at = terms_at(size, 1 / size if kind == "strong" else 1.0)
        return {name: at[name] for name in names}

    found = fit_terms([terms(size) for size in step_seconds], list(step_seconds.values()))

    def step(size: int) -> float:
        return sum(seconds * terms(size)[name] for name, seconds in found.items())

    base, following = min(step_seconds), 2 * max(step_seconds)
    next_batch = batches[base] if kind == "strong" else batches[base] / base * following
    projected = next_batch / step(following)
    return ScalingFit(
        recipe=recipe,
        kind=kind,
        world_sizes=sorted(step_seconds),
        computation_seconds=found["computation"],
        communication_seconds=found.get("communication"),
        serial_seconds=found.get("serial"),
        worst_relative_error=max(abs(step(n) / seconds - 1) for n, seconds in step_seconds.items()),
        projected_world_size=following,
        projected_images_per_second=projected,
        projected_efficiency=projected / (batches[base] / step_seconds[base]) * base / following,
    )


def _matched_span(trials: Sequence[TrialResult]) -> tuple[int, int] | None:
    """The iterations that all trials have measured by steps: (first, done at the end); None where there are none."""
    if any(not trial.rate_curve or trial.rate_curve_source != "steps" for trial in trials):
        return None
    first = max(trial.rate_curve[0].first_iteration for trial in trials)
    span = first, min(max(point.iteration for point in trial.rate_curve) for trial in trials)
    return span if all(matched(trial.rate_curve, *span) for trial in trials) else None


def _groups(trials: Sequence[TrialResult]) -> dict[tuple[str, Scaling], dict[int, list[TrialResult]]]:
    groups: dict[tuple[str, Scaling], dict[int, list[TrialResult]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if trial.recipe and trial.scaling:
            groups[trial.recipe, trial.scaling][trial.world_size].append(trial)
    return groups


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
    count = len(ordered)
    half = t_975(count - 1) * statistics.stdev(ordered) / math.sqrt(count) if count > 1 else None
    return Spread(
        num_values=count,
        median=statistics.median(ordered),
        minimum=ordered[0],
        maximum=ordered[-1],
        mean=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        trimmed_mean=statistics.fmean(ordered[1:-1]) if count >= 5 else None,
    )


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


def _within_run(points: Sequence[CurvePoint]) -> tuple[float, tuple[float, int]] | None:
    """A run's throughput, and the variance of its logarithm with its degrees of freedom, by batches of points."""
    batches = join_points(points, max(1, math.ceil(len(points) / MAX_BATCHES)))
    count, mean_rate = len(batches), rate(points)
    if count < MIN_BATCHES or not mean_rate:
        return None
    residuals = [batch.seconds - batch.num_images / mean_rate for batch in batches]
    seconds = sum(batch.seconds for batch in batches)
    return mean_rate, (count / (count - 1) * sum(r * r for r in residuals) / seconds**2, count - 1)


def _ratio(ratio: float, variances: Sequence[tuple[float, int]]) -> Interval:
    total = sum(variance for variance, _ in variances)
    if total == 0:
        return Interval(ratio, ratio, ratio)
    # Welch–Satterthwaite.
    degrees = total**2 / sum(variance**2 / freedom for variance, freedom in variances)
    half = t_975(degrees) * math.sqrt(total)
    return Interval(ratio, ratio * math.exp(-half), ratio * math.exp(half))
