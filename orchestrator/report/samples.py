"""Pictures of a trial for the report: samples, the same images over the course of training, and the worst ones.

Samples are not picked by how they look: a trial saves images evenly spaced over the validation set, and all are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.records import Evaluation
from orchestrator.report.class_colors import Color
from orchestrator.report.evaluation import known_details
from orchestrator.report.overlay import Drawn
from orchestrator.report.photos import Entry, Photos, by_image, data_uri
from orchestrator.runlog.folder import TrialEvents
from trainers.contract.evaluation_details import EvaluationDetails, ImageErrors
from trainers.contract.plan import SAMPLES_FILE, TrialPlan

MIN_SCORE = 0.5
"""Detections below it are left out of the pictures; COCO's AP counts them."""

MAX_EVALUATIONS = 6
"""Evaluations of which the same images are shown next to each other, evenly spaced, with the first and the last."""

MAX_WORST = 6
"""Worst images that are shown. With the samples, at most 12 + 42 + 12 pictures: some 1 MB."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One validation image, twice."""

    name: str
    true: str
    """With the annotated objects, as a data URI."""
    predicted: str
    """With the detections, as a data URI."""
    num_true: int
    num_predicted: int
    """Detections shown."""
    is_large: bool
    """Whether it needs the page's whole width."""
    notes: str
    """What a reader must know: that a strip was cut into rows, that some objects have no label, what was missed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The same images over the course of training, as small pictures."""

    evaluations: list[str]
    """Iteration and AP of each evaluation that is shown."""
    images: list[tuple[str, list[tuple[str, int]]]]
    """Name of each image; its pictures as data URIs with the number of objects, the annotated ones first."""


@dataclass(frozen=True, slots=True)
class Samples:
    """The pictures of a trial."""

    pictures: list[Sample]
    legend: dict[str, Color]
    """Colours of the classes that are in any picture."""
    progress: Progress | None = None
    """None for fewer than two evaluations whose detections are known."""
    worst: list[Sample] = field(default_factory=list)
    """The images with most errors of the last evaluation, the worst first."""


def sample_pictures(trial: TrialEvents) -> Samples:
    """Draws the images whose detections a trial's evaluations saved.

    Raises:
        OSError: The detections, the annotations or an image are missing.
        ValueError: One of them cannot be read.
    """
    if not isinstance(trial.plan, TrialPlan):
        raise ValueError("the trial's events are gone, or were read from a log")  # noqa: TRY004 - of the run, not a type
    shown = known_details(trial, MAX_EVALUATIONS)
    if not shown:
        saved = orjson.loads((trial.folder / SAMPLES_FILE).read_bytes())  # of an older version
        photos = Photos(trial.plan.val, saved["image_ids"])
        return _pictures(photos, saved["image_ids"], saved["detections"], [], None)
    last = shown[-1][1]
    worst = last.worst_images[:MAX_WORST]
    photos = Photos(trial.plan.val, {*last.sample_ids, *(image.image_id for image in worst)})
    progress = _progress(photos, shown) if len(shown) > 1 else None
    return _pictures(photos, last.sample_ids, last.detections, worst, progress)


def _pictures(
    photos: Photos,
    sample_ids: Sequence[Any],
    detections: Sequence[Entry],
    worst: Sequence[ImageErrors],
    progress: Progress | None,
) -> Samples:
    certain = by_image((entry for entry in detections if entry["score"] >= MIN_SCORE), photos.files)
    shown = photos.class_names(entry for image in photos.files for entry in photos.objects[image] + certain[image])
    return Samples(
        pictures=[_sample(photos, image, certain[image]) for image in photos.files if image in set(sample_ids)],
        legend={name: color for name, color in photos.colors.items() if name in shown},
        progress=progress,
        worst=[
            _sample(photos, image.image_id, certain[image.image_id], f"{image.missed} missed, {image.false} false")
            for image in worst
            if image.image_id in photos.files
        ],
    )


def _sample(photos: Photos, image_id: Any, found: Sequence[Entry], note: str = "") -> Sample:
    true, predicted = photos.draw(image_id, photos.objects[image_id]), photos.draw(image_id, found)
    notes = [note] if note else []
    if true.num_pieces > 1:
        notes.append(f"cut into {true.num_pieces} {'rows' if true.is_wide else 'columns'}")
    if unlabelled := true.num_unlabelled + predicted.num_unlabelled:
        notes.append(f"{unlabelled} objects without a label, for want of room")
    is_large = true.num_pieces > 1 or true.is_crowded or predicted.is_crowded
    uris = data_uri(true.picture), data_uri(predicted.picture)
    name = Path(photos.files[image_id]).name
    return Sample(name, *uris, true.num_objects, predicted.num_objects, is_large, "; ".join(notes))


def _progress(photos: Photos, shown: Sequence[tuple[Evaluation, EvaluationDetails]]) -> Progress:
    ap = FIGURES["box_ap"].text
    images = [image for image in photos.files if image in set(shown[-1][1].sample_ids)]
    found = [by_image((e for e in each.detections if e["score"] >= MIN_SCORE), set(images)) for _, each in shown]
    return Progress(
        evaluations=[f"iteration {each.iteration:,}, box AP {ap(each.box_ap)}" for each, _ in shown],
        images=[
            (
                Path(photos.files[image]).name,
                [
                    _thumbnail(photos.draw(image, entries, thumbnail=True))
                    for entries in (photos.objects[image], *(each[image] for each in found))
                ],
            )
            for image in images
        ],
    )


def _thumbnail(drawn: Drawn) -> tuple[str, int]:
    return data_uri(drawn.picture), drawn.num_objects
