"""Compares trials with one another: repeats, speed-up and efficiency over matched iterations, and a projection.

The trap it protects against: a run that stopped early is compared with the slower second half of a longer one. Where
both have a drift curve of measured steps, the same iterations are compared. A projection is never among measurements.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Literal

from orchestrator.figures.records import RepeatRow, ScalingFit, ScalingRow, TrialResult
from orchestrator.figures.spread import Interval, ratio_between_repeats, ratio_within_runs, spread
from trainers import clock

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
        measured = {size: [t for t in repeats if t.images_per_second is not None] for size, repeats in sizes.items()}
        measured = {size: measured[size] for size in sorted(measured) if measured[size]}
        if not measured:
            continue
        base = min(measured)
        for world_size, repeats in measured.items():
            span = _matched_span([*repeats, *measured[base]]) if world_size != base else None
            above, below = ([_rate(t, span) for t in group] for group in (repeats, measured[base]))
            speed_up = _median(above) / _median(below)
            interval, source = (None, None)
            if world_size != base:
                interval, source = _interval(repeats, measured[base], above, below, span)
            share = base / world_size
            rows.append(
                ScalingRow(
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
            )
    return rows


def compare(above: TrialResult, below: TrialResult) -> Interval | None:
    """Ratio of two trials' throughputs over their matched iterations, with the interval within the runs.

    Returns:
        None where they have no matched iterations, or too few to have a spread.
    """
    span = _matched_span([above, below])
    return ratio_within_runs(_points(above, span), _points(below, span)) if span else None


def scaling_fits(trials: Sequence[TrialResult]) -> list[ScalingFit]:
    """Fits the step time over the world size and projects it to twice the largest size.

    The model of a step on N workers is `serial + computation / N + communication x log2(N)` with the global batch kept
    (Amdahl's law, 1967, with the rounds of a tree all-reduce), and `computation + communication x log2(N)` with the
    batch per worker kept, where a serial part cannot be told from computation. A ring's (N - 1) / N would not do: it is
    1 - 1 / N, which the other two terms make by themselves. No term is negative; relative errors are minimised. Two
    sizes tell computation and one more term apart: the serial part, or communication where that fits better.
    """
    fits = []
    for (recipe, kind), sizes in _groups(trials).items():
        step_seconds = {}
        for world_size, repeats in sizes.items():
            rates = [t.images_per_second for t in repeats if t.images_per_second and t.global_batch_size]
            if rates and repeats[0].global_batch_size:
                step_seconds[world_size] = repeats[0].global_batch_size / _median(rates)
        if len(step_seconds) < 2:
            continue
        found = _fit(_SHAPES[kind], step_seconds)
        if found is None:
            continue

        def step(size: int, found: Mapping[str, float] = found, kind: Kind = kind) -> float:
            return sum(seconds * _SHAPES[kind][term](size) for term, seconds in found.items())

        base, following = min(step_seconds), 2 * max(step_seconds)
        batch = sizes[base][0].global_batch_size
        assert batch is not None
        next_batch = batch if kind == "strong" else batch / base * following
        projected = next_batch / step(following)
        fits.append(
            ScalingFit(
                recipe=recipe,
                kind=kind,
                world_sizes=sorted(step_seconds),
                computation_seconds=found["computation"],
                communication_seconds=found.get("communication"),
                serial_seconds=found.get("serial"),
                worst_relative_error=max(abs(step(n) / seconds - 1) for n, seconds in step_seconds.items()),
                projected_world_size=following,
                projected_images_per_second=projected,
                projected_efficiency=projected / (batch / step_seconds[base]) * base / following,
            )
        )
    return fits


_SHAPES: dict[Kind, dict[str, Callable[[int], float]]] = {
    "strong": {"computation": lambda n: 1 / n, "serial": lambda n: 1.0, "communication": math.log2},
    "weak": {"computation": lambda n: 1.0, "communication": math.log2},
}
"""Terms of a step on N workers, in the order in which more sizes tell more of them apart."""


def _fit(shapes: Mapping[str, Callable[[int], float]], step_seconds: Mapping[int, float]) -> dict[str, float] | None:
    """Least squares of relative errors by computation and as many more terms as the sizes allow, none negative.

    Returns:
        Seconds by term; a term that too few sizes can tell of is left out.
    """
    best: tuple[float, dict[str, float]] | None = None
    others = [name for name in shapes if name != "computation"]
    for count in range(min(len(others), len(step_seconds) - 1) + 1):
        for chosen in combinations(others, count):
            names = ("computation", *chosen)
            rows = [[shapes[name](n) / seconds for name in names] for n, seconds in step_seconds.items()]
            solution = _least_squares(rows)
            if solution is None or min(solution) < 0:
                continue
            error = sum((sum(x * a for x, a in zip(solution, row, strict=True)) - 1) ** 2 for row in rows)
            if best is None or error < best[0] - 1e-15:
                best = error, dict(zip(names, solution, strict=True))
    if best is None:
        return None
    told = len(step_seconds) >= len(shapes)
    return {**dict.fromkeys(shapes if told else (), 0.0), **best[1]}


def _least_squares(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """Solves `rows x = 1` in the least squares sense by its normal equations; None where they are singular."""
    size = len(rows[0])
    matrix = [[*(sum(r[i] * r[j] for r in rows) for j in range(size)), sum(r[i] for r in rows)] for i in range(size)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(matrix[row][column]))
        if abs(matrix[pivot][column]) < 1e-12 * max(abs(value) for row in matrix for value in row):
            return None
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        for row in range(size):
            if row != column:
                factor = matrix[row][column] / matrix[column][column]
                matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[column], strict=True)]
    return [matrix[row][size] / matrix[row][row] for row in range(size)]


def _matched_span(trials: Sequence[TrialResult]) -> tuple[int, int] | None:
    """The iterations that all trials have measured by steps: (first, done at the end); None where there are none."""
    if any(not trial.rate_curve or trial.rate_curve_source != "steps" for trial in trials):
        return None
    first = max(trial.rate_curve[0].first_iteration for trial in trials)
    last = min(max(point.iteration for point in trial.rate_curve) for trial in trials)
    span = first, last
    return span if all(_points(trial, span) for trial in trials) else None


def _points(trial: TrialResult, span: tuple[int, int] | None) -> list[clock.Stretch]:
    points = [clock.Stretch(p.first_iteration, p.iteration, p.num_images, p.seconds) for p in trial.rate_curve]
    return clock.matched(points, *span) if span else points


def _rate(trial: TrialResult, span: tuple[int, int] | None) -> float:
    measured = clock.rate(_points(trial, span)) if span else trial.images_per_second
    assert measured is not None
    return measured


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
    interval = ratio_within_runs(_points(above[0], span), _points(below[0], span)) if span else None
    return interval, "within runs" if interval else None


def _median(values: Sequence[float]) -> float:
    middle = clock.quantile(values, 0.5)
    assert middle is not None
    return middle


def _groups(trials: Sequence[TrialResult]) -> dict[tuple[str, Kind], dict[int, list[TrialResult]]]:
    groups: dict[tuple[str, Kind], dict[int, list[TrialResult]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if trial.recipe and trial.scaling:
            groups[trial.recipe, trial.scaling][trial.world_size].append(trial)
    return groups
