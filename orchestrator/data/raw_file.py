"""Reads an annotation file so that it can be written again with every entry as it was, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from trainers.contract.annotations import read_annotations, to_utf8

SEEN_FIELDS = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id", "iscrowd"),
    "categories": ("id", "name"),
}
"""Lists of a COCO file, and the fields of their entries that are read."""


class RawFile:
    """An annotation file: its entries as bytes, and of each what says to which image and class it belongs."""

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            OSError: It cannot be read.
            ValueError: It is not in COCO's format.
        """
        try:
            text = to_utf8(path.read_bytes())
            try:
                read = self._see(text)
            except msgspec.MsgspecError:
                read = self._see_with_python(text)
            # The common reader makes ids comparable: text and decimals become integers.
            seen = read_annotations(text, lambda _: read).document
        except KeyError as error:
            raise ValueError(f"{path} is not a COCO file: it has no list {error}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a COCO file (`data check` shows where): {error}") from None
        self.path = path
        self.images: list[dict[str, Any]] = seen["images"]
        """Id and file name of each image."""
        self.annotations: list[dict[str, Any]] = seen["annotations"]
        """Image id, category id and iscrowd of each annotation."""
        self.categories: list[dict[str, Any]] = seen["categories"]
        """Id and name of each category."""
        if any(not isinstance(image.get("file_name"), str) for image in self.images):
            raise ValueError(f"{path}: not every image has a file_name (`data check` shows which)")
        values = (entry[field] for key, fields in SEEN_FIELDS.items() for entry in seen[key] for field in fields)
        if any(isinstance(value, list | dict) for value in values):
            raise ValueError(f"{path}: an id or a name is a list or an object (`data check` shows which)")

    def _see(self, text: bytes) -> dict[str, list[dict[str, Any]]]:
        self._parts = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        self.entries = {key: msgspec.json.decode(self._parts[key], type=list[msgspec.Raw]) for key in SEEN_FIELDS}
        seen = {}
        for key, fields in SEEN_FIELDS.items():
            shape = msgspec.defstruct("Entry", [(field, Any, None) for field in fields])
            entries = (msgspec.json.decode(entry, type=shape) for entry in self.entries[key])
            seen[key] = [{field: getattr(entry, field) for field in fields} for entry in entries]
        return seen

    def _see_with_python(self, text: bytes) -> dict[str, list[dict[str, Any]]]:
        """The same of a file that holds NaN or infinity, which Python writes and reads, and other parsers refuse."""
        document = json.loads(text)
        self._parts = {key: _raw(value) for key, value in document.items()}
        self.entries = {key: [_raw(entry) for entry in document[key]] for key in SEEN_FIELDS}
        return {
            key: [{field: entry.get(field) for field in fields} for entry in document[key]]
            for key, fields in SEEN_FIELDS.items()
        }

    def encode(self, images: list[msgspec.Raw], annotations: list[msgspec.Raw]) -> bytes:
        """The file with these images and annotations, everything else as it was."""
        return msgspec.json.encode({**self._parts, "images": images, "annotations": annotations})


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(value).encode())
