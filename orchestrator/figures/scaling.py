"""Compares trials with one another: repeats, speed-up and efficiency over matched iterations, and a projection.

Where both trials have a drift curve of measured steps, the same iterations are compared: a run that stopped early is
not compared with the slower second half of a longer one.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Literal

from orchestrator.figures.records import TrialResult
from orchestrator.figures.scaling_records import RepeatRow, ScalingFit, ScalingRow
from orchestrator.figures.spread import Interval, ratio_between_repeats, ratio_within_runs, spread
from orchestrator.figures.throughput import matched, rate

Kind = Literal["weak", "strong"]

REPEATED_FIGURES = (
    "images_per_second", "wall_images_per_second", "time_to_train_seconds", "time_to_box_target_seconds",
    "mlperf_seconds", "schedule_seconds", "startup_seconds", "box_ap", "mask_ap", "best_box_ap", "best_mask_ap",
    "peak_memory_gib",
)  # fmt: skip
"""Figures of a trial that are summed up over repeats."""


def repeat_rows(trials: Sequence[TrialResult]) -> list[RepeatRow]:
    """Every figure over the repeats of each recipe, kind of scaling and world size that was run more than once."""
    rows = []
    for (recipe, kind), sizes in _groups(trials).items():
        for world_size, repeats in sizes.items():
            if len(repeats) < 2:
                continue
            figures = {}
            for name in REPEATED_FIGURES:
                summed = spread([value for trial in repeats if (value := getattr(trial, name)) is not None])
                if summed:
                    figures[name] = summed
            rows.append(
                RepeatRow(
                    recipe=recipe,
                    kind=kind,
                    world_size=world_size,
                    num_trials=len(repeats),
                    num_target_met=sum(trial.time_to_train_seconds is not None for trial in repeats),
                    figures=figures,
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
    recipe: str, kind: Kind, world_size: int, base: int, measured: Mapping[int, Sequence[TrialResult]]
) -> ScalingRow:
    repeats, others = measured[world_size], measured[base]
    span = _matched_span([*repeats, *others]) if world_size != base else None
    above, below = ([value for t in group if (value := _rate(t, span))] for group in (repeats, others))
    speed_up = statistics.median(above) / statistics.median(below)
    interval, source = (None, None) if world_size == base else _interval(repeats, others, above, below, span)
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
        interval_source=source,
        matched_first_iteration=span[0] if span else None,
        matched_iteration=span[1] if span else None,
    )


def compare(above: TrialResult, below: TrialResult, span: tuple[int, int] | None = None) -> Interval | None:
    """Ratio of two trials' throughputs over matched iterations, with the interval within the runs.

    Args:
        above: The trial that is compared.
        below: The trial it is compared with.
        span: First iteration, and iterations done at the end; None for all that both have.

    Returns:
        None where they have no matched iterations, or too few to have a spread.
    """
    span = span or _matched_span([above, below])
    return ratio_within_runs(matched(above.rate_curve, *span), matched(below.rate_curve, *span)) if span else None


def scaling_fits(trials: Sequence[TrialResult]) -> list[ScalingFit]:
    """Fits the step time over the world size and projects it to twice the largest size.

    The model of a step on N workers is `serial + computation / N + communication x log2(N)` with a fixed global batch
    (Amdahl's law, 1967, with the rounds of a tree all-reduce), and `computation + communication x log2(N)` with the
    batch per worker fixed, where a serial part cannot be separated from computation. A ring's (N - 1) / N would not do:
    it is 1 - 1 / N, which the other two terms make by themselves. No term is negative; relative errors are minimised.
    Two sizes separate computation and one more term: the serial part, or communication where that fits better.
    """
    return [
        fit
        for (recipe, kind), sizes in _groups(trials).items()
        if (fit := _scaling_fit(recipe, kind, sizes)) is not None
    ]


def _scaling_fit(recipe: str, kind: Kind, sizes: Mapping[int, Sequence[TrialResult]]) -> ScalingFit | None:
    step_seconds, batches = {}, {}
    for world_size, repeats in sizes.items():
        rates, batch = [t.images_per_second for t in repeats if t.images_per_second], repeats[0].global_batch_size
        if rates and batch:
            step_seconds[world_size], batches[world_size] = batch / statistics.median(rates), batch
    if len(step_seconds) < 2:
        return None
    found = _fit(_SHAPES[kind], step_seconds)

    def step(size: int) -> float:
        return sum(seconds * _SHAPES[kind][term](size) for term, seconds in found.items())

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


_SHAPES: dict[Kind, dict[str, Callable[[int], float]]] = {
    "strong": {"computation": lambda n: 1 / n, "serial": lambda _: 1.0, "communication": math.log2},
    "weak": {"computation": lambda _: 1.0, "communication": math.log2},
}
"""Terms of a step on N workers, in the order in which they are preferred where too few sizes separate them."""


def _fit(shapes: Mapping[str, Callable[[int], float]], step_seconds: Mapping[int, float]) -> dict[str, float]:
    """Least squares of relative errors by computation and as many more terms as the sizes allow, none negative.

    Returns:
        Seconds by term; with fewer sizes than terms, a term that they cannot separate is left out.
    """
    from scipy.optimize import nnls

    others = [name for name in shapes if name != "computation"]
    solutions = []
    for chosen in combinations(others, min(len(others), len(step_seconds) - 1)):
        names = ("computation", *chosen)
        rows = [[shapes[name](n) / seconds for name in names] for n, seconds in step_seconds.items()]
        terms, residual = nnls(rows, [1.0] * len(rows))
        solutions.append((round(float(residual), 9), dict(zip(names, map(float, terms), strict=True))))
    best = min(solutions, key=lambda solution: solution[0])[1]  # the first of equals
    if len(step_seconds) >= len(shapes):
        return best
    return {name: seconds for name, seconds in best.items() if seconds or name == "computation"}


def _matched_span(trials: Sequence[TrialResult]) -> tuple[int, int] | None:
    """The iterations that all trials have measured by steps: (first, done at the end); None where there are none."""
    if any(not trial.rate_curve or trial.rate_curve_source != "steps" for trial in trials):
        return None
    first = max(trial.rate_curve[0].first_iteration for trial in trials)
    last = min(max(point.iteration for point in trial.rate_curve) for trial in trials)
    span = first, last
    return span if all(matched(trial.rate_curve, *span) for trial in trials) else None


def _rate(trial: TrialResult, span: tuple[int, int] | None) -> float | None:
    return rate(matched(trial.rate_curve, *span)) if span else trial.images_per_second


def _interval(
    above: Sequence[TrialResult],
    below: Sequence[TrialResult],
    above_rates: Sequence[float],
    below_rates: Sequence[float],
    span: tuple[int, int] | None,
) -> tuple[Interval | None, Literal["repeats", "within runs"] | None]:
    """The speed-up's interval, by repeats where both sizes have them."""
    interval = ratio_between_repeats(above_rates, below_rates)
    if interval:
        return interval, "repeats"
    # The curve of a log is made of whole seconds: its spread is rounding, and says nothing of the run.
    interval = compare(above[0], below[0], span) if span else None
    return interval, "within runs" if interval else None


def _groups(trials: Sequence[TrialResult]) -> dict[tuple[str, Kind], dict[int, list[TrialResult]]]:
    groups: dict[tuple[str, Kind], dict[int, list[TrialResult]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if trial.recipe and trial.scaling:
            groups[trial.recipe, trial.scaling][trial.world_size].append(trial)
    return groups
