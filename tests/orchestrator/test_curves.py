"""The report's curves with few, equal, zero or missing values: every point is whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from orchestrator.figures.records import Evaluation, ExperimentResult, TrialResult
from orchestrator.report import curves
from orchestrator.report.drawing import STYLE, Drawing, ReportInput
from orchestrator.runlog.folder import TrialEvents

Draw = Callable[[ReportInput], Drawing]
AP = [curves.accuracy_over_iterations, curves.accuracy_over_time]


def made(*evaluations: tuple[int, float | None, float | None], **fields: Any) -> ReportInput:
    """A trial with evaluations: iteration, box AP and mask AP, a second per iteration."""
    trial = TrialResult(name="one", world_size=1, status="FINISHED", recipe="reference", scaling="strong", **fields)
    trial.evaluations = [
        Evaluation.model_construct(
            iteration=iteration, box_ap=box, mask_ap=mask, elapsed_seconds=float(iteration),
            mask_elapsed_seconds=float(iteration),
        )
        for iteration, box, mask in evaluations
    ]  # fmt: skip
    result = ExperimentResult(experiment="e", status="FINISHED", started="2026-01-01T00:00:00+00:00", trials=[trial])
    return ReportInput({"": result}, [TrialEvents("one", trial, [], None, Path("/"))])


def figure(draw: Draw, data: ReportInput) -> Figure:
    with matplotlib.rc_context(STYLE):
        drawn = draw(data)
    assert isinstance(drawn, Figure)
    return drawn


def assert_whole(drawn: Figure) -> None:
    """Every marker is inside the frame, or drawn over it."""
    (axes,) = drawn.axes
    drawn.canvas.draw()
    for line in axes.lines:
        radius = line.get_markersize() / 2 * drawn.dpi / 72
        frame = axes.get_window_extent()
        for x, y in axes.transData.transform(line.get_xydata()) if line.get_marker() not in ("None", "") else ():
            assert x + radius <= frame.x1 and y + radius <= frame.y1
            inside = x - radius >= frame.x0 and y - radius >= frame.y0
            assert inside or not line.get_clip_on()


@pytest.mark.parametrize("draw", AP)
@pytest.mark.parametrize(
    "evaluations",
    [
        [(60, 55.1, 50.2)],
        [(60, 100.0, 100.0)],
        [(60, 0.0, 0.0)],
        [(30, 55.0, 55.0), (60, 55.0, 55.0)],
        [(30, 0.0, 0.0), (60, 0.0, 0.0)],
        [(0, 10.0, 9.0)],
        [(30, None, None), (60, 12.0, None)],
        [(30, math.nan, math.inf), (60, 12.0, math.nan)],
    ],
)
def test_every_evaluation_is_seen_whole(draw: Draw, evaluations: list[tuple[int, float, float]]) -> None:
    assert_whole(figure(draw, made(*evaluations)))


@pytest.mark.parametrize("draw", AP)
def test_an_ap_that_was_not_measured_is_no_point(draw: Draw) -> None:
    (line,) = figure(draw, made((30, math.nan, None), (60, 12.0, None))).axes[0].lines
    assert np.array_equal(line.get_xydata(), [[60.0, 12.0]])
    assert isinstance(draw(made((30, None, math.nan))), str)


def test_an_ap_of_zero_is_drawn_on_a_scale_that_shows_it_is_none() -> None:
    (axes,) = figure(curves.accuracy_over_iterations, made((60, 0.0, None))).axes
    assert axes.get_ylim() == (0, 1) and axes.get_xlim()[0] == 0


def test_iterations_are_whole_numbers() -> None:
    (axes,) = figure(curves.accuracy_over_iterations, made((3, 5.0, None))).axes
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_the_target_is_inside_the_frame() -> None:
    (axes,) = figure(curves.accuracy_over_iterations, made((60, 10.0, None), target_box_ap=40.0)).axes
    assert axes.get_ylim()[1] > 40


def test_one_throughput_is_a_point_above_zero() -> None:
    drawn = figure(curves.throughput, made(images_per_second=15.8))
    assert drawn.axes[0].get_ylim()[0] == 0
    assert_whole(drawn)
