"""Figures of the report about time: the wall clock by section, the timeline, step times, the skew between ranks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from orchestrator.figures.records import Sections
from orchestrator.figures.sections import lacks, loop_runs, trial_start
from orchestrator.report import drawing
from orchestrator.report.drawing import SECTION_COLORS as COLORS
from orchestrator.report.drawing import Drawing, ReportInput
from orchestrator.runlog.folder import TrialEvents
from trainers.contract.events import CheckpointSaved, Evaluated, StepsDone, TrialEnded, TrialRestarted

SECTION_NAMES = tuple(name for name in Sections.model_fields if name != "wall")


def wall_clock(data: ReportInput) -> Drawing:
    """Stacked bars: where each second of a trial went."""
    rows = [(t.label, t.trial.sections) for t in data.trials if t.trial.sections]
    if not rows:
        return "no trial reached the training loop, or its beginning is not known"
    figure, axes = drawing.new_axes(1.7 + 0.28 * len(rows))
    unit, divisor = drawing.time_unit(max(sections.wall for _, sections in rows))
    for row, (_, sections) in enumerate(rows):
        left = 0.0
        for name in SECTION_NAMES:
            width = max(getattr(sections, name) or 0.0, 0.0) / divisor
            if width:
                axes.barh(row, width, 0.62, left, color=COLORS[name], edgecolor=drawing.PAPER, linewidth=0.4)
            left += width
    used = [name for name in SECTION_NAMES if any(getattr(sections, name) for _, sections in rows)]
    handles = [drawing.swatch(COLORS[name], name.replace("_", " ")) for name in used]
    _finish_bars(axes, [label for label, _ in rows], unit, handles)
    axes.invert_yaxis()
    return figure


def timeline(data: ReportInput) -> Drawing:
    """Training, stalls and restarts of every trial along its wall time."""
    trials = [trial for trial in data.trials if loop_runs(trial.events) and not lacks(trial.events, "times")]
    if not trials:
        return "no trial's events and their times are known"
    figure, axes = drawing.new_axes(1.5 + 0.3 * len(trials))
    spans = [_span(trial) for trial in trials]
    unit, divisor = drawing.time_unit(max(end - start for start, end in spans))
    used = set()
    for row, (trial, (start, end)) in enumerate(zip(trials, spans, strict=True)):
        for name, times in _bars(trial, start, end):
            bars = [((a - start) / divisor, (b - a) / divisor) for a, b in times if b > a]
            if bars:
                axes.broken_barh(bars, (row - 0.3, 0.6), color=COLORS[name], linewidth=0)
                used.add(name)
        for event in trial.events:
            if isinstance(event, TrialRestarted):
                at = (event.time - start) / divisor
                axes.plot(at, row - 0.38, "v", color=drawing.INK, markersize=5, clip_on=False)
                text = event.failure.replace("_", " ")
                axes.annotate(text, (at, row - 0.42), (4, 0), textcoords="offset points", size=7.5, va="center")
    handles = [drawing.swatch(color, {"backward": "training"}.get(n, n)) for n, color in COLORS.items() if n in used]
    if any(isinstance(event, TrialRestarted) for trial in trials for event in trial.events):
        handles.append(Line2D([], [], color=drawing.INK, linestyle="", marker="v", markersize=5, label="restart"))
    _finish_bars(axes, [trial.label for trial in trials], f"{unit} since the trial was started", handles)
    axes.set_ylim(len(trials) - 0.5, -0.75)
    return figure


def _span(trial: TrialEvents) -> tuple[float, float]:
    start = trial_start(trial.events)
    ends = [event.time for event in trial.events if isinstance(event, TrialEnded)]
    return trial.events[0].time if start is None else start, max([*ends, trial.events[-1].time])


def _bars(trial: TrialEvents, start: float, end: float) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Sections of a trial's timeline, later ones drawn over earlier ones, with their begins and ends (Unix seconds)."""
    runs = loop_runs(trial.events)
    yield "startup", [(start, runs[0].started)]
    yield "backward", [(run.started, run.last_progress) for run in runs]
    yield "downtime", [(before.last_progress, after.started) for before, after in pairwise(runs)]
    yield "shutdown", [(runs[-1].last_progress, end)]
    yield "evaluation", [(e.time - (e.seconds or 0), e.time) for e in trial.events if isinstance(e, Evaluated)]
    saved = [(e.time - e.write_seconds, e.stall_seconds) for e in trial.events if isinstance(e, CheckpointSaved)]
    yield "checkpoint", [(began, began + stall) for began, stall in saved]


def _finish_bars(axes: Axes, labels: list[str], xlabel: str, handles: Iterable[Line2D]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)
    figure = axes.get_figure()
    if figure is not None:
        figure.legend(handles=list(handles), loc="outside lower center", ncols=4, columnspacing=1.0, handletextpad=0.1)


def step_times(data: ReportInput) -> Drawing:
    """Share of the steps that took at most so long."""
    figure, axes = drawing.new_axes()
    levels = np.linspace(0, 1, 201)
    longest, medians = 0.0, []
    for position, trial in enumerate(data.trials):
        warmup = trial.trial.throughput_warmup_iters or 0
        windows = (event for event in trial.events if isinstance(event, StepsDone))
        seconds = [s for e in windows for s in e.step_seconds[max(0, warmup - e.first_iteration) :]]
        if seconds:
            axes.plot(np.quantile(seconds, levels), 100 * levels, color=drawing.color_of(position), label=trial.label)
            longest = max(longest, *seconds)
            medians.append(statistics.median(seconds))
    if not medians:
        return "no single step's time is known after the warm-up"
    for percent in (50, 95):
        axes.axhline(percent, color=drawing.MUTED, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"p{percent}", (0, percent), (4, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            size=8, color=drawing.MUTED,
        )  # fmt: skip
    if longest > 4 * max(medians):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter("")
    axes.set_title("% of the steps take at most …")
    axes.set_xlabel("… seconds")
    drawing.legend(axes)
    return figure


def rank_skew(data: ReportInput) -> Drawing:
    """Every worker's own time against the median worker's."""
    figure, axes = drawing.new_axes()
    drawn = False
    for position, trial in enumerate(data.trials):
        own = {rank.rank: rank.own_seconds or rank.step_seconds.p50 for rank in trial.trial.ranks}
        known = {rank: seconds for rank, seconds in own.items() if seconds}
        if len(known) > 1:
            median = statistics.median(known.values())
            shares = [100 * (seconds / median - 1) for seconds in known.values()]
            axes.plot(list(known), shares, "o", color=drawing.color_of(position), label=trial.label)
            axes.vlines(list(known), 0, shares, color=drawing.color_of(position), linewidth=1)
            drawn = True
    if not drawn:
        return "one worker, or no time of a single worker"
    axes.axhline(0, color=drawing.MUTED, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.12)
    axes.set_title("own time against the median worker's, %")
    axes.set_xlabel("rank")
    drawing.legend(axes)
    return figure
