"""Splits one annotation file into a training and a validation set by image, with every class in both if possible."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from pathlib import Path
from typing import NamedTuple

from orchestrator.data.raw_file import RawFile
from orchestrator.files import write_atomically

ROBOFLOW_COPIES = r"(.*)\.rf\."
"""Roboflow names the augmented copies of one image NAME.rf.HASH.jpg."""

Group = tuple[int, Set[object]]
"""Images that stay together: their number, and the classes that occur in them."""


class SplitResult(NamedTuple):
    """What `split` wrote."""

    train: Path
    val: Path
    num_train: int
    """Images."""
    num_val: int
    """Images."""
    images_of_class: dict[str, tuple[int, int]]
    """By name, the number of images with the class in the training and in the validation set."""


def split(file: Path, to: Path, *, val_share: float, seed: int = 0, group_by: str = ROBOFLOW_COPIES) -> SplitResult:
    """Writes `train.json` and `val.json` into a folder; file names, ids and all other fields stay as they are.

    The same seed gives the same sets, whatever the order of the file: an image is drawn by its file name. Images with
    the same file name stay together.

    Args:
        file: COCO JSON.
        to: Folder; it is made.
        val_share: Share of the images that become the validation set, above 0 and below 1.
        seed: Of the draw.
        group_by: Regular expression matched at the start of file names: images for which it matches the same text (its
            first group, if it has one) stay together.

    Raises:
        FileExistsError: The folder holds a `train.json` or `val.json`.
        OSError: A file cannot be read or written.
        ValueError: An argument is not allowed, the file is not in COCO's format, or there is nothing to split.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"--val is {val_share:g}: give a share above 0 and below 1, such as 0.2")
    targets = to / "train.json", to / "val.json"
    if taken := next(filter(Path.exists, targets), None):
        raise FileExistsError(f"{taken} exists: name another folder")
    raw = RawFile(file)
    key_of = _group_keys(raw, group_by)
    if len(set(key_of.values())) < 2:
        what = f"{len(raw.images)} images in one group" if raw.images else "no image"
        raise ValueError(f"{file} holds {what}: there is nothing to split")
    images_of: defaultdict[object, set[object]] = defaultdict(set)
    classes_of: defaultdict[str, set[object]] = defaultdict(set)
    for annotation in raw.annotations:
        image_id, category = annotation["image_id"], annotation["category_id"]
        if image_id in key_of:
            images_of[category].add(image_id)
            classes_of[key_of[image_id]].add(category)
    sizes = Counter(key_of.values())
    val_keys = stratify({key: (size, classes_of[key]) for key, size in sizes.items()}, val_share, seed)
    val_ids = {image_id for image_id, key in key_of.items() if key in val_keys}
    images = list(zip(raw.entries["images"], raw.images, strict=True))
    annotations = list(zip(raw.entries["annotations"], raw.annotations, strict=True))
    for target, is_val in zip(targets, (False, True), strict=True):
        content = raw.encode(
            [entry for entry, seen in images if (seen["id"] in val_ids) == is_val],
            # What belongs to no image goes to the training set, where checks report it.
            [entry for entry, seen in annotations if (seen["image_id"] in val_ids) == is_val],
        )
        write_atomically(target, content)
    counts = {
        str(category["name"]): (len(images_of[category["id"]] - val_ids), len(images_of[category["id"]] & val_ids))
        for category in raw.categories
    }
    return SplitResult(*targets, len(key_of) - len(val_ids), len(val_ids), counts)


def stratify(groups: Mapping[str, Group], val_share: float, seed: int) -> set[str]:
    """Draws a validation set in which every class has its share, as far as that is possible.

    Classes take turns, the rarest first: each moves as many groups to the validation set as it lacks there, at least
    one, those first that bring the fewest classes that have enough. A class never loses its last group of training.
    Then any groups fill the set up, at the end also those with the only image of a class.

    Args:
        groups: By keys, which decide the draw; their order does not.
        val_share: Share of the validation set, between 0 and 1.
        seed: Of the draw.

    Returns:
        The keys of the validation set: not none, and not all of two or more.
    """
    drawn = sorted(groups, key=lambda key: hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest())
    # Images without objects are a class, too.
    labels = {key: groups[key][1] or {None} for key in drawn}
    members: defaultdict[object, list[str]] = defaultdict(list)
    for key in drawn:
        for label in labels[key]:
            members[label].append(key)
    wanted = {label: max(1, int(val_share * len(keys))) for label, keys in members.items()}
    on_val: Counter[object] = Counter()
    chosen: set[str] = set()

    def choose(key: str, *, with_single: bool = False) -> None:
        sizes = {label: len(members[label]) for label in labels[key]}
        if all(size - on_val[label] > 1 or (with_single and size == 1) for label, size in sizes.items()):
            chosen.add(key)
            on_val.update(labels[key])

    for label, keys in sorted(members.items(), key=lambda pair: (len(pair[1]), repr(pair[0]))):
        # Of a class that needs one image there, one with many classes: else such images make the set too large.
        costs = {
            key: (
                sum(on_val[each] >= wanted[each] for each in labels[key]),
                -len(labels[key]) if wanted[label] == 1 else 0,
            )
            for key in keys
        }
        for key in sorted(keys, key=costs.__getitem__):
            if on_val[label] < wanted[label] and key not in chosen:
                choose(key)
    room = val_share * sum(size for size, _ in groups.values()) - sum(groups[key][0] for key in chosen)
    for with_single in (False, True):
        for key in drawn:
            if key not in chosen and groups[key][0] <= room:
                choose(key, with_single=with_single)
                room -= groups[key][0] if key in chosen else 0
    return chosen or {min(drawn, key=lambda key: groups[key][0])}


def _group_keys(raw: RawFile, group_by: str) -> dict[object, str]:
    """By image id, what the images that stay together have in common."""
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise ValueError(f"--group-by {group_by!r} is no regular expression: {error}") from None
    keys: dict[object, str] = {}
    for image in raw.images:
        name, image_id = image["file_name"], image["id"]
        if image_id in keys:
            raise ValueError(f"{raw.path}: two images have the id {image_id}; `data check` lists all such")
        match = pattern.match(name)
        keys[image_id] = name if match is None else (match[1] if pattern.groups else match[0]) or ""
    return keys
