"""The figures of the report in their order: what draws each, how to read it, and what the catalogue says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import matplotlib
from markupsafe import Markup

from orchestrator.figures.catalog import FIGURES, SECTIONS
from orchestrator.report import curves, timings
from orchestrator.report.drawing import STYLE, Drawing, to_svg

Input = TypeVar("Input")


@dataclass(frozen=True, slots=True)
class Plot(Generic[Input]):
    """A figure of a page, drawn from `Input`."""

    draw: Callable[[Input], Drawing]
    title: str
    reading: str
    """How to read it."""
    key: str
    """Row of the catalogue that it shows."""

    @property
    def name(self) -> str:
        """Its id on the page."""
        return self.draw.__name__

    @property
    def definition(self) -> str:
        """What it shows, in a sentence."""
        return FIGURES[self.key].definition

    @property
    def anchor(self) -> str:
        """Heading of docs/measurement.md that explains it, as a link has it."""
        return anchor_of(section_of(self.key))

    def svg(self, data: Input) -> tuple[Markup, str]:
        """The figure as SVG, or "" and the reason why there is none."""
        with matplotlib.rc_context(STYLE):
            drawing = self.draw(data)
        if isinstance(drawing, str):
            return Markup(), drawing
        return Markup(to_svg(drawing, self.name.replace("_", "-"))), ""  # noqa: S704 - Matplotlib escapes its text


PLOTS = (
    Plot(
        curves.throughput, "Throughput against workers",
        "Dotted: ideal, from the smallest size. Bars: 95 % interval. Squares: predicted, not measured.",
        "images_per_second",
    ),
    Plot(
        curves.accuracy_over_time, "AP over time", "Each point is one evaluation, at the time its figures were known.",
        "time_to_train_seconds",
    ),
    Plot(
        curves.accuracy_over_iterations, "AP over iterations", "The same evaluations by iterations trained.",
        "evaluations.box_ap",
    ),
    Plot(
        curves.validation_loss, "Validation loss", "Dots: on the validation images, as they are. Dotted: in training.",
        "evaluations.validation_losses.*",
    ),
    Plot(
        timings.wall_clock, "Where the wall clock went", "All seconds of a trial; its sections add up to it.",
        "sections.wall",
    ),
    Plot(timings.timeline, "Timeline and restarts", "Triangles: the workers were restarted.", "downtime_seconds"),
    Plot(
        timings.step_times, "Step times", "Read across: the share of the steps that took at most so long.",
        "step_seconds.p50",
    ),
    Plot(timings.rank_skew, "Skew between ranks", "A rank above 0 makes the others wait.", "rank_skew"),
    Plot(
        curves.drift, "Throughput along the run", "Level: steady. Falling: something wears out or heats up.",
        "drift_ratio",
    ),
    Plot(curves.losses, "Loss", "Total loss, mean over the workers and over each window of steps.", "windows.losses.*"),
    Plot(curves.loss_parts, "Loss by part", "The last trial's loss, part by part.", "windows.losses.*"),
    Plot(curves.learning_rate, "Learning rate", "Warm-up, then the steps of the schedule.", "windows.learning_rate"),
)  # fmt: skip


def section_of(key: str) -> str:
    """Section of the catalogue that has a row."""
    return next(section for section, rows in SECTIONS.items() if FIGURES[key] in rows)


def anchor_of(heading: str) -> str:
    """A heading as a link to it has it."""
    return heading.lower().replace(" ", "-")
