"""The pictures of the page of many entries: time against cost, time against accelerator hours, rate against size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from orchestrator.report import drawing
from orchestrator.report.drawing import Drawing
from orchestrator.report.entries import Entry
from orchestrator.report.plots import Plot

MAX_COLORS = 5
"""Kinds of chips with a colour of their own, the most frequent ones: a legend has room for few names."""

Value = Callable[[Entry], float | None]


def time_against_cost(entries: Sequence[Entry]) -> Drawing:
    """Time to the target against its cost; at the right edge, entries whose cost is not known."""
    if not any(_positive(entry.seconds) and _positive(entry.cost.value) for entry in entries):
        return "no entry has both a time to its target and a cost"
    return _time_against(entries, lambda entry: entry.cost.value, "cost to target")


def time_against_chip_hours(entries: Sequence[Entry]) -> Drawing:
    """Time to the target against accelerator hours."""
    if not any(_positive(entry.seconds) for entry in entries):
        return "no entry has a time to its target"
    return _time_against(entries, lambda entry: entry.chip_hours, "accelerator hours to target")


def rate_against_chips(entries: Sequence[Entry]) -> Drawing:
    """Images per second of all accelerators against their number."""
    if not any(_positive(entry.images_per_second) for entry in entries):
        return "no entry has a throughput"
    figure, axes = drawing.new_axes()
    _draw(axes, entries, lambda entry: entry.chips, lambda entry: entry.images_per_second)
    axes.set_title("images/s")
    axes.set_xlabel("accelerators")
    _log_axes(axes, x_base=2)
    return figure


def _time_against(entries: Sequence[Entry], cost: Value, xlabel: str) -> Drawing:
    figure, axes = drawing.new_axes()
    unit, divisor = drawing.time_unit(max(seconds for entry in entries if (seconds := _positive(entry.seconds))))
    _draw(axes, entries, cost, lambda entry: None if entry.seconds is None else entry.seconds / divisor)
    axes.set_title(f"{unit} to target")
    axes.set_xlabel(xlabel)
    _log_axes(axes)
    return figure


def _draw(axes: Axes, entries: Sequence[Entry], x: Value, y: Value) -> None:
    """A point for every entry that has a y, at the right edge where it has no x, with the id of its row on the page."""
    chips = Counter(entry.chip for entry in entries if entry.kind == "measured")
    colors = {chip: drawing.color_of(place) for place, (chip, _) in enumerate(chips.most_common(MAX_COLORS))}
    looks: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        at, height = _positive(x(entry)), _positive(y(entry))
        if height is None:
            continue
        look: dict[str, Any]
        if entry.kind == "reference":
            name, look = "published", {"color": drawing.INK, "marker": "D", "fillstyle": "none"}
        elif entry.chip in colors:
            name, look = entry.chip or "chip not known", {"color": colors[entry.chip], "marker": "o"}
        else:
            name, look = "other chips", {"color": drawing.MUTED, "marker": "o"}
        looks.setdefault(name[:40], look)
        line = Line2D([at or 1], [height], gid=f"entry-{number}", linestyle="", markersize=5.5, **look)
        if at is None:
            line.set(marker="<", transform=axes.get_yaxis_transform(), clip_on=False)
        axes.add_line(line)
    axes.autoscale_view()
    drawing.legend(axes, [Line2D([], [], linestyle="", label=name, **look) for name, look in sorted(looks.items())])


def _positive(value: float | None) -> float | None:
    """A value that a logarithmic axis can show, else None."""
    return value if value is not None and 0 < value < math.inf else None


def _log_axes(axes: Axes, x_base: int = 10) -> None:
    """Logarithmic axes with plain numbers, several of them on each."""
    bounds = axes.dataLim
    axes.set(xscale="log", yscale="log")
    for axis, base, low, high in ((axes.xaxis, x_base, *bounds.intervalx), (axes.yaxis, 10, *bounds.intervaly)):
        few = base == 10 and high < 30 * low
        axis.set_major_locator(LogLocator(base, subs=(1, 2, 5) if few else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


CLOCK = "Times are by MLPerf's clock, or by the seed clock where only that is known."

ENTRY_PLOTS = (
    Plot(
        time_against_cost, "Time against cost",
        f"Each entry has its own currency; at the right edge, no price is known. {CLOCK}", "cost_to_target",
    ),
    Plot(
        time_against_chip_hours, "Time against accelerator hours",
        f"Accelerators times hours: a cost without price and currency. {CLOCK}", "mlperf_seconds",
    ),
    Plot(
        rate_against_chips, "Throughput against accelerators", "All accelerators together; equal distances are equal "
        "factors.", "images_per_second",
    ),
)  # fmt: skip
