"""Finds the annotation files and image folders of a data set as tools export it, and says what is there instead.

Every tool's layout is found by one rule: each JSON file with COCO's lists is an annotation file; its part is the one
that its name or folder is named for; its images are in the folder in which its file names lead to files.
"""

from __future__ import annotations

import codecs
import json
import mmap
import os
import re
from collections import Counter, defaultdict, deque
from contextlib import suppress
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from orchestrator.data.image_names import MAX_SEARCHED, check_name, walk_files
from orchestrator.data.layout import Dataset, Split, coco_layout
from orchestrator.data.name_matching import SUFFIXES, match_names, part_of
from orchestrator.files import is_file, is_folder
from orchestrator.findings import Finding, FindingList
from trainers.contract.annotations import AnnotationFileError, to_utf8

MAX_DEPTH = 4
"""Folders below the data set's that are looked at."""

FIXED = ".fixed.json"
"""How files end that `data fix-names` wrote: they replace those without it."""

MAX_FOLDERS = 5000
"""Folders looked at; a data set with one per video may have thousands."""

NUM_SAMPLED = 8
"""File names of an annotation file that have to lead to files."""

SPLIT_FOLDER = "split"
"""Folder that `data split` is asked to write train.json and val.json to; they come before what they were made of."""

PARTS = ("train", "val", "test", "all")
"""Parts of a data set in their order; `all` stands for an annotation file that is named for no part."""

LAYOUTS = (
    "annotations/instances_train2017.json + train2017/ (COCO), train/_annotations.coco.json (Roboflow), "
    "annotations/instances_default.json + images/ (CVAT), result.json + images/ (Label Studio), "
    "via_project_…_coco.json (VIA), annotations.json + JPEGImages/ (labelme2coco), train.json and val.json"
)
FETCH = "Correct its name, move or link the files there, or run `python -m orchestrator.data fetch coco2017`"


class _Contents(NamedTuple):
    """What a data set's folder holds."""

    folders: list[Path]
    jsons: list[Path]
    suffixes: Counter[str]
    """Number of files by extension, in lower case."""


def find_splits(path: Path) -> tuple[dict[str, Split], list[Finding]]:
    """Finds the parts of a data set in a folder, in any tool's layout.

    It may also be the folder above `coco` (that of `DETECTRON2_DATASETS`), the `annotations` in it, or a file in it.

    Returns:
        The complete parts by name (`train`, `val`, `test`, or `all` for an annotation file of no part), and what is
        wrong with the layout. Code `part_missing` is a warning that there is no training or no validation set.
    """
    root = Path(os.path.abspath(path))  # noqa: PTH100 - no link is resolved
    if root.name == "annotations" or is_file(root):
        root = root.parent
    elif is_folder(root / "coco") and not is_folder(root / "annotations"):
        root /= "coco"
    contents = _scan(root)
    by_part: defaultdict[str, list[Path]] = defaultdict(list)
    for file in filter(_is_annotation_file, contents.jsons):
        by_part[part_of(file.relative_to(root).as_posix()) or "all"].append(file)
    if not by_part:
        return {}, [_nothing_found(root, contents)]
    made = {part: [file for file in by_part[part] if file.parent == root / SPLIT_FOLDER] for part in ("train", "val")}
    if all(made.values()):
        by_part |= made
    others = [file.name for file in by_part["all"]]
    if by_part["train"] or by_part["val"]:
        by_part.pop("all", None)  # what they were split from
    findings, splits = FindingList(), {}
    for part in filter(by_part.get, PARTS):
        file = _choose(by_part[part], root, part, findings)
        images = _image_folder(file, root, contents.folders, part)
        if images is not None:
            splits[part] = Split(file, images, for_scoring=part != "train")
            continue
        what = f"no folder in {root} holds its images, such as {', '.join(map(repr, _sample_names(file)[:3]))}"
        hint = "Move or link the images there, or name their folder: `data check FILE --images DIR`, data.coco"
        findings.error("layout", str(file), "", what, hint)
    whole = splits.get("train") or splits.get("all")
    if whole and not by_part["val"]:
        what = f"there is no validation set: found {whole.annotations}"
        command = f"python -m orchestrator.data split {quote(str(whole.annotations))} --val 0.2"
        hint = f"Run `{command} --to {quote(str(root / SPLIT_FOLDER))}`, then this again"
        if others and by_part["train"]:
            hint += f"; if {others[0]} is one, name it val.json"
        findings.warning("part_missing", str(root), "", what, hint)
    elif not (by_part["train"] or by_part["all"]):
        hint = "Name its file train.json, or its folder train"
        findings.warning("part_missing", str(root), "", "there is no training set", hint)
    return splits, findings.to_list()


def layout_finding(root: Path, dataset: Dataset) -> Finding:
    """The finding for a data set that is not in COCO's own layout, with the expected tree and what is there instead."""
    paths = (*(split.annotations for split in dataset), *(split.images for split in dataset))
    tree = [f"├── {path.relative_to(root)}  {'found' if path.exists() else 'missing'}" for path in paths]
    what = "\n".join(["not in COCO's layout; looked for:", str(root), *tree])
    hint = _suggest_datasets(root)
    if not hint and (files := list(filter(_is_annotation_file, _scan(root).jsons))):
        found = ", ".join(str(file.relative_to(root)) for file in files[:3])
        command = f"python -m orchestrator.data init {quote(str(root))}"
        hint = f"Found {found}: use data.coco (`{command}` writes an experiment)"
    return Finding("error", "layout", str(root), "", what, hint or FETCH)


def _scan(root: Path) -> _Contents:
    """Lists a folder, the near folders first, without hidden and unreadable ones."""
    contents = _Contents([], [], Counter())
    queue = deque([(root, 0)])
    while queue and len(contents.folders) < MAX_FOLDERS:
        folder, depth = queue.popleft()
        contents.folders.append(folder)
        _, folders, files = next(os.walk(folder), ("", [], []))
        if depth < MAX_DEPTH:
            queue.extend((folder / name, depth + 1) for name in sorted(folders) if not name.startswith("."))
        for name in files:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a text, 118,000 times
            contents.suffixes[suffix] += 1
            if suffix == ".json" and not name.startswith("."):
                contents.jsons.append(folder / name)
    return contents


def _is_annotation_file(file: Path) -> bool:
    """Whether a JSON file has the lists of COCO's format; decided by its keys, without reading it all as JSON."""
    text = _text(file)
    if text is None:
        return False
    head = text[:4096].removeprefix(codecs.BOM_UTF8).lstrip()
    if not head.startswith(b"{") or not re.search(rb'"(info|images|annotations|categories|licenses)"\s*:', head):
        return False
    return all(re.search(rb'"' + key + rb'"\s*:\s*(\[|null\b)', text) for key in (b"images", b"annotations"))


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
    """Some file names of an annotation file, without those that are no JSON text."""
    names = []
    for match in islice(re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', _text(file) or b""), NUM_SAMPLED):
        with suppress(ValueError):
            names.append(json.loads(match[1]))
    return names


def _choose(files: list[Path], root: Path, part: str, findings: FindingList) -> Path:
    """The annotation file of a part: the one nearest to the data set's folder; a warning names the others."""
    instances = {file.parent for file in files if file.name.startswith("instances")}
    # Next to COCO's `instances_…` are files for other tasks: captions, keypoints, panoptic.
    files = [file for file in files if file.parent not in instances or file.name.startswith("instances")]
    fixed = {file.with_name(file.name.replace(FIXED, ".json")) for file in files if file.name.endswith(FIXED)}
    files = sorted(set(files) - fixed, key=lambda file: (len(file.parts), len(file.name), file))
    if len(files) > 1:
        names = [str(file.relative_to(root)) for file in files]
        others = ", ".join(names[1:4]) + (", …" if len(files) > 4 else "")
        what = f"{len(files)} annotation files: {names[0]} is taken, not {others}"
        hint = "Export them as one file, or name those that are meant in data.coco"
        findings.warning("layout", str(root), part.replace("all", ""), what, hint)
    return files[0]


def _image_folder(file: Path, root: Path, folders: list[Path], part: str) -> Path | None:
    """The folder in which most of an annotation file's names are files, or at least have their like; None for none.

    Of several, the one nearest to the annotation file. One that is named for another part is taken for what was split
    from that part only: its files may have the same names.
    """
    names = _sample_names(file)
    if not names:
        return file.parent
    takes_any = part == "all" or file.parent == root / SPLIT_FOLDER
    others = frozenset() if takes_any else frozenset(PARTS) - {part}
    usable = [name for name in names if check_name(name) is None]

    def fitness(folder: Path) -> tuple[int, int]:
        shared = len(Path(os.path.commonpath([folder, file.parent])).parts)
        distance = len(folder.parts) + len(file.parent.parts) - 2 * shared
        return sum(is_file(folder / name) for name in usable), -distance

    allowed = [folder for folder in folders if part_of(folder.relative_to(root).as_posix()) not in others]
    best = max(allowed, key=fitness, default=root)
    if fitness(best)[0]:
        return best
    if all(os.path.isabs(name) and is_file(name) for name in names):  # noqa: PTH117 - a text, no path object
        return Path(os.path.commonpath([Path(name).parent for name in names]))
    matches = match_names(names, str(root), walk_files(root, MAX_SEARCHED), whole_paths=False, part=part)
    found = Counter(match.folder for match in matches.values() if part_of(match.folder) not in others)
    return root / found.most_common(1)[0][0] if found else None


def _nothing_found(root: Path, contents: _Contents) -> Finding:
    """The finding for a folder without an annotation file: what it holds instead, and what to do."""
    suggestion = _suggest_datasets(root)
    if not is_folder(root):
        return Finding("error", "layout", str(root), "", "there is no such folder", suggestion or FETCH)
    counts = contents.suffixes
    images = sum(number for suffix, number in counts.items() if suffix in SUFFIXES)
    others = ", ".join(f"{number:,} {suffix or 'without extension'}" for suffix, number in counts.most_common(4))
    what = (
        f"no annotation file in COCO's format; the folder holds {len(contents.folders) - 1:,} folders and {images:,} "
        f"images (files: {others or 'none'}). Expected is one of: {LAYOUTS}"
    )
    return Finding("error", "layout", str(root), "", what, suggestion or _suggest_export(contents))


def _suggest_export(contents: _Contents) -> str:
    """What to do with labels in another format."""
    counts, again = contents.suffixes, 'export the data set again as "COCO" (JSON)'
    if any(b'"shapes"' in (_text(file) or b"")[:4096] for file in contents.jsons[:3]):
        return "These are labelme's files, one for each image: convert them with labelme2coco"
    if any(counts[suffix] for suffix in (".zip", ".gz", ".tar", ".tgz", ".7z", ".rar")):
        return "Unpack the archive"
    if contents.jsons:
        return f"{contents.jsons[0].name} is in a tool's own format: {again}"
    if counts[".xml"]:
        return f"The .xml files look like Pascal VOC's: {again}, or convert them"
    if counts[".txt"] or counts[".yaml"] or counts[".yml"]:
        return f"The .txt files look like YOLO's labels: {again}, or convert them"
    return f"Name the folder that holds the annotation file, or {again}"


def _suggest_datasets(root: Path) -> str:
    """Recognises the most common mistake: DETECTRON2_DATASETS names the folder `coco` instead of the one above it."""
    inside = (*root.glob("*/coco"), *root.glob("*")) if is_folder(root) else ()
    for candidate in (root.parent, *inside):
        if candidate != root and is_file(coco_layout(candidate).train.annotations):
            if candidate.name == "coco":
                return f"Set DETECTRON2_DATASETS={candidate.parent}, the folder that holds `coco`"
            return f"A set in this layout is in {candidate}: name that folder, or link it to {root}"
    return ""
