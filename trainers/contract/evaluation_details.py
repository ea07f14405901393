"""What an evaluation leaves besides its figures: curves, confusions, and the images to look at. Standard library only.

Every evaluation writes one file into the trial's folder, `evaluation/0000400.json` for iteration 400, which
`Evaluated.details_file` names. For COCO's 80 classes it is some 0.5 MB.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DETAILS_FOLDER = "evaluation"
"""In a trial's folder."""

MIN_SCORE = 0.5
"""Detections below it are not counted as confusions or errors, and not kept for pictures; COCO's AP counts them."""

NUM_POINTS = 101
"""Points of a curve: recall 0.00, 0.01, …, 1.00, as in COCO's evaluation."""


@dataclass(frozen=True, slots=True)
class ClassCurve:
    """Precision and recall of one class at an IoU (or OKS) of 0.5, all sizes, as COCO accumulates them."""

    name: str
    """The class, as in `EvaluationDetails.classes`."""
    num_objects: int
    """Annotated objects, crowds not counted; with keypoints, those with a labelled one."""
    precision: tuple[float, ...]
    """Precision (0–1) at recall 0.00, 0.01, …; it ends at the highest recall that is reached. The highest precision at
    that or a higher recall (COCO's interpolation). Empty for a class that is never found or has no object."""
    scores: tuple[float, ...]
    """Score of the detection with which each recall is reached: the threshold that gives it."""

    @property
    def f1(self) -> tuple[float, ...]:
        """F1 (0–1) at each of `scores`, the harmonic mean of precision and recall."""
        recalls = (point / (NUM_POINTS - 1) for point in range(len(self.precision)))
        return tuple(2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(self.precision, recalls, strict=True))

    @property
    def best(self) -> tuple[float, float] | None:
        """The highest F1 and the score that gives it; None without a curve."""
        return max(zip(self.f1, self.scores, strict=True), default=None)


@dataclass(frozen=True, slots=True)
class Confusion:
    """Which class was taken for which: detections and objects of an image matched by their boxes.

    First those of the same class, in the order of the scores, each detection with the free object that it overlaps
    most, as COCO does; then what is left, whatever its class. Crowds are not counted, and neither is a detection within
    one of its class.
    """

    iou: float
    """Least overlap of the boxes."""
    score: float
    """Detections below it are not counted."""
    counts: tuple[tuple[int, int, int], ...]
    """True class, detected class, how often; only what occurred. Classes are positions in `EvaluationDetails.classes`,
    and the number of classes stands for the background: an object that was missed, a detection of nothing."""


@dataclass(frozen=True, slots=True)
class ImageErrors:
    """One image with what was missed and wrongly detected on it, by `Confusion`'s matching."""

    image_id: Any
    file_name: str
    """As in the annotation file."""
    missed: int
    """Objects that no detection matched."""
    false: int
    """Detections that matched no object, or one of another class."""


@dataclass(frozen=True, slots=True)
class EvaluationDetails:
    """The file of one evaluation."""

    iteration: int
    classes: tuple[str, ...]
    """Names of the classes in the order of their category ids; each is unique."""
    curves: dict[str, tuple[ClassCurve, ...]]
    """By `box`, `mask` and `keypoint`, as far as the model has them: a curve for each of `classes`, in their order."""
    confusion: Confusion
    worst_images: tuple[ImageErrors, ...]
    """The images with most errors, missed and false together, the worst first; only images with errors."""
    sample_ids: tuple[Any, ...]
    """The validation images that every evaluation of the trial shows: the same ones each time."""
    detections: tuple[dict[str, Any], ...]
    """Detections on the images of `sample_ids` and `worst_images` in COCO's result format, from `confusion.score` up;
    with the best scores first."""

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def read(cls, path: Path) -> EvaluationDetails:
        """Reads a file.

        Raises:
            OSError: It cannot be read.
            ValueError: It is not one of these files.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            curves = {
                part: tuple(
                    ClassCurve(c["name"], c["num_objects"], tuple(c["precision"]), tuple(c["scores"])) for c in each
                )
                for part, each in values["curves"].items()
            }
            confusion = values["confusion"]
            return cls(
                iteration=values["iteration"],
                classes=tuple(values["classes"]),
                curves=curves,
                confusion=Confusion(
                    confusion["iou"], confusion["score"], tuple((t, d, n) for t, d, n in confusion["counts"])
                ),
                worst_images=tuple(ImageErrors(**image) for image in values["worst_images"]),
                sample_ids=tuple(values["sample_ids"]),
                detections=tuple(values["detections"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the details of an evaluation: {error!r}") from error
