"""Sample images for the report: the true masks next to the predicted ones, drawn without torch.

They are not picked by how they look: a trial saves images evenly spaced over the validation set, and all are shown.
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle

from orchestrator.data.masks import check_rle
from orchestrator.runlog.folder import TrialEvents
from trainers.contract.plan import SAMPLES_FILE, TrialPlan

MIN_SCORE = 0.5
"""Detections below it are left out of the pictures; COCO's AP counts them."""

LONGER_SIDE = 360
"""Pixels of the longer side of a picture."""

COLORS = ((64, 156, 255), (255, 149, 0), (40, 205, 95), (191, 90, 242), (255, 69, 88), (90, 220, 230))


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


def sample_pictures(trial: TrialEvents) -> list[Sample]:
    """Draws the images whose detections a trial's last evaluation saved.

    Raises:
        OSError: The detections, the annotations or an image are missing.
        ValueError: One of them cannot be read.
    """
    if not isinstance(trial.plan, TrialPlan):
        raise ValueError("the trial's events are gone, or were read from a log")  # noqa: TRY004 - of the run, not a type
    saved = orjson.loads((trial.folder / SAMPLES_FILE).read_bytes())
    truth = orjson.loads(Path(trial.plan.val.annotations).read_bytes())
    names = {category["id"]: str(category.get("name", category["id"])) for category in truth.get("categories", [])}
    wanted = set(saved["image_ids"])
    true, found = _by_image(truth["annotations"], wanted), _by_image(saved["detections"], wanted)
    pictures = []
    for image in truth["images"]:
        if image["id"] in wanted:
            with Image.open(Path(trial.plan.val.images) / image["file_name"]) as file:
                photo = file.convert("RGB")
            objects = true[image["id"]]
            certain = [entry for entry in found[image["id"]] if entry["score"] >= MIN_SCORE]
            both = _picture(photo, objects, names), _picture(photo, certain, names)
            pictures.append(Sample(Path(image["file_name"]).name, *both, len(objects), len(certain)))
    return pictures


def _by_image(entries: list[dict[str, Any]], wanted: set[Any]) -> dict[Any, list[dict[str, Any]]]:
    found = defaultdict(list)
    for entry in entries:
        if entry["image_id"] in wanted:
            found[entry["image_id"]].append(entry)
    return found


def _picture(photo: Image.Image, entries: list[dict[str, Any]], names: dict[Any, str]) -> str:
    """The photo with filled and outlined masks (boxes where there are none), as a WebP data URI."""
    scale = LONGER_SIDE / max(photo.size)
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC), dtype=np.float32).copy()
    outlines = np.zeros(pixels.shape[:2], dtype=bool)
    colors = {category: COLORS[position % len(COLORS)] for position, category in enumerate(names)}
    for entry in entries:
        mask = _mask(entry, photo.height, photo.width)
        if mask is not None:
            inside = np.asarray(Image.fromarray(mask * np.uint8(255)).resize(size, Image.Resampling.BILINEAR)) > 127
            color = np.array(colors.get(entry["category_id"], COLORS[-1]), dtype=np.float32)
            pixels[inside] = 0.55 * pixels[inside] + 0.45 * color
            edge = inside & ~_shrunk(inside)
            pixels[edge & ~outlines] = color
            outlines |= edge
    drawn = Image.fromarray(pixels.astype(np.uint8))
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(14)
    for entry in entries:
        left, top, width, height = (value * scale for value in entry["bbox"])
        color_of = colors.get(entry["category_id"], COLORS[-1])
        pen.rectangle((left, top, left + max(width, 1), top + max(height, 1)), outline=color_of)
        score = f" {100 * entry['score']:.0f} %" if "score" in entry else ""
        text = names.get(entry["category_id"], "?")[:24] + score
        corner = min(max(left, 0), max(size[0] - pen.textlength(text, font) - 4, 0)), max(top - 17, 0)
        pen.rectangle(pen.textbbox((corner[0] + 2, corner[1]), text, font), fill=(15, 20, 28))
        pen.text((corner[0] + 2, corner[1]), text, fill=color_of, font=font)
    content = io.BytesIO()
    drawn.save(content, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _mask(entry: dict[str, Any], height: int, width: int) -> NDArray[np.uint8] | None:
    shape = entry.get("segmentation")
    if not shape:
        return None
    if isinstance(shape, dict) and check_rle(shape, (width, height)):
        return None  # pycocotools would read beyond a bad one
    if isinstance(shape, list):
        encoded = rle.merge(rle.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        encoded = rle.frPyObjects(shape, height, width)
    else:
        encoded = {"size": shape["size"], "counts": shape["counts"].encode()}
    mask: NDArray[np.uint8] = rle.decode(encoded)
    return mask


def _shrunk(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without its outermost two pixels."""
    for _ in range(2):
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside
