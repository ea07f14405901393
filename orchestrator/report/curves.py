"""Figures of the report over workers, time or iterations: throughput, AP, losses, learning rate, drift."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from orchestrator.figures.records import ExperimentResult
from orchestrator.figures.scaling_records import ScalingRow
from orchestrator.report import drawing
from orchestrator.report.drawing import Drawing, ReportInput
from orchestrator.runlog.folder import TrialEvents
from trainers.contract.events import StepsDone

Points = Sequence[tuple[float, float]]

PARTS: dict[str, dict[str, Any]] = {
    "box": {"linestyle": "-", "marker": "o", "markersize": 3.5},
    "mask": {"linestyle": "--", "marker": "s", "markersize": 6, "fillstyle": "none"},
    "keypoint": {"linestyle": ":", "marker": "^", "markersize": 9, "fillstyle": "none"},
}
"""How the curves of box, mask and keypoint AP are drawn; all are seen where they are equal."""


def throughput(data: ReportInput) -> Drawing:
    """Images per second against workers, with the ideal line and the interval of each size."""
    figure, axes = drawing.new_axes()
    position, sizes = 0, set()
    for label, result in data.results.items():
        rates: dict[tuple[str | None, str | None], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for trial in result.trials:
            if trial.images_per_second is not None:
                rates[trial.recipe, trial.scaling][trial.world_size].append(trial.images_per_second)
        for (recipe, scaling), by_size in rates.items():
            medians = {size: statistics.median(by_size[size]) for size in sorted(by_size)}
            rows = [r for r in result.scaling if (r.recipe, r.kind) == (recipe, scaling)]
            beyond = [p.world_size for p in result.prediction.sizes] if result.prediction else []
            _rates(axes, medians, beyond, rows, position, " ".join(filter(None, (label, recipe, scaling))))
            sizes |= set(medians)
            position += 1
        sizes |= _predicted(axes, result, drawing.color_of(position - 1))
    if not position:
        return "no trial ran longer than its warm-up"
    references = {row.name: row for result in data.results.values() for row in result.reference_rows}
    for reference in references.values():
        if reference.images_per_second:
            x, y = reference.world_size, reference.images_per_second
            axes.plot(x, y, "D", color=drawing.INK, fillstyle="none", label=reference.name[:40])
            sizes.add(x)
    _scale_by_powers_of_two(axes, sorted(sizes))
    axes.set_title("images/s")
    axes.set_xlabel("workers")
    drawing.legend(axes)
    return figure


def _predicted(axes: Axes, result: ExperimentResult, color: str) -> set[int]:
    """Predicted rates with their intervals: of a calibration, and of trials before they ran; returns their sizes."""
    known = [
        (trial.world_size, of.images_per_second, of.low, of.high)
        for trial in result.trials
        if (of := trial.predicted).images_per_second and of.low and of.high
    ]
    sizes = result.prediction.sizes if result.prediction else []
    of_sizes = [(p.world_size, p.images_per_second, p.images_per_second_low, p.images_per_second_high) for p in sizes]
    known = sorted({*known, *of_sizes})
    for number, (size, rate, low, high) in enumerate(known):
        axes.plot([size] * 2, [low, high], "_-", color=color, markersize=9, linewidth=1.2)
        axes.plot(size, rate, "s", color=color, fillstyle="none", label=None if number else "predicted, 95 % interval")
    if of_sizes:
        last = max(((t.world_size, t.images_per_second) for t in result.trials if t.images_per_second), default=None)
        points = [*([last] if last else []), *(each[:2] for each in of_sizes)]
        axes.plot(*zip(*points, strict=True), "--", color=color, linewidth=1)
    return {each[0] for each in known}


def _rates(
    axes: Axes, medians: dict[int, float], beyond: Sequence[int], rows: Iterable[ScalingRow], position: int, name: str
) -> None:
    """One recipe's rates by world size, its ideal line, also beyond, and the intervals of its efficiency as bars."""
    color, smallest = drawing.color_of(position), min(medians)
    ideal = medians[smallest] / smallest
    axes.plot(
        [*medians, *beyond], [ideal * size for size in (*medians, *beyond)], ":", color=drawing.MUTED, linewidth=1,
        label="ideal" if position == 0 else None,
    )  # fmt: skip
    axes.plot(list(medians), list(medians.values()), "o-", color=color, label=name)
    for row in rows:
        if row.efficiency_low is not None and row.efficiency_high is not None:
            ends = [ideal * row.world_size * row.efficiency_low, ideal * row.world_size * row.efficiency_high]
            axes.plot([row.world_size] * 2, ends, "_-", color=color, markersize=9, linewidth=1.2)


def _scale_by_powers_of_two(axes: Axes, sizes: Sequence[int]) -> None:
    if len(sizes) > 1:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        low, high = axes.get_ylim()
        if high < 8 * low:  # powers of 2 would be two labels, or one
            axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        drawing.start_at_zero(axes, both=False)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def accuracy_over_time(data: ReportInput) -> Drawing:
    """Box, mask and keypoint AP over the seed clock."""
    longest = max((e.elapsed_seconds or 0 for t in data.trials for e in t.trial.evaluations), default=0)
    unit, divisor = drawing.time_unit(longest)
    curves = _by_part(data, "elapsed_seconds", "mask_elapsed_seconds", "keypoint_elapsed_seconds")
    curves = {key: [(x / divisor, ap) for x, ap in points] for key, points in curves.items()}
    return _accuracy(data, curves, f"{unit} on the seed clock") or "no evaluation whose time is known"


def accuracy_over_iterations(data: ReportInput) -> Drawing:
    """Box, mask and keypoint AP over iterations."""
    return _accuracy(data, _by_part(data, *["iteration"] * 3), "iterations") or "no evaluation"


def _by_part(data: ReportInput, *fields: str) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """AP over a field of the evaluations for each of `PARTS`, by trial's position and part."""
    return {
        (position, part): _known((getattr(e, x), getattr(e, f"{part}_ap")) for e in trial.trial.evaluations)
        for position, trial in enumerate(data.trials)
        for part, x in zip(PARTS, fields, strict=True)
    }


def _known(points: Iterable[tuple[float | None, float | None]]) -> list[tuple[float, float]]:
    """Without the points that were not measured, or are not finite."""
    return [(x, y) for x, y in points if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]


def _accuracy(data: ReportInput, curves: Mapping[tuple[int, str], Points], xlabel: str) -> Drawing:
    """AP curves by trial's position and part, with their targets; "" where there is none."""
    figure, axes = drawing.new_axes()
    drawn = {key: points for key, points in curves.items() if points}
    if not drawn:
        return ""
    for (position, part), points in drawn.items():
        axes.plot(*drawing.thinned(points), color=drawing.color_of(position), **PARTS[part])
    _target_lines(axes, {(part, getattr(data.trials[at].trial, f"target_{part}_ap", None)) for at, part in drawn})
    positions = dict.fromkeys(position for position, _ in drawn)
    handles = [Line2D([], [], color=drawing.color_of(at), label=data.trials[at].label) for at in positions]
    if len(handles) <= drawing.MAX_NAMED - 2:
        parts = {part: style for part, style in PARTS.items() if any(part == each for _, each in drawn)}
        handles += [Line2D([], [], color=drawing.MUTED, label=f"{part} AP", **style) for part, style in parts.items()]
    drawing.start_at_zero(axes)
    axes.set_title("AP, 0–100")
    axes.set_xlabel(xlabel)
    if xlabel == "iterations":
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    drawing.legend(axes, handles)
    return figure


def _target_lines(axes: Axes, targets: Iterable[tuple[str, float | None]]) -> None:
    parts = defaultdict(list)
    for part, target in sorted(targets, key=str):
        if target is not None:
            parts[target].append(part)
    for target, names in parts.items():
        axes.axhline(target, color=drawing.INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            f"target, {' and '.join(names)}: {target:g}", (0, target), (4, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", size=8,
            bbox={"facecolor": drawing.PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip


def drift(data: ReportInput) -> Drawing:
    """Throughput along the run."""
    curves = {t.label: _known((p.iteration, p.images_per_second) for p in t.trial.rate_curve) for t in data.trials}
    return _over_iterations(curves, "images/s") or "no trial ran longer than its warm-up"


def losses(data: ReportInput) -> Drawing:
    """Total loss of every trial."""
    curves = {t.label: _known((e.iteration, e.losses.get("total_loss")) for e in _steps(t)) for t in data.trials}
    return _over_iterations(curves, "total loss") or "no loss is known"


def validation_loss(data: ReportInput) -> Drawing:
    """Total loss of every trial on the validation images, with its training loss."""
    figure, axes = drawing.new_axes()
    measured = False
    for position, trial in enumerate(data.trials):
        points = _known((e.iteration, e.validation_losses.get("total_loss")) for e in trial.trial.evaluations)
        if not points:
            continue
        color, measured = drawing.color_of(position), True
        trained = _known((e.iteration, e.losses.get("total_loss")) for e in _steps(trial))
        for piece in _pieces(trained):
            axes.plot(*drawing.thinned(piece), ":", color=color, linewidth=1)
        axes.plot(*drawing.thinned(points), "o-", color=color, markersize=3.5, label=trial.label)
    if not measured:
        return "no validation loss is known (protocol.validation_loss computes it)"
    drawing.start_at_zero(axes)
    axes.set_title("total loss")
    axes.set_xlabel("iterations")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    drawing.legend(axes)
    return figure


def loss_parts(data: ReportInput) -> Drawing:
    """The last trial's loss by its parts."""
    parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in _steps(data.trials[-1]) if data.trials else ():
        for name, value in event.losses.items():
            if name != "total_loss":
                parts[name.removeprefix("loss_")] += _known([(event.iteration, value)])
    title = f"loss of {data.trials[-1].label}" if data.trials else ""
    return _over_iterations(parts, title) or "no loss is known"


def learning_rate(data: ReportInput) -> Drawing:
    """Learning rate of every trial."""
    curves = {t.label: _known((e.iteration, e.learning_rate) for e in _steps(t) if e.rank == 0) for t in data.trials}
    return _over_iterations(curves, "learning rate") or "no learning rate is known"


def _steps(trial: TrialEvents) -> list[StepsDone]:
    return [event for event in trial.events if isinstance(event, StepsDone)]


def _over_iterations(curves: Mapping[str, Points], title: str) -> Drawing:
    """Curves by their label; "" where there is none."""
    figure, axes = drawing.new_axes()
    for position, (label, points) in enumerate(curves.items()):
        for number, piece in enumerate(_pieces(points)):
            axes.plot(
                *drawing.thinned(piece), color=drawing.color_of(position), linewidth=1.2,
                marker="o" if len(piece) < 3 else "", label=label if number == 0 else None,
            )  # fmt: skip
    if not any(curves.values()):
        return ""
    drawing.start_at_zero(axes)
    axes.set_title(title)
    axes.set_xlabel("iterations")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    drawing.legend(axes)
    return figure


def _pieces(points: Points) -> list[list[tuple[float, float]]]:
    """A curve cut where a restart goes back."""
    pieces = [list(points[:1])] if points else []
    for before, point in pairwise(points):
        if point[0] <= before[0]:
            pieces.append([])
        pieces[-1].append(point)
    return pieces
