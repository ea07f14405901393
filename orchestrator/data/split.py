"""Splits one annotation file into a training and a validation set by image, with every class in both if possible."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.data.raw_file import RawFile
from orchestrator.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

TRAIN, VAL = 0, 1
ROBOFLOW_COPY = re.compile(r"(.*)\.rf\.")
"""Roboflow names the augmented copies of one image NAME.rf.HASH.jpg."""


Item = tuple[str, int, "set[object]"]
"""What `stratify` divides: a key, a weight, and labels."""

_Counts = dict[object, Counter[int]]
"""Items of each label on each side."""


class ClassCount(NamedTuple):
    """How often a class occurs in the two sets."""

    name: str
    train_images: int
    val_images: int
    train_objects: int
    val_objects: int


@dataclass
class SplitResult:
    """What `split` wrote."""

    train: Path
    val: Path
    num_train: int
    """Images."""
    num_val: int
    """Images."""
    classes: list[ClassCount]
    """Those with the fewest images first."""
    num_copies: int
    """Images that have the name of another up to Roboflow's `.rf.`, and were not kept together with it on purpose."""


@dataclass
class _Group:
    """Images that stay together."""

    key: str
    images: list[int] = field(default_factory=list)
    """Their positions in the file."""
    classes: set[object] = field(default_factory=set)
    """Ids of the categories that occur in them."""


def split(file: Path, to: Path, *, val_share: float, seed: int = 0, group_by: str | None = None) -> SplitResult:
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
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{target} exists: name another folder")
    raw = RawFile(file)
    groups = _groups(raw, _pattern(group_by))
    if len(groups) < 2:
        what = f"{len(raw.images)} images in one group" if raw.images else "no image"
        raise ValueError(f"{file} holds {what}: there is nothing to split")
    sides = stratify([(group.key, len(group.images), group.classes) for group in groups], val_share, seed)
    side_of = {
        raw.images[index]["id"]: side for group, side in zip(groups, sides, strict=True) for index in group.images
    }
    contents = [_part(raw, side_of, side) for side in (TRAIN, VAL)]
    try:
        for target, content in zip(targets, contents, strict=True):
            write_atomically(target, content)
    except OSError:
        for target in targets:
            target.unlink(missing_ok=True)
        raise
    counts = Counter(side_of.values())
    copies = Counter(match[1] for image in raw.images if (match := ROBOFLOW_COPY.match(image["file_name"])))
    num_copies = 0 if group_by else sum(number for number in copies.values() if number > 1)
    return SplitResult(*targets, counts[TRAIN], counts[VAL], _count_classes(raw, side_of), num_copies)


def _part(raw: RawFile, side_of: dict[object, int], side: int) -> bytes:
    images = zip(raw.entries["images"], raw.images, strict=True)
    annotations = zip(raw.entries["annotations"], raw.annotations, strict=True)
    return raw.encode(
        [entry for entry, seen in images if side_of[seen["id"]] == side],
        # What belongs to no image stays where checks report it.
        [entry for entry, seen in annotations if side_of.get(seen["image_id"], TRAIN) == side],
    )


def stratify(items: Sequence[Item], val_share: float, seed: int) -> list[int]:
    """Divides items so that every label occurs on both sides in the wanted proportion, as far as that is possible.

    Iterative stratification: labels are dealt out one after the other, the rarest first, each item to the side that
    still lacks most of that label, then most items (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of
    Multi-Label Data", 2011). Of a label with two items or more, one is wanted on each side; where a label still is on
    one side only, an item that no other label needs is moved.

    Args:
        items: Key, weight, and labels of each. The keys are different, and decide the draw; the order does not.
        val_share: Share of the second side, between 0 and 1.
        seed: Of the draw.

    Returns:
        The side of each item, 0 or 1; both occur if there are two items.
    """
    numbers = Counter(label for _, _, labels in items for label in labels)

    def rank(index: int) -> tuple[bool, bytes]:
        key, _, labels = items[index]
        return all(numbers[label] > 1 for label in labels), _draw(seed, key)

    ranked = sorted(range(len(items)), key=rank)  # the only image of a class is dealt early, to train
    sides = _deal(items, ranked, val_share)
    counts: _Counts = defaultdict(Counter)
    for index, side in sides.items():
        for label in items[index][2]:
            counts[label][side] += 1
    _repair(items, counts, ranked, sides)
    _trim(items, counts, ranked, sides, val_share)
    return [sides[index] for index in range(len(items))]


def _deal(items: Sequence[Item], ranked: list[int], val_share: float) -> dict[int, int]:
    """Deals the items out, label by label; returns the side of each."""
    members: defaultdict[object, list[int]] = defaultdict(list)
    for index in ranked:
        for label in items[index][2]:
            members[label].append(index)
    total = sum(weight for _, weight, _ in items)
    wanted = [total * (1 - val_share), total * val_share]
    lacking = {}
    for label, indices in members.items():
        on_val = min(max(len(indices) * val_share, 1.0), len(indices) - 1.0)  # of a single item, none
        lacking[label] = [len(indices) - on_val, on_val]
    sides: dict[int, int] = {}
    left = {label: len(indices) for label, indices in members.items()}

    def assign(index: int, side: int) -> None:
        sides[index] = side
        wanted[side] -= items[index][1]
        for label in items[index][2]:
            lacking[label][side] -= 1
            left[label] -= 1

    queue = [(len(indices), _draw(0, repr(label)), label) for label, indices in members.items()]
    heapq.heapify(queue)
    while queue:
        number, tie, label = heapq.heappop(queue)
        if left[label] < number:  # other labels took some: it is rarer now
            heapq.heappush(queue, (left[label], tie, label))
            continue
        for index in [index for index in members[label] if index not in sides]:
            on_train, on_val = lacking[label]
            assign(index, VAL if (on_val, wanted[VAL]) > (on_train, wanted[TRAIN]) else TRAIN)
    for index in ranked:
        if index not in sides:
            assign(index, VAL if wanted[VAL] * (1 - val_share) > wanted[TRAIN] * val_share else TRAIN)
    return sides


def _repair(items: Sequence[Item], counts: _Counts, ranked: list[int], sides: dict[int, int]) -> None:
    """Moves items so that labels of two or more, and both sides, are not without any; changes `counts` and `sides`."""
    for label, count in sorted(counts.items(), key=lambda pair: (pair[1].total(), repr(pair[0]))):
        for side in (TRAIN, VAL):
            if count.total() > 1 and not count[side]:
                for index in sorted(ranked, key=lambda index: items[index][1]):
                    if label in items[index][2] and _may_leave(items[index], counts, 1 - side, 0.0):
                        _move(index, side, items, counts, sides)
                        break
    for side in (TRAIN, VAL):
        if side not in sides.values():
            _move(ranked[0], side, items, counts, sides)


def _trim(items: Sequence[Item], counts: _Counts, ranked: list[int], sides: dict[int, int], val_share: float) -> None:
    """Moves items out of a validation set that became larger than wanted, as long as each label keeps its share there.

    Where that is not enough, as long as each keeps one. Changes `counts` and `sides`.
    """
    surplus = sum(items[index][1] for index in ranked if sides[index] == VAL) - val_share * sum(
        item[1] for item in items
    )
    for share in (val_share, 0.0):
        for index in ranked:
            if sides[index] == VAL and items[index][1] <= surplus and _may_leave(items[index], counts, VAL, share):
                _move(index, TRAIN, items, counts, sides)
                surplus -= items[index][1]


def _may_leave(item: Item, counts: _Counts, side: int, share: float) -> bool:
    """Whether all labels of an item that have two items or more keep a share of them, and one, on a side without it."""
    return all(
        counts[label].total() == 1 or counts[label][side] - 1 >= max(1, int(share * counts[label].total()))
        for label in item[2]
    )


def _move(index: int, side: int, items: Sequence[Item], counts: _Counts, sides: dict[int, int]) -> None:
    sides[index] = side
    for label in items[index][2]:
        counts[label].update({side: 1, 1 - side: -1})


def _draw(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest()


def _pattern(group_by: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(group_by) if group_by is not None else None
    except re.error as error:
        raise ValueError(f"--group-by {group_by!r} is no regular expression: {error}") from None


def _groups(raw: RawFile, pattern: re.Pattern[str] | None) -> list[_Group]:
    groups: dict[str, _Group] = {}
    group_of: dict[object, _Group] = {}
    for index, image in enumerate(raw.images):
        name, image_id = image["file_name"], image["id"]
        match = pattern.match(name) if pattern else None
        key = name if match is None else (match[1] if match.re.groups else match[0]) or ""
        group = groups.setdefault(key, _Group(key))
        group.images.append(index)
        if image_id in group_of:
            raise ValueError(f"{raw.path}: two images have the id {image_id}; `data check` lists all such")
        group_of[image_id] = group
    for annotation in raw.annotations:
        if (owner := group_of.get(annotation["image_id"])) is not None:
            owner.classes.add(annotation["category_id"])
    return list(groups.values())


def _count_classes(raw: RawFile, side_of: dict[object, int]) -> list[ClassCount]:
    images: defaultdict[tuple[object, int], set[object]] = defaultdict(set)
    objects: Counter[tuple[object, int]] = Counter()
    for annotation in raw.annotations:
        image_id, category = annotation["image_id"], annotation["category_id"]
        if image_id in side_of:
            images[category, side_of[image_id]].add(image_id)
            objects[category, side_of[image_id]] += 1
    rows = [
        ClassCount(
            str(category["name"]),
            *(len(images[category["id"], side]) for side in (TRAIN, VAL)),
            *(objects[category["id"], side] for side in (TRAIN, VAL)),
        )
        for category in raw.categories
    ]
    return sorted(rows, key=lambda row: row.train_images + row.val_images)
