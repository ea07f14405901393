"""Copies a small, consistent part of a COCO data set: some images of each split with all their annotations."""

from __future__ import annotations

import random
import shutil
import uuid
from pathlib import Path

from orchestrator.data.exports import find_splits
from orchestrator.data.image_names import check_name
from orchestrator.data.layout import Split, coco_layout
from orchestrator.data.raw_file import RawFile


def excerpt(source: Path, to: Path, *, num_images: int, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Copies at most `num_images` of each split of a data set in COCO's layout into a new folder.

    Images that have an object come first, drawn at random by the seed; all categories are kept, so that class numbers
    stay the same. The folder is written under another name and renamed.

    Returns:
        Part (`train`, `val`) to the number of images and annotations taken.

    Raises:
        FileExistsError: `to` exists.
        ValueError: There is no data set, `num_images` is below 1, or a file's name leads out of its folder.
        OSError: A file cannot be read or written.
    """
    if num_images < 1:
        raise ValueError(f"{num_images} images make no excerpt")
    to = to.absolute()
    if to.exists():
        raise FileExistsError(f"{to} exists: name a new folder")
    splits, findings = find_splits(source)
    if not splits.keys() & {"train", "val"}:
        raise ValueError(findings[0].to_line().removeprefix("error "))
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.parent / f".{to.name}.{uuid.uuid4().hex[:8]}.partial"
    targets = coco_layout(partial)._asdict()
    try:
        taken = {part: _copy_part(splits[part], targets[part], num_images, seed) for part in targets if part in splits}
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return taken


def _copy_part(source: Split, target: Split, num_images: int, seed: int) -> tuple[int, int]:
    raw = RawFile(source.annotations)
    with_objects = {seen["image_id"] for seen in raw.annotations if not seen["iscrowd"]}

    def rank(index: int) -> tuple[bool, float]:
        # Each image has its own key, so that adding images to the source does not change which others are taken.
        image_id = raw.images[index]["id"]
        return image_id not in with_objects, random.Random(f"{seed} {image_id}").random()  # noqa: S311 - no secret

    taken = sorted(sorted(range(len(raw.images)), key=rank)[:num_images], key=lambda index: raw.images[index]["id"])
    ids = {raw.images[index]["id"] for index in taken}
    target.images.mkdir(parents=True)
    target.annotations.parent.mkdir(exist_ok=True)
    for index in taken:
        name = raw.images[index]["file_name"]
        if problem := check_name(name):
            raise ValueError(f"{source.annotations}: {problem.what}")
        (target.images / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.images / name, target.images / name)
    pairs = zip(raw.entries["annotations"], raw.annotations, strict=True)
    annotations = [entry for entry, seen in pairs if seen["image_id"] in ids]
    target.annotations.write_bytes(raw.encode([raw.entries["images"][index] for index in taken], annotations))
    return len(taken), len(annotations)
