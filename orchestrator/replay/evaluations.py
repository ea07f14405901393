"""Reads the COCO evaluations of a detectron2 log; a printed `nan` or -1 is not measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.replay.messages import Message
from trainers.contract.events import measured

KINDS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
"""detectron2's names of the tasks, and those in names of figures."""

_RESULTS = re.compile(r"Evaluation results for (bbox|segm|keypoints):")
_DATASET = re.compile(r"Evaluation results for (\S+) in csv format")
_LOADING = re.compile(r"(?:Loading \S+ takes ([\d.]+) seconds|Loaded \d+ images in COCO format)")
_STAGES = ("Inference done", "Accumulating", "Preparing results", "Saving results")
_INFERENCE = re.compile(r"Total inference time: (\d+):(\d\d):(\d\d(?:\.\d+)?)")
_NOTHING = ("No predictions from the model", "Did not receive valid predictions")
_PRINTED = re.compile(r"-?(?:\d+\.\d{3,}|nan|inf)")
"""A figure as detectron2 prints it; a shorter one was cut off."""


@dataclass(slots=True)
class LoggedEvaluation:
    """One evaluation of a log."""

    started: float
    """When its data began to load (Unix seconds), else when inference began."""
    after_iteration: int
    """Iterations of the last progress line before it."""
    ended: float
    """Time of its last line."""
    box_scored: float | None = None
    """When the box figures were printed; None where they were not."""
    mask_scored: float | None = None
    """The same for masks."""
    keypoint_scored: float | None = None
    """The same for keypoints."""
    figures: dict[str, float | None] = field(default_factory=dict)
    """`box_ap`, `box_ap50`, …, `mask_apl`, 0–100; None for a printed nan or -1."""
    inference_seconds: float | None = None
    dataset: str | None = None
    found_nothing: bool = False
    """Whether the log says that the model predicted nothing."""
    complete: bool = False
    """Whether it came to its end, with figures or without."""
    after_training: bool = False
    """Whether it followed the closing lines of training."""
    iteration: int | None = None
    """Iterations trained before it, where the source names them."""


class EvaluationReader:
    """Collects the evaluations of one launch from its messages."""

    def __init__(self) -> None:
        self._done: list[LoggedEvaluation] = []
        self._current: LoggedEvaluation | None = None
        self._loading: float | None = None
        self._task = ""
        self._names: list[str] = []

    def read(self, message: Message, after_iteration: int, *, training: bool, closed: bool) -> None:
        """Takes a message that is not a progress line.

        Args:
            message: The message.
            after_iteration: Iterations of the last progress line.
            training: Whether training has started: data loaded before is training data.
            closed: Whether training has ended.
        """
        text = message.text
        if text.startswith("Start inference on"):
            started = self._loading if self._loading is not None else message.time
            self._close()
            self._current = LoggedEvaluation(started, after_iteration, message.time, after_training=closed)
        elif self._current is None:
            loading = _LOADING.search(text) if training else None
            if loading and self._loading is None:
                self._loading = message.time - float(loading[1] or 0)
        elif _LOADING.search(text):
            # Data of the next evaluation.
            self._close()
            self._loading = message.time
        else:
            self._score(message, self._current)

    def _score(self, message: Message, current: LoggedEvaluation) -> None:
        """Takes a message of the current evaluation, which ends with the last message of this kind."""
        text = message.text
        if results := _RESULTS.search(text):
            self._add(results[1], message.time, table_figures(KINDS[results[1]], message.more))
        elif dataset := _DATASET.search(text):
            current.dataset, current.complete = dataset[1], True
        elif inference := _INFERENCE.search(text):
            current.inference_seconds = int(inference[1]) * 3600 + int(inference[2]) * 60 + float(inference[3])
        elif "copypaste: " in text:
            self._copypaste(text.split("copypaste: ", 1)[1], message.time)
        elif any(words in text for words in _NOTHING):
            current.found_nothing = current.complete = True
            self._add("bbox", message.time, {})
        elif "evaluat" not in text.lower() and not text.startswith(_STAGES):
            return
        current.ended = message.time

    def _add(self, task: str, time: float, figures: dict[str, float | None]) -> None:
        """Takes the figures of a task, which count from when they were first printed."""
        current = self._current
        if current is None:
            return
        scored = f"{KINDS[task]}_scored"
        if getattr(current, scored) is None:
            setattr(current, scored, time)
        current.figures.update(figures)

    def _copypaste(self, text: str, time: float) -> None:
        if text.startswith("Task: "):
            self._task, self._names = text.removeprefix("Task: ").strip(), []
        elif text.startswith("AP,"):
            self._names = text.strip().split(",")
        elif self._names and self._task in KINDS:
            figures = printed_figures(KINDS[self._task], self._names, text.strip().split(","))
            if figures and self._current is not None:
                self._add(self._task, time, figures)
                self._current.complete = True

    def interrupt(self) -> None:
        """Ends the current evaluation: training continues."""
        if self._current is not None:
            self._current.complete = True
        self._close()
        self._loading = None

    def _close(self) -> None:
        if self._current is not None:
            self._done.append(self._current)
        self._current, self._loading, self._task = None, None, ""

    def finished(self) -> list[LoggedEvaluation]:
        """All evaluations, in order; the last may be incomplete."""
        self._close()
        return self._done


def table_figures(kind: str, lines: Sequence[str]) -> dict[str, float | None]:
    """The figures of detectron2's table of results, the lines after its heading; none where a row is not whole."""
    rows = [line.strip() for line in lines if line.lstrip().startswith("|")][:3]
    if len(rows) < 3 or not all(len(row) > 1 and row.endswith("|") for row in rows):
        return {}
    names, _, values = ([cell.strip() for cell in row[1:-1].split("|")] for row in rows)
    return printed_figures(kind, names, values)


def printed_figures(kind: str, names: Sequence[str], values: Sequence[str]) -> dict[str, float | None]:
    """Figures from their names (`AP`, `AP50`, `APs` …) and texts; none where these do not fit together."""
    whole = len(names) == len(values) and names[0] == "AP" and all(_PRINTED.fullmatch(value) for value in values)
    if not whole:
        return {}
    return {f"{kind}_{name.lower()}": ap(float(value)) for name, value in zip(names, values, strict=True)}


def ap(value: float | None) -> float | None:
    """An AP of 0–100; None for a nan, and for -1, which stands for a figure that was not measured."""
    value = measured(value)
    return value if value is not None and 0 <= value <= 100 else None
