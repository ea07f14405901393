"""What the report shows of a trial's last evaluation by class: a table, curves to choose from, and confusions."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.figure import number_text, percent_text
from orchestrator.figures.records import Evaluation
from orchestrator.report.class_plots import (
    ALL,
    MAX_MATRIX,
    confusion_matrix,
    f1_over_score,
    matrix_classes,
    mistakes,
    precision_recall,
)
from orchestrator.report.curves import PARTS
from orchestrator.report.drawing import STYLE, quiet_glyphs, to_svg
from orchestrator.runlog.folder import TrialEvents
from trainers.contract.evaluation_details import DETAILS_FOLDER, EvaluationDetails

MAX_CURVES = 100
"""Classes whose curves a page holds, those with the most objects: some 3 kB each."""

PICTURE_DPI = 160

DAMAGED = (OSError, ValueError, LookupError, TypeError)
"""What a file of details, annotations or an image raises that is gone, or not what a trial wrote."""

MAX_CONFUSIONS = 100
"""Pairs of classes that are listed."""

Cell = tuple[str, float | None]
"""A number as text and as it is sorted; None where it was not measured."""


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """One evaluation by class, as the report shows it."""

    trial: str
    iteration: int
    headings: list[str]
    """Of the columns after the class."""
    rows: list[tuple[str, list[Cell]]]
    """Classes with their figures, the highest AP first."""
    choices: list[tuple[str, str]] = field(default_factory=list)
    """Ends of the ids of the curves, and the classes they are of."""
    precision_recall: Markup | None = None
    f1: Markup | None = None
    confusions: list[tuple[str, str, Cell, Cell]] = field(default_factory=list)
    """Class, what it was taken for, how often, and the share of the class's objects; the most frequent first."""
    matrix: Markup | None = None
    matrix_note: str = ""
    """Which classes it shows."""
    iou: float | None = None
    score: float | None = None
    """Least overlap and score at which detections are counted as found, missed, mistaken or false."""


def read_details(folder: Path, name: str) -> EvaluationDetails:
    """Reads the details of an evaluation from a trial's folder, wherever that is by now, and from nowhere else.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or not one of these files.
    """
    return EvaluationDetails.read(folder / DETAILS_FOLDER / Path(name).name)


def known_details(trial: TrialEvents, most: int) -> list[tuple[Evaluation, EvaluationDetails]]:
    """At most so many evaluations of a trial, evenly spaced, with the first and the last, that left their details.

    Raises:
        OSError: Those of the last evaluation cannot be read.
        ValueError: They are damaged.
    """
    named = [each for each in trial.trial.evaluations if each.details_file]
    if len(named) > most:
        named = [named[round(place * (len(named) - 1) / (most - 1))] for place in range(most)]
    found = []
    for evaluation in named[:-1]:
        with suppress(OSError, ValueError):
            found.append((evaluation, read_details(trial.folder, evaluation.details_file)))
    return found + [(last, read_details(trial.folder, last.details_file)) for last in named[-1:]]


def class_figures(trial: TrialEvents, prefix: str) -> ClassFigures | None:
    """The last evaluation of a trial by class; None where none has figures by class.

    Without the file of its details there is AP alone.

    Args:
        trial: The trial.
        prefix: Makes the figures' ids unique on the page.
    """
    last = next((each for each in reversed(trial.trial.evaluations) if each.class_ap or each.details_file), None)
    if last is None:
        return None
    details = None
    with suppress(OSError, ValueError):
        details = read_details(trial.folder, last.details_file)
    aps = [f"{part}_ap" for part in PARTS if any(key.startswith(f"{part}_ap/") for key in last.class_ap)]
    names = dict.fromkeys([*(details.classes if details else ()), *(key.split("/", 1)[1] for key in last.class_ap)])
    rows = {name: [_ap(last.class_ap.get(f"{ap}/{name}")) for ap in aps] for name in names}
    headings = [FIGURES[ap].heading for ap in aps]
    if details is None:
        return ClassFigures(trial.label, last.iteration, headings, _sorted(rows))
    more = _detail_columns(details)
    classes = _with_curves(details)
    return ClassFigures(
        trial.label,
        last.iteration,
        [*headings, *more],
        _sorted(
            {
                name: [*rows[name], *(column[at] if at < len(column) else _count(None) for column in more.values())]
                for at, name in enumerate(names)
            }
        ),
        choices=[(ALL, "all classes, mean"), *((str(n), details.classes[n]) for n in classes)],
        precision_recall=_svg(lambda: precision_recall(details, classes), f"{prefix}-recall"),
        f1=_svg(lambda: f1_over_score(details, classes), f"{prefix}-f1"),
        confusions=_confusions(details),
        matrix=_svg(lambda: confusion_matrix(details), f"{prefix}-matrix"),
        matrix_note=_matrix_note(details),
        iou=details.confusion.iou,
        score=details.confusion.score,
    )


def class_pictures(details: EvaluationDetails) -> dict[str, Image.Image]:
    """The figures of an evaluation by class as pictures of their own, with a thin curve for each class, by name."""
    classes = range(len(details.classes))
    pictures: dict[str, Image.Image] = {}
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white"}), quiet_glyphs():
        for name, figure in {
            "precision_recall": precision_recall(details, classes, faint=True),
            "f1": f1_over_score(details, classes, faint=True),
            "confusion_matrix": confusion_matrix(details),
        }.items():
            content = io.BytesIO()
            figure.savefig(content, dpi=PICTURE_DPI)
            pictures[name] = Image.open(content)
    return pictures


def _detail_columns(details: EvaluationDetails) -> dict[str, list[Cell]]:
    """Columns by their heading: a cell for each class."""
    background, counts = len(details.classes), Counter[tuple[str, int]]()
    for true, found, count in details.confusion.counts:
        if true == found:
            counts["Found", true] += count
        elif found == background:
            counts["Missed", true] += count
        else:
            counts["False", found] += count
            counts["Mistaken", true] += count
    curves = next(iter(details.curves.values()), ())
    best = [curve.best for curve in curves]
    return {
        "Objects": [_count(curve.num_objects) for curve in curves],
        **{kind: [_count(counts[kind, n]) for n in range(background)] for kind in ("Found", "Mistaken", "Missed")},
        "False": [_count(counts["False", n]) for n in range(background)],
        "Best F1": [_share(each and each[0]) for each in best],
        "at score": [_share(each and each[1]) for each in best],
    }


def _ap(value: float | None) -> Cell:
    return FIGURES["box_ap"].text(value), value


def _count(value: int | None) -> Cell:
    return number_text(value), value


def _share(value: float | None) -> Cell:
    return number_text(value, 2), value


def _sorted(rows: dict[str, list[Cell]]) -> list[tuple[str, list[Cell]]]:
    """By the first column, what was not measured last."""

    def place(row: tuple[str, list[Cell]]) -> tuple[bool, float]:
        value = row[1][0][1] if row[1] else None
        return value is None, -(value or 0.0)

    return sorted(rows.items(), key=place)


def _with_curves(details: EvaluationDetails) -> list[int]:
    """Positions of the classes whose curves are shown, in the order of their names."""
    curves = details.curves.values()
    objects = {n: max((each[n].num_objects for each in curves), default=0) for n in range(len(details.classes))}
    most = sorted(objects, key=lambda n: -objects[n])[:MAX_CURVES]
    return sorted((n for n in most if objects[n]), key=lambda n: details.classes[n].casefold())


def _confusions(details: EvaluationDetails) -> list[tuple[str, str, Cell, Cell]]:
    totals: Counter[int] = Counter()
    for true, _, count in details.confusion.counts:
        totals[true] += count
    pairs = sorted(mistakes(details.confusion, len(details.classes)), key=lambda pair: -pair[2])
    return [
        (
            details.classes[true],
            details.classes[found],
            _count(count),
            (percent_text(count / totals[true]), count / totals[true]),
        )
        for true, found, count in pairs[:MAX_CONFUSIONS]
    ]


def _matrix_note(details: EvaluationDetails) -> str:
    shown, number = len(matrix_classes(details)), len(details.classes)
    return "" if shown == number else f"The {MAX_MATRIX} classes of {number} that are most often taken for each other."


def _svg(draw: Callable[[], Figure], name: str) -> Markup:
    with matplotlib.rc_context(STYLE), quiet_glyphs():
        return Markup(to_svg(draw(), name))  # noqa: S704 - Matplotlib escapes its text
