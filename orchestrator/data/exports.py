"""Finds the annotation files and image folders of a data set as tools export it, and says what is there instead.

COCO's own layout, Roboflow's, CVAT's, Label Studio's, VIA's, labelme2coco's and FiftyOne's are found by one rule: every
JSON file with COCO's lists is an annotation file; its part is the one that its name or folder is named for; its images
are in the folder in which its file names lead to files.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections import Counter, defaultdict, deque
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.data.image_names import MAX_SEARCHED, check_name, is_file, walk_files
from orchestrator.data.layout import Split, coco_layout
from orchestrator.data.name_matching import SUFFIXES, match_names, part_of
from orchestrator.findings import Finding, FindingList
from trainers.contract.annotations import AnnotationFileError, to_utf8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.data.layout import Dataset

MAX_DEPTH = 4
"""Folders below the data set's that are looked at."""

MAX_FOLDERS = 5000
"""Folders looked at; a data set with one per video may have thousands."""

NUM_SAMPLED = 8
"""File names of an annotation file that have to lead to files."""

SPLIT_FOLDER = "split"
"""Folder that `data split` is asked to write train.json and val.json to; they come before what they were made of."""

PARTS = ("train", "val")
ORDER = {"train": 0, "val": 1, "test": 2}
"""Order of the parts; what is named for none of them is called `all` and comes last."""

OTHER_TASKS = re.compile(r"^(captions|panoptic|stuff|image_info|person_keypoints|deepfashion)_")
"""Annotation files next to COCO's `instances_…` that are for other tasks."""

TAKEN_NAMES = (
    "annotations/instances_train2017.json + train2017/ (COCO), train/_annotations.coco.json (Roboflow), "
    "annotations/instances_default.json + images/ (CVAT), result.json + images/ (Label Studio), "
    "via_project_…_coco.json (VIA), annotations.json + JPEGImages/ (labelme2coco), train.json and val.json"
)
FETCH = "Move or link the files there, or run `python -m orchestrator.data fetch coco2017`"


class _Contents(NamedTuple):
    """What a data set's folder holds."""

    folders: list[Path]
    jsons: list[Path]
    suffixes: Counter[str]
    """Number of files by extension, in lower case."""


def find_splits(path: Path) -> tuple[dict[str, Split], list[Finding]]:
    """Finds the parts of a data set in a folder, in any tool's layout; or in `coco` below it (`DETECTRON2_DATASETS`).

    Returns:
        The complete parts by name (`train`, `val`, `test`, or `all` for an annotation file of no part), and what is
        wrong with the layout.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - no link is resolved
    root = path / "coco" if not (path / "annotations").is_dir() and (path / "coco").is_dir() else path
    contents = _scan(root)
    by_part: defaultdict[str, list[Path]] = defaultdict(list)
    for file in filter(_is_annotation_file, contents.jsons):
        by_part[part_of(file.relative_to(root).as_posix()) or "all"].append(file)
    findings, splits = FindingList(), {}
    if not by_part:
        return {}, [_nothing_found(root, contents)]
    made = {part: [file for file in by_part.get(part, ()) if file.parent == root / SPLIT_FOLDER] for part in PARTS}
    if all(made.values()):
        by_part |= made
    if by_part.keys() & set(PARTS):
        by_part.pop("all", None)  # what they were split from
    for part in sorted(by_part, key=lambda part: ORDER.get(part, len(ORDER))):
        file = _choose(by_part[part], root, part, findings)
        images = _image_folder(file, root, contents.folders, part)
        if images is None:
            findings.add(_no_images(file, root))
        else:
            splits[part] = Split(file, images, for_scoring=part != "train")
    lone = [part for part in ("train", "val", "all") if part in by_part]
    if lone == ["val"]:
        hint = "Name its file train.json, or its folder train"
        findings.warning("layout", str(root), "", "there is no training set", hint)
    elif len(lone) == 1:
        hint = f"`{split_command(by_part[lone[0]][0], root)}` makes one"
        findings.warning("layout", str(root), "", "there is no validation set", hint)
    return splits, findings.to_list()


def split_command(file: Path, root: Path) -> str:
    """The command that splits an annotation file so that `find_splits` takes the parts."""
    return f"python -m orchestrator.data split {quote(str(file))} --val 0.2 --to {quote(str(root / SPLIT_FOLDER))}"


def layout_finding(root: Path, dataset: Dataset) -> Finding:
    """The finding for a data set that is not in COCO's own layout, with the expected tree and what is there instead."""
    what = f"not in COCO's layout; looked for:\n{_show_tree(root, dataset)}"
    hint = _suggest_datasets(root)
    if not hint and root.is_dir():
        contents = _scan(root)
        if files := [file for file in contents.jsons if _is_annotation_file(file)]:
            found = ", ".join(str(file.relative_to(root)) for file in files[:3])
            command = f"python -m orchestrator.data init {quote(str(root))}"
            hint = f"Found {found}: use data.coco (`{command}` writes an experiment)"
    return Finding("error", "layout", str(root), "", what, hint or FETCH)


def _scan(root: Path) -> _Contents:
    contents = _Contents([], [], Counter())
    queue = deque([(root, 0)])
    while queue and len(contents.folders) < MAX_FOLDERS:
        folder, depth = queue.popleft()
        contents.folders.append(folder)
        try:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        if depth < MAX_DEPTH:
                            queue.append((folder / entry.name, depth + 1))
                        continue
                    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - a text, 118,000 times
                    contents.suffixes[suffix] += 1
                    if suffix == ".json":
                        contents.jsons.append(folder / entry.name)
        except OSError:
            continue
    return contents


def _is_annotation_file(file: Path) -> bool:
    """Whether a JSON file has the lists of COCO's format; decided by its keys, without reading it all as JSON."""
    text = _text(file)
    if text is None:
        return False
    head = text[:4096].lstrip()
    if not head.startswith(b"{") or not re.search(rb'"(info|images|annotations|categories|licenses)"\s*:', head):
        return False
    return all(re.search(rb'"' + key + rb'"\s*:\s*\[', text) for key in (b"images", b"annotations"))


def _text(file: Path) -> bytes | mmap.mmap | None:
    """A file's text in UTF-8, mapped into memory where it is in that encoding already; None where it has none."""
    try:
        with file.open("rb") as stream:
            if b"\0" in stream.read(8):
                return to_utf8(file.read_bytes())
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError, AnnotationFileError):
        return None


def _sample_names(file: Path) -> list[str]:
    """Some file names of an annotation file."""
    text = _text(file) or b""
    names = re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', text)
    return [json.loads(match[1]) for match in islice(names, NUM_SAMPLED)]


def _choose(files: list[Path], root: Path, part: str, findings: FindingList) -> Path:
    """The annotation file of a part; a warning names the others."""
    instances = {file.parent for file in files if file.name.startswith("instances_")}
    files = [file for file in files if not (file.parent in instances and OTHER_TASKS.match(file.name))]
    fixed = {file.name.replace(".fixed.json", ".json") for file in files if file.name.endswith(".fixed.json")}
    files = [file for file in files if file.name not in fixed]
    files.sort(key=lambda file: (len(file.parts), not file.name.startswith("instances_"), file))
    if len(files) > 1:
        others = ", ".join(str(file.relative_to(root)) for file in files[1:4]) + (", …" if len(files) > 4 else "")
        what = f"{len(files)} annotation files of part {part!r}: {files[0].relative_to(root)} is taken, not {others}"
        findings.warning("layout", str(root), part, what, "Merge them, or name the files in data.coco")
    return files[0]


def _image_folder(file: Path, root: Path, folders: list[Path], part: str) -> Path | None:
    """The folder in which an annotation file's names lead to files, or at least have their like; None for none.

    Folders below the data set's come first; then those next to it, where it is the annotations' own folder. One that is
    named for another part is taken for what was split from that part only: its files may have the same names.
    """
    names = _sample_names(file)
    if not names:
        return file.parent
    takes_any = part == "all" or file.parent == root / SPLIT_FOLDER
    others = frozenset() if takes_any else frozenset(ORDER) - {part}
    if (folder := _folder_of(names, file, root, folders, others)) is not None:
        return folder
    matches = match_names(names, str(root), walk_files(root, MAX_SEARCHED), whole_paths=False, part=part)
    if found := Counter(match.folder for match in matches.values() if part_of(match.folder) not in others):
        return root / found.most_common(1)[0][0]
    above = root.parent
    if file.parent != root or above == Path(above.anchor):
        return None
    return _folder_of(names, file, above, _scan(above).folders, others)


def _folder_of(names: list[str], file: Path, root: Path, folders: list[Path], others: frozenset[str]) -> Path | None:
    """The folder in which most of the names are files; of several, the one nearest to the annotation file."""
    folders = [folder for folder in folders if part_of(folder.relative_to(root).as_posix()) not in others]
    folders.sort(key=lambda folder: (len(_between(folder, file.parent)), folder))
    usable = [name for name in names if check_name(name) is None]
    best, most = None, 0
    for folder in folders:
        found = sum(is_file(folder / name) for name in usable)
        if found > most:
            best, most = folder, found
        if most == len(names):
            break
    return best


def _between(one: Path, other: Path) -> list[str]:
    """The names of the folders that lead from one to the other."""
    shared = len(Path(os.path.commonpath([one, other])).parts)
    return [*one.parts[shared:], *other.parts[shared:]]


def _no_images(file: Path, root: Path) -> Finding:
    """The finding for an annotation file whose images are nowhere."""
    expected = coco_layout(root)
    for split in expected:
        if split.annotations == file:
            what = f"the set is not complete:\n{_show_tree(root, [split])}"
            return Finding("error", "layout", str(root), part_of(file.name), what, FETCH)
    names = ", ".join(map(repr, _sample_names(file)[:3]))
    what = f"no folder in {root} holds its images, such as {names}"
    hint = "Move or link the images there, or name their folder: `data check FILE --images DIR`, data.coco"
    return Finding("error", "layout", str(file), "", what, hint)


def _nothing_found(root: Path, contents: _Contents) -> Finding:
    """The finding for a folder without an annotation file: what it holds instead, and what to do."""
    if not root.is_dir():
        return Finding("error", "layout", str(root), "", "there is no such folder", _suggest_datasets(root) or FETCH)
    if any((root / part).is_dir() for part in ("annotations", "train2017", "val2017")):
        return layout_finding(root, coco_layout(root))
    counts = contents.suffixes
    images = sum(number for suffix, number in counts.items() if suffix in SUFFIXES)
    others = ", ".join(f"{number:,} {suffix or 'without extension'}" for suffix, number in counts.most_common(4))
    what = (
        f"no annotation file in COCO's format; the folder holds {len(contents.folders) - 1:,} folders and {images:,} "
        f"images (files: {others or 'none'}). Taken would be: {TAKEN_NAMES}"
    )
    return Finding("error", "layout", str(root), "", what, _suggest_datasets(root) or _suggest_export(contents))


def _suggest_export(contents: _Contents) -> str:
    """What to do with labels in another format."""
    counts, again = contents.suffixes, 'export the data set again as "COCO" (JSON)'
    if any(_is_labelme(file) for file in contents.jsons[:3]):
        return "These are labelme's files, one for each image: convert them with labelme2coco"
    if counts[".xml"]:
        return f"The .xml files look like Pascal VOC's: {again}, or convert them"
    if counts[".txt"] or counts[".yaml"] or counts[".yml"]:
        return f"The .txt files look like YOLO's labels: {again}, or convert them"
    if counts[".zip"]:
        return "Unpack the .zip"
    return f"Name the folder that holds the annotation file, or {again}"


def _is_labelme(file: Path) -> bool:
    head = (_text(file) or b"")[:4096]
    return b'"shapes"' in head or (b'"flags"' in head and b'"version"' in head)


def _suggest_datasets(root: Path) -> str:
    """Recognises the most common mistake: DETECTRON2_DATASETS names the folder `coco` instead of the one above it."""
    for candidate in (root.parent, *root.parent.glob("*/coco"), *root.glob("*/coco"), *root.glob("*")):
        if candidate != root and coco_layout(candidate).train.annotations.is_file():
            if candidate.name == "coco":
                return f"Set DETECTRON2_DATASETS={candidate.parent}, the folder that holds `coco`"
            return f"A set in this layout is in {candidate}: name that folder, or link it to {root}"
    return ""


def _show_tree(root: Path, splits: Sequence[Split]) -> str:
    """Draws the expected files and folders, each with whether it was found."""
    files = [(split.annotations, "", split.annotations.is_file()) for split in splits]
    paths = files + [(split.images, "/", split.images.is_dir()) for split in splits]
    lines = [str(root)]
    for index, (path, slash, is_found) in enumerate(paths):
        name = path.relative_to(root) if path.is_relative_to(root) else path
        branch = "└──" if index == len(paths) - 1 else "├──"
        lines.append(f"{branch} {name}{slash}  {'found' if is_found else 'missing'}")
    return "\n".join(lines)
