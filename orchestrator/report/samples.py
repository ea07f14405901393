"""Sample images for the report: the annotated objects next to the detected ones.

They are not picked by how they look: a trial saves images evenly spaced over the validation set, and all are shown.
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from orchestrator.report.class_colors import Color, class_colors
from orchestrator.report.overlay import Drawn, draw
from orchestrator.runlog.folder import TrialEvents
from trainers.contract.annotations import read_annotations
from trainers.contract.plan import SAMPLES_FILE, TrialPlan

MIN_SCORE = 0.5
"""Detections below it are left out of the pictures; COCO's AP counts them."""


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
    """What a reader must know: that a strip was cut into rows, that some objects have no label."""


@dataclass(frozen=True, slots=True)
class Samples:
    """The pictures of a trial."""

    pictures: list[Sample]
    legend: dict[str, Color]
    """Colours of the classes that are in any picture."""


def sample_pictures(trial: TrialEvents) -> Samples:
    """Draws the images whose detections a trial's last evaluation saved.

    Raises:
        OSError: The detections, the annotations or an image are missing.
        ValueError: One of them cannot be read.
    """
    if not isinstance(trial.plan, TrialPlan):
        raise ValueError("the trial's events are gone, or were read from a log")  # noqa: TRY004 - of the run, not a type
    saved = orjson.loads((trial.folder / SAMPLES_FILE).read_bytes())
    truth = read_annotations(Path(trial.plan.val.annotations).read_bytes(), orjson.loads).document
    names = {category["id"]: str(category.get("name", category["id"])) for category in truth.get("categories", [])}
    colors = class_colors(names.values())
    wanted = set(saved["image_ids"])
    true, found = _by_image(truth["annotations"], wanted), _by_image(saved["detections"], wanted)
    pictures, shown = [], set()
    for image in truth["images"]:
        if image["id"] in wanted:
            photo = read_photo(Path(trial.plan.val.images) / image["file_name"])
            objects = true[image["id"]]
            certain = [entry for entry in found[image["id"]] if entry["score"] >= MIN_SCORE]
            both = draw(photo, objects, names, colors), draw(photo, certain, names, colors)
            pictures.append(_sample(Path(image["file_name"]).name, *both))
            shown |= {names.get(entry.get("category_id")) for entry in objects + certain}
    return Samples(pictures, {name: color for name, color in colors.items() if name in shown})


def _by_image(entries: Iterable[dict[str, Any]], wanted: set[Any]) -> dict[Any, list[dict[str, Any]]]:
    found = defaultdict(list)
    for entry in entries:
        if entry["image_id"] in wanted:
            found[entry["image_id"]].append(entry)
    return found


def read_photo(path: Path) -> Image.Image:
    """An image as RGB; of 16 bits or of floats, its darkest value is black and its lightest is white."""
    with Image.open(path) as file:
        if not file.mode.startswith(("I", "F")):
            return file.convert("RGB")
        values = np.nan_to_num(np.asarray(file.convert("F")))
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)).convert("RGB")


def _sample(name: str, true: Drawn, predicted: Drawn) -> Sample:
    notes = []
    if true.num_pieces > 1:
        notes.append(f"cut into {true.num_pieces} {'rows' if true.is_wide else 'columns'}")
    if unlabelled := true.num_unlabelled + predicted.num_unlabelled:
        notes.append(f"{unlabelled} objects without a label, for want of room")
    is_large = true.num_pieces > 1 or true.is_crowded or predicted.is_crowded
    uris = _data_uri(true.picture), _data_uri(predicted.picture)
    return Sample(name, *uris, true.num_objects, predicted.num_objects, is_large, "; ".join(notes))


def _data_uri(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
