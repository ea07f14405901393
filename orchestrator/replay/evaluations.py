"""Reads the COCO evaluations of a detectron2 log; a printed `nan` is not measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from orchestrator.replay.messages import Message
from trainers.contract.events import measured

KINDS = {"bbox": "box", "segm": "mask"}
_RESULTS = re.compile(r"Evaluation results for (bbox|segm):")
_DATASET = re.compile(r"Evaluation results for (\S+) in csv format")
_LOADING = re.compile(r"(?:Loading \S+ takes ([\d.]+) seconds|Loaded \d+ images in COCO format)")
_STAGES = ("Inference done", "Accumulating", "Preparing results", "Saving results")
_INFERENCE = re.compile(r"Total inference time: (\d+):(\d\d):(\d\d(?:\.\d+)?)")


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
    figures: dict[str, float | None] = field(default_factory=dict)
    """`box_ap`, `box_ap50`, …, `mask_apl`, 0–100; None for a printed nan."""
    inference_seconds: float | None = None
    dataset: str | None = None


class EvaluationReader:
    """Collects the evaluations of one launch from its messages."""

    def __init__(self) -> None:
        self._done: list[LoggedEvaluation] = []
        self._current: LoggedEvaluation | None = None
        self._loading: float | None = None
        self._task = ""
        self._names: list[str] = []

    def read(self, message: Message, after_iteration: int, training: bool) -> None:
        """Takes a message that is not a progress line; data loaded before `training` has started is training data."""
        text = message.text
        if text.startswith("Start inference on"):
            started = self._loading if self._loading is not None else message.time
            self._close()
            self._current = LoggedEvaluation(started, after_iteration, message.time)
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
            kind = KINDS[results[1]]
            if kind == "box":
                current.box_scored = message.time
            else:
                current.mask_scored = message.time
            current.figures.update(_table(kind, message.more))
        elif dataset := _DATASET.search(text):
            current.dataset = dataset[1]
        elif inference := _INFERENCE.search(text):
            current.inference_seconds = int(inference[1]) * 3600 + int(inference[2]) * 60 + float(inference[3])
        elif "copypaste: " in text:
            self._copypaste(text.split("copypaste: ", 1)[1], current)
        elif "evaluat" not in text.lower() and not text.startswith(_STAGES):
            return
        current.ended = message.time

    def _copypaste(self, text: str, current: LoggedEvaluation) -> None:
        if text.startswith("Task: "):
            self._task, self._names = text.removeprefix("Task: "), []
        elif text.startswith("AP,"):
            self._names = text.split(",")
        elif self._names and self._task in KINDS:
            current.figures.update(_figures(KINDS[self._task], self._names, text.split(",")))

    def interrupt(self) -> None:
        """Ends the current evaluation: training continues."""
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


def _table(kind: str, lines: list[str]) -> dict[str, float | None]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]
    if len(rows) < 3 or not rows[0][0].startswith("AP"):
        return {}
    return _figures(kind, rows[0], rows[2])


def _figures(kind: str, names: list[str], values: list[str]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in zip(names, values, strict=False):
        try:
            found[f"{kind}_{name.strip().lower()}"] = measured(float(value))
        except ValueError:
            continue
    return found
