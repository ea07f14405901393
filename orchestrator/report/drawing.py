"""Matplotlib set up for a page: SVG whose colours are the page's CSS variables.

One drawing is light, dark and printable, its text is text, and the report needs no script.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from orchestrator.figures.records import ExperimentResult
from orchestrator.runlog.folder import TrialEvents

WIDTH_INCHES, HEIGHT_INCHES = 4.9, 2.9
"""Small enough that 9 point text is legible when a phone shows the figure 350 pixels wide."""

INK, MUTED, GRID, PAPER = "#1a2330", "#5a6675", "#d9dee5", "#fdfdfd"
SERIES = ("#2563c9", "#c2560c", "#12805c", "#8a3fc0", "#b8285a", "#4d6478")
SECTION_COLORS = {
    "startup": "#9aa7b5", "data": "#e0a100", "forward": "#5b9bf0", "backward": "#2e6fd6", "graph": "#3f7fe0",
    "communication": "#17408c", "optimizer": "#49b6c4", "step_other": "#a9cdf7", "evaluation": "#d9772b",
    "checkpoint": "#8e5bc9", "lost_work": "#f2a0b0", "downtime": "#cf2a4a", "shutdown": "#c3cad2", "other": "#e1e5ea",
}  # fmt: skip
THEME = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    **{color: f"--series-{number}" for number, color in enumerate(SERIES)},
    **{color: f"--section-{name.replace('_', '-')}" for name, color in SECTION_COLORS.items()},
}
"""Colours as drawn (those of the light theme), and the CSS variables that replace them."""

STYLE: Any = {
    "font.size": 9, "font.family": "sans-serif", "text.color": INK, "text.parse_math": False, "svg.fonttype": "none",
    "svg.hashsalt": "report", "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.6, "xtick.color": MUTED, "ytick.color": MUTED, "legend.frameon": False, "legend.fontsize": 8,
    "legend.handlelength": 1.6, "figure.facecolor": "none", "lines.linewidth": 1.6, "lines.markersize": 4.5,
    "axes.titlesize": 9, "axes.titlecolor": MUTED, "axes.titlelocation": "left",
}  # fmt: skip

MAX_POINTS = 300
"""Points of a curve that are drawn."""

MAX_NAMED = 8
"""Series up to which a legend names them all."""


@dataclass(frozen=True, slots=True)
class ReportInput:
    """What the report's figures are drawn from."""

    results: dict[str, ExperimentResult]
    """The experiments, by the label that their curves carry ("" for a single one)."""
    trials: Sequence[TrialEvents]
    """Their trials."""


Drawing = Figure | str
"""A figure, or the reason why there is none."""


def to_svg(figure: Figure, name: str) -> str:
    """A figure as an inline SVG element that takes its colours from CSS; `name` makes its ids unique on the page."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{name}-", svg).replace("xlink:href", "href")
    # One decimal of a point is finer than any screen.
    svg = re.sub(r"(?<=[ \"(,])(-?\d+\.\d)\d+", r"\1", svg)
    return re.sub(r'style="[^"]*"', lambda style: _themed(style.group()), svg)


def _themed(style: str) -> str:
    for color, variable in THEME.items():
        style = style.replace(color, f"var({variable})")
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", style)


@contextmanager
def quiet_glyphs() -> Iterator[None]:
    """Keeps Matplotlib from warning of letters that its font lacks: on a page, the reader's fonts draw them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def new_axes(height: float = HEIGHT_INCHES) -> tuple[Figure, Axes]:
    """A figure of the page's width with one pair of axes, `height` inches high."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return figure, figure.add_subplot()


def start_at_zero(axes: Axes, *, both: bool = True) -> None:
    """Begins the vertical axis at 0, or both, and leaves room beyond the last point, so that every marker is whole.

    Where all values are 0, or none is finite, the axis ends at 1.
    """
    for line in axes.lines:
        line.set_clip_on(False)
    right, top = (1.06 * value if math.isfinite(value) and value > 0 else 1.0 for value in axes.dataLim.max)
    axes.set_ylim(0, top)
    if both:
        axes.set_xlim(0, right)


def color_of(position: int) -> str:
    """The colour of the n-th series."""
    return SERIES[position % len(SERIES)]


def legend(axes: Axes, handles: list[Line2D] | None = None) -> None:
    """A legend below the axes, of what was labelled or of the given handles; none where it would be a long list."""
    found = handles if handles is not None else axes.get_legend_handles_labels()[0]
    if found and len(found) <= MAX_NAMED:
        figure = axes.get_figure()
        assert isinstance(figure, Figure)
        figure.legend(handles=found, loc="outside lower center", ncols=2)


def swatch(color: str, name: str) -> Line2D:
    """A legend's square."""
    return Line2D([], [], color=color, linestyle="", marker="s", markersize=7, label=name)


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most `MAX_POINTS` points, evenly spaced in their list, as x and y."""
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    kept = [*points[:-1:step], points[-1]] if points else []
    return [x for x, _ in kept], [y for _, y in kept]


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit a duration is best read in, and its seconds."""
    return ("hours", 3600.0) if seconds > 7200 else ("minutes", 60.0) if seconds > 300 else ("seconds", 1.0)
