"""The report's figures: one function each, from results and events to a Matplotlib figure or the reason for none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from orchestrator.figures.record_parts import Sections
from orchestrator.figures.records import ExperimentResult
from orchestrator.figures.sections import loop_runs
from orchestrator.report.drawing import (
    INK,
    MAX_NAMED,
    MUTED,
    PAPER,
    SECTION_COLORS,
    STYLE,
    color_of,
    legend,
    new_axes,
    swatch,
    thinned,
    time_unit,
    to_svg,
)
from orchestrator.runlog.folder import TrialEvents
from trainers import clock
from trainers.contract.events import CheckpointSaved, Evaluated, StepsDone, TrialEnded, TrialRestarted, TrialStarted


@dataclass(frozen=True, slots=True)
class ReportInput:
    """What figures are drawn from.

    Attributes:
        results: The experiments, by the label their series carry ("" for a single one).
        stories: Their trials.
    """

    results: dict[str, ExperimentResult]
    stories: Sequence[TrialEvents]


Drawing = Figure | str
"""A figure, or the reason why there is none."""


def _steps(story: TrialEvents) -> list[StepsDone]:
    return [event for event in story.events if isinstance(event, StepsDone)]


def throughput(material: ReportInput) -> Drawing:
    """Images per second against workers, with the ideal line and the interval of each size."""
    figure, axes = new_axes()
    position, sizes = 0, set()
    for label, result in material.results.items():
        groups = defaultdict(list)
        for trial in result.trials:
            if trial.images_per_second is not None:
                groups[trial.recipe, trial.scaling].append(trial)
        for (recipe, scaling), trials in groups.items():
            color, by_size = color_of(position), defaultdict(list)
            for trial in trials:
                by_size[trial.world_size].append(trial.images_per_second or 0.0)
            medians = {size: clock.quantile(by_size[size], 0.5) or 0.0 for size in sorted(by_size)}
            base = min(medians)
            axes.plot(
                list(medians), [medians[base] / base * size for size in medians], ":", color=MUTED, linewidth=1,
                label="ideal" if position == 0 else None,
            )  # fmt: skip
            name = " ".join(filter(None, (label, recipe, scaling)))
            axes.plot(list(medians), list(medians.values()), "o-", color=color, label=name)
            rows = [r for r in result.scaling if (r.recipe, r.kind) == (recipe, scaling) and r.efficiency_low]
            for row in rows:
                ideal = medians[base] / base * row.world_size
                ends = [ideal * (row.efficiency_low or 0), ideal * (row.efficiency_high or 0)]
                axes.plot([row.world_size] * 2, ends, "_-", color=color, markersize=9, linewidth=1.2)
            sizes |= set(medians)
            position += 1
    if not position:
        return "no trial ran longer than its warm-up"
    references = {row.name: row for result in material.results.values() for row in result.reference_rows}
    for reference in references.values():
        if reference.images_per_second:
            x, y = reference.world_size, reference.images_per_second
            axes.plot(x, y, "D", color=INK, fillstyle="none", label=reference.name[:40])
            sizes.add(x)
    if len(sizes) > 1:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        low, high = axes.get_ylim()
        if high < 8 * low:  # powers of 2 would be two labels, or one
            axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("images/s")
    axes.set_xlabel("workers")
    legend(axes)
    return figure


def _accuracy(material: ReportInput, over_time: bool) -> Drawing:
    figure, axes = new_axes()
    shown, targets = [], set()
    longest = max((e.elapsed_seconds or 0 for s in material.stories for e in s.trial.evaluations), default=0)
    unit, divisor = time_unit(longest)
    for position, story in enumerate(material.stories):
        for part, line in (("box", "o-"), ("mask", "s--")):
            points = []
            for e in story.trial.evaluations:
                ap = e.box_ap if part == "box" else e.mask_ap
                seconds = e.elapsed_seconds if part == "box" else e.mask_elapsed_seconds
                x = (seconds / divisor if seconds is not None else None) if over_time else float(e.iteration)
                if ap is not None and x is not None:
                    points.append((x, ap))
            if points:
                axes.plot(*thinned(points), line, color=color_of(position), markersize=3.5)
                shown.append(position)
                targets.add((part, getattr(story.trial, f"target_{part}_ap")))
    if not shown:
        return "no evaluation" + (" whose time is known" if over_time else "")
    heights = defaultdict(list)
    for part, target in sorted(targets, key=str):
        if target is not None:
            heights[target].append(part)
    for target, parts in heights.items():
        axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        text = f"target, {' and '.join(parts)}: {target:g}"
        axes.annotate(
            text, (0, target), (4, 2), xycoords=("axes fraction", "data"), textcoords="offset points", size=8,
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip
    handles = [
        Line2D([], [], color=color_of(position), label=material.stories[position].label)
        for position in dict.fromkeys(shown)
    ]
    if len(handles) <= MAX_NAMED - 2:
        handles += [
            Line2D([], [], color=MUTED, linestyle="-", marker="o", markersize=3.5, label="box AP"),
            Line2D([], [], color=MUTED, linestyle="--", marker="s", markersize=3.5, label="mask AP"),
        ]
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_title("AP, 0–100")
    axes.set_xlabel(f"{unit} on the seed's clock" if over_time else "iterations")
    legend(axes, handles)
    return figure


def accuracy_over_time(material: ReportInput) -> Drawing:
    """Box and mask AP over the seed's clock."""
    return _accuracy(material, over_time=True)


def accuracy_over_iterations(material: ReportInput) -> Drawing:
    """Box and mask AP over iterations."""
    return _accuracy(material, over_time=False)


def wall_clock(material: ReportInput) -> Drawing:
    """Stacked bars: where each second of a trial went."""
    stories = [story for story in material.stories if story.trial.sections]
    if not stories:
        return "no trial reached the training loop"
    figure, axes = new_axes(1.7 + 0.28 * len(stories))
    names = [name for name in Sections.model_fields if name != "wall"]
    unit, divisor = time_unit(max(s.trial.sections.wall for s in stories if s.trial.sections))
    for row, story in enumerate(stories):
        left = 0.0
        for name in names:
            width = max(getattr(story.trial.sections, name) or 0.0, 0.0) / divisor
            if width:
                axes.barh(row, width, 0.62, left, color=SECTION_COLORS[name], edgecolor=PAPER, linewidth=0.4)
            left += width
    axes.set_yticks(range(len(stories)), [story.label for story in stories])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit)
    used = [n for n in names if any(getattr(s.trial.sections, n) for s in stories)]
    patches = [swatch(SECTION_COLORS[name], name.replace("_", " ")) for name in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, columnspacing=1.0, handletextpad=0.1)
    return figure


def step_times(material: ReportInput) -> Drawing:
    """Share of the steps that took at most so long."""
    figure, axes = new_axes()
    longest, middle = 0.0, []
    for position, story in enumerate(material.stories):
        warmup = story.trial.throughput_warmup_iters or 0
        seconds = [s for e in _steps(story) for s in e.step_seconds[max(0, warmup - e.first_iteration) :]]
        if seconds:
            levels = [n / 200 for n in range(201)]
            ordered = sorted(seconds)
            quantiles = [clock.quantile(ordered, q) or 0.0 for q in levels]
            axes.plot(quantiles, [100 * q for q in levels], color=color_of(position), label=story.label)
            longest = max(longest, ordered[-1])
            middle.append(clock.quantile(ordered, 0.5) or 0.0)
    if not middle:
        return "no single step's time is known after the warm-up"
    for percent in (50, 95):
        axes.axhline(percent, color=MUTED, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"p{percent}", (0, percent), (4, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            size=8, color=MUTED,
        )  # fmt: skip
    if longest > 4 * max(middle):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_title("% of the steps take at most …")
    axes.set_xlabel("… seconds")
    legend(axes)
    return figure


def rank_skew(material: ReportInput) -> Drawing:
    """Every worker's own time against the median worker's."""
    figure, axes = new_axes()
    drawn = False
    for position, story in enumerate(material.stories):
        own = {r.rank: r.own_seconds or r.step_seconds.p50 for r in story.trial.ranks}
        known = {rank: seconds for rank, seconds in own.items() if seconds}
        middle = clock.quantile(known.values(), 0.5)
        if len(known) > 1 and middle:
            shares = [100 * (seconds / middle - 1) for seconds in known.values()]
            axes.plot(list(known), shares, "o", color=color_of(position), label=story.label)
            axes.vlines(list(known), 0, shares, color=color_of(position), linewidth=1)
            drawn = True
    if not drawn:
        return "one worker, or no time of a single worker"
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.12)
    axes.set_title("own time against the median worker's, %")
    axes.set_xlabel("rank")
    legend(axes)
    return figure


def drift(material: ReportInput) -> Drawing:
    """Throughput along the run."""
    curves = {
        story.label: [(float(p.iteration), p.images_per_second) for p in story.trial.rate_curve]
        for story in material.stories
    }
    return _curves(curves, "images/s", "no trial ran longer than its warm-up")


def losses(material: ReportInput) -> Drawing:
    """Total loss of every trial."""
    curves = {
        story.label: [(float(e.iteration), e.losses["total_loss"]) for e in _steps(story) if "total_loss" in e.losses]
        for story in material.stories
    }
    return _curves(curves, "total loss", "no loss is known")


def loss_parts(material: ReportInput) -> Drawing:
    """The last trial's loss by its parts."""
    parts = defaultdict(list)
    for event in _steps(material.stories[-1]) if material.stories else ():
        for name, value in event.losses.items():
            if name != "total_loss":
                parts[name.removeprefix("loss_")].append((float(event.iteration), value))
    return _curves(parts, f"loss of {material.stories[-1].label}" if material.stories else "", "no loss is known")


def learning_rate(material: ReportInput) -> Drawing:
    """Learning rate of every trial."""
    curves = {
        story.label: [(float(e.iteration), e.learning_rate) for e in _steps(story) if e.rank == 0]
        for story in material.stories
    }
    return _curves(curves, "learning rate", "no learning rate is known")


def _curves(curves: dict[str, list[tuple[float, float]]], title: str, missing: str) -> Drawing:
    figure, axes = new_axes()
    for position, (label, points) in enumerate(curves.items()):
        if points:
            # Where a restart goes back, the line begins anew.
            pieces: list[list[tuple[float, float]]] = [[points[0]]]
            for before, point in pairwise(points):
                pieces.append([point]) if point[0] <= before[0] else pieces[-1].append(point)
            for number, piece in enumerate(pieces):
                mark = "o" if len(piece) < 3 else ""
                named = label if number == 0 else None
                axes.plot(*thinned(piece), color=color_of(position), linewidth=1.2, marker=mark, label=named)
    if not any(curves.values()):
        return missing
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_xlabel("iterations")
    legend(axes)
    return figure


def time_line(material: ReportInput) -> Drawing:
    """Training, standing still and restarts of every trial on one line of time."""
    stories = [story for story in material.stories if loop_runs(story.events)]
    if not stories:
        return "no trial's events are known"
    figure, axes = new_axes(1.5 + 0.3 * len(stories))
    ends = [_span(story) for story in stories]
    unit, divisor = time_unit(max(end - start for start, end in ends))
    used = set()

    def bars(row: int, name: str, spans: Iterable[tuple[float, float]]) -> None:
        found = [(start / divisor, (end - start) / divisor) for start, end in spans if end > start]
        if found:
            axes.broken_barh(found, (row - 0.3, 0.6), color=SECTION_COLORS[name], linewidth=0)
            used.add(name)

    for row, story in enumerate(stories):
        start, end = ends[row]
        attempts = loop_runs(story.events)
        bars(row, "startup", [(0, attempts[0].started - start)])
        bars(row, "backward", [(a.started - start, a.last_progress - start) for a in attempts])
        pairs = pairwise(attempts)
        bars(row, "downtime", [(before.last_progress - start, after.started - start) for before, after in pairs])
        bars(row, "shutdown", [(attempts[-1].last_progress - start, end - start)])
        evaluations = [e for e in story.events if isinstance(e, Evaluated)]
        bars(row, "evaluation", [(e.time - e.seconds - start, e.time - start) for e in evaluations])
        saved = [(e.time - e.write_seconds - start, e) for e in story.events if isinstance(e, CheckpointSaved)]
        bars(row, "checkpoint", [(began, began + e.stall_seconds) for began, e in saved])
        for event in story.events:
            if isinstance(event, TrialRestarted):
                at = (event.time - start) / divisor
                axes.plot(at, row - 0.38, "v", color=INK, markersize=5, clip_on=False)
                text = event.failure.replace("_", " ")
                axes.annotate(text, (at, row - 0.42), (4, 0), textcoords="offset points", size=7.5, va="center")
    names = {"backward": "training"}
    patches = [swatch(SECTION_COLORS[n], names.get(n, n)) for n in SECTION_COLORS if n in used]
    if any(isinstance(event, TrialRestarted) for story in stories for event in story.events):
        patches.append(Line2D([], [], color=INK, linestyle="", marker="v", markersize=5, label="restart"))
    axes.set_yticks(range(len(stories)), [story.label for story in stories])
    axes.set_ylim(len(stories) - 0.5, -0.75)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{unit} since the trial was started")
    figure.legend(handles=patches, loc="outside lower center", ncols=4, columnspacing=1.0, handletextpad=0.1)
    return figure


def _span(story: TrialEvents) -> tuple[float, float]:
    times = [event.time for event in story.events if isinstance(event, TrialStarted | TrialEnded)]
    return min(times, default=story.events[0].time), max(times[-1], story.events[-1].time)


def draw(function: Callable[[ReportInput], Drawing], material: ReportInput, name: str) -> tuple[str, str]:
    """A figure as SVG, or "" and the reason why there is none."""
    with matplotlib.rc_context(STYLE):
        drawing = function(material)
    return (to_svg(drawing, name), "") if isinstance(drawing, Figure) else ("", drawing)
