"""Images of a validation set, with their annotated or detected objects drawn on them."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from orchestrator.report.class_colors import class_colors
from orchestrator.report.overlay import Drawn, draw
from trainers.contract.annotations import read_annotations
from trainers.contract.plan import DatasetPlan

Entry = dict[str, Any]
"""An annotation or a detection in COCO's form."""


class Photos:
    """Some images of a data set.

    Args:
        data: The data set.
        image_ids: Which of its images; others are not known.

    Raises:
        OSError: The annotations cannot be read.
        ValueError: They are not in COCO's format; a KeyError where a field is missing.
    """

    def __init__(self, data: DatasetPlan, image_ids: Collection[Any]) -> None:
        document = read_annotations(Path(data.annotations).read_bytes(), orjson.loads).document
        self._folder, wanted = Path(data.images), set(image_ids)
        self.names = {each["id"]: str(each.get("name", each["id"])) for each in document.get("categories", [])}
        """Names of the classes, by category id."""
        self.colors = class_colors(self.names.values())
        """Colours of the classes, by name."""
        self.files = {each["id"]: str(each["file_name"]) for each in document["images"] if each["id"] in wanted}
        """Their names in the annotation file, by image id, in its order."""
        self.objects = by_image(document["annotations"], wanted)
        """The annotated objects, by image id."""

    def draw(self, image_id: Any, entries: Iterable[Entry], *, thumbnail: bool = False) -> Drawn:
        """Draws objects over an image.

        Raises:
            OSError: The image cannot be read.
            KeyError: It is not one of them.
        """
        photo = read_photo(self._folder / self.files[image_id])
        return draw(photo, list(entries), self.names, self.colors, thumbnail=thumbnail)

    def class_names(self, entries: Iterable[Entry]) -> set[str]:
        """Names of the classes of some objects."""
        return {self.names[each["category_id"]] for each in entries if each.get("category_id") in self.names}


def by_image(entries: Iterable[Entry], wanted: Collection[Any]) -> dict[Any, list[Entry]]:
    """Objects of some images, by image id; an image without any has an empty list."""
    found: dict[Any, list[Entry]] = defaultdict(list)
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


def data_uri(picture: Image.Image) -> str:
    """A picture as a data URI."""
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
