"""Figures of one evaluation by class: precision over recall, F1 over the score, and the confusion matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from orchestrator.report import drawing
from orchestrator.report.curves import PARTS
from trainers.contract.evaluation_details import NUM_POINTS, ClassCurve, Confusion, EvaluationDetails

ALL = "all"
"""Choice of the mean over all classes."""

MAX_MATRIX = 20
"""Classes that a confusion matrix shows; of more, the most confused ones."""

CELL_INCHES = 0.27

MAX_NAME = 18
"""Characters of a class's name along a matrix."""

Points = tuple[Sequence[float], Sequence[float]]
"""x and y of a curve."""


def precision_recall(details: EvaluationDetails, classes: Collection[int], *, faint: bool = False) -> Figure:
    """Precision over recall at an IoU of 0.5: the mean of all classes, and a curve for each of some.

    Each curve's id ends in `-choice-` and the number of its class, or `all`, so that a page can show one at a time.

    Args:
        details: The evaluation.
        classes: Positions of the classes that get a curve.
        faint: Draw those thin, so that all can be seen at once.
    """
    return _curves(details, classes, ("precision at IoU 0.5", "recall"), _precision, _mean_precision, faint=faint)


def f1_over_score(details: EvaluationDetails, classes: Collection[int], *, faint: bool = False) -> Figure:
    """F1 against the score from which on detections count; as `precision_recall`."""
    return _curves(details, classes, ("F1 at IoU 0.5", "lowest score that counts"), _f1, _mean_f1, faint=faint)


def _precision(curve: ClassCurve) -> Points:
    return [n / (NUM_POINTS - 1) for n in range(len(curve.precision))], curve.precision


def _mean_precision(curves: Sequence[ClassCurve]) -> Points:
    """0 at a recall that a class does not reach, as in COCO's AP."""
    padded = [list(curve.precision) + [0.0] * (NUM_POINTS - len(curve.precision)) for curve in curves]
    return np.linspace(0, 1, NUM_POINTS).tolist(), np.mean(padded, axis=0).tolist()


def _f1(curve: ClassCurve) -> Points:
    return curve.scores[::-1], curve.f1[::-1]


def _mean_f1(curves: Sequence[ClassCurve]) -> Points:
    """Every class at the same thresholds; 0 above the highest score of a class."""
    thresholds = np.linspace(0, 1, NUM_POINTS)
    values = np.zeros((len(curves), NUM_POINTS))
    for row, curve in enumerate(curves):
        if curve.scores:
            reached = np.searchsorted(-np.asarray(curve.scores), -thresholds, side="right")
            values[row] = np.concatenate([[0.0], curve.f1])[reached]
    return thresholds.tolist(), values.mean(axis=0).tolist()


def _curves(
    details: EvaluationDetails,
    classes: Collection[int],
    labels: tuple[str, str],
    points: Callable[[ClassCurve], Points],
    mean: Callable[[Sequence[ClassCurve]], Points],
    *,
    faint: bool,
) -> Figure:
    figure, axes = drawing.new_axes()
    handles = []
    for position, (part, curves) in enumerate(details.curves.items()):
        style: dict[str, Any] = {"color": drawing.color_of(position), "linestyle": PARTS[part]["linestyle"]}
        thin: dict[str, Any] = {"linewidth": 0.5, "alpha": 0.4} if faint else {}
        for number in sorted(classes):
            if curves[number].precision:
                axes.plot(*_corners(points(curves[number])), gid=f"{part}-choice-{number}", **style, **thin)
        if present := [curve for curve in curves if curve.num_objects]:
            axes.plot(*_corners(mean(present)), gid=f"{part}-choice-{ALL}", **style)
            handles.append(Line2D([], [], label=part, **style))
    axes.set_title(labels[0])
    axes.set_xlabel(labels[1])
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    drawing.legend(axes, handles)
    return figure


def _corners(points: Points) -> Points:
    """A curve without the points between two equal ones: a page holds a curve for every class."""
    xs, ys = points
    kept = [n for n in range(len(xs)) if n in (0, len(xs) - 1) or not ys[n - 1] == ys[n] == ys[n + 1]]
    return [xs[n] for n in kept], [ys[n] for n in kept]


def confusion_matrix(details: EvaluationDetails) -> Figure:
    """How often objects of each class (rows) were detected as which one (columns), with the background.

    A cell is as dark as its share of its row is large.
    """
    shown = matrix_classes(details)
    background = len(details.classes)
    places = {number: place for place, number in enumerate([*shown, background])}
    size = len(places)
    totals: Counter[int] = Counter()
    for true, _, count in details.confusion.counts:
        totals[true] += count
    figure = Figure(
        figsize=(max(drawing.WIDTH_INCHES, 1.7 + CELL_INCHES * size), 1.9 + CELL_INCHES * size), layout="constrained"
    )
    axes = figure.add_subplot()
    for true, found, count in details.confusion.counts:
        if true in places and found in places:
            x, y = places[found], places[true]
            share = count / totals[true]
            axes.add_patch(Rectangle((x, y), 1, 1, color=drawing.SERIES[0], alpha=0.08 + 0.52 * share, linewidth=0))
            axes.text(x + 0.5, y + 0.5, f"{count:,}", ha="center", va="center", size=9 if count < 1000 else 6)
    names = [_short(details.classes[number]) for number in shown]
    centers = [place + 0.5 for place in range(size)]
    axes.set_xticks(centers, [*names, "missed"], rotation=90)
    axes.set_yticks(centers, [*names, "nothing"])
    axes.set_xlim(0, size)
    axes.set_ylim(size, 0)
    axes.set_xlabel("detected as")
    axes.set_ylabel("annotated as")
    axes.axhline(size - 1, color=drawing.MUTED, linewidth=0.6)
    axes.axvline(size - 1, color=drawing.MUTED, linewidth=0.6)
    axes.grid(visible=False)
    return figure


def matrix_classes(details: EvaluationDetails) -> list[int]:
    """Positions of the classes of a confusion matrix: all, or the ones most often taken for each other."""
    number = len(details.classes)
    if number <= MAX_MATRIX:
        return list(range(number))
    mistaken: Counter[int] = Counter()
    for true, found, count in mistakes(details.confusion, number):
        mistaken[true] += count
        mistaken[found] += count
    return sorted(sorted(range(number), key=lambda each: (-mistaken[each], each))[:MAX_MATRIX])


def mistakes(confusion: Confusion, num_classes: int) -> Iterable[tuple[int, int, int]]:
    """True class, detected class and how often, where one class was taken for another."""
    return (
        (true, found, count)
        for true, found, count in confusion.counts
        if true != found and num_classes not in (true, found)
    )


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
