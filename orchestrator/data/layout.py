"""The parts of a data set, and where COCO's layout has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from orchestrator.files import is_file, is_folder


@dataclass(frozen=True)
class Split:
    """One part of a data set."""

    annotations: Path
    """COCO JSON file."""
    images: Path
    """Folder that its `file_name` entries are relative to."""
    for_scoring: bool = False
    """Whether models are evaluated on it, for which COCO's scorer needs more."""

    def is_present(self) -> bool:
        """Whether both its file and its folder exist."""
        return is_file(self.annotations) and is_folder(self.images)


class Dataset(NamedTuple):
    """A training and a validation set."""

    train: Split
    val: Split


def coco_layout(root: Path, files: Literal["instances", "person_keypoints"] = "instances") -> Dataset:
    """Where COCO's layout has the two splits below `root`, in the annotation files of that kind; nothing is read."""
    annotations = root / "annotations"
    return Dataset(
        Split(annotations / f"{files}_train2017.json", root / "train2017"),
        Split(annotations / f"{files}_val2017.json", root / "val2017", for_scoring=True),
    )
