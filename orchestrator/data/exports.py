"""Finds the annotation files and image folders of a data set as tools export it, and says what is there instead.

Every tool's layout is found by one rule: each JSON file with COCO's lists is an annotation file; its part is the one
that its name or folder is named for; its images are in the folder in which its file names lead to files.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path
from shlex import quote

from orchestrator.data.folder_contents import has_annotations, is_annotation_file, sample_names, scan
from orchestrator.data.image_names import MAX_SEARCHED, check_name, walk_files
from orchestrator.data.layout import Dataset, Split
from orchestrator.data.layout_hints import FETCH, nothing_found, refusal, suggest_datasets
from orchestrator.data.name_matching import match_names, part_of
from orchestrator.files import is_file, is_folder
from orchestrator.findings import Finding, FindingList

FIXED = ".fixed.json"
"""How files end that `data fix-names` wrote: they replace those without it."""

SPLIT_FOLDER = "split"
"""Folder that `data split` is asked to write train.json and val.json to; they come before what they were made of."""

PARTS = ("train", "val", "test", "all")
"""Parts of a data set in their order; `all` stands for an annotation file that is named for no part."""


def find_splits(path: Path) -> tuple[dict[str, Split], list[Finding]]:
    """Finds the parts of a data set in a folder, in any tool's layout.

    It may also be the folder above `coco` (that of `DETECTRON2_DATASETS`), the `annotations` in it, or an annotation
    file, which is then taken for its part whatever lies next to it.

    Returns:
        The complete parts by name (`train`, `val`, `test`, or `all` for an annotation file of no part), and what is
        wrong with the layout. Code `part_missing` is a warning that there is no training or no validation set.
    """
    root = Path(os.path.abspath(path))  # noqa: PTH100 - no link is resolved
    named = root if is_file(root) else None
    if named is not None and (problem := refusal(named)) is not None:
        return {}, [problem]
    root = root.parent if named else root
    if root.name == "annotations":
        root = root.parent
    elif named is None and is_folder(root / "coco") and not is_folder(root / "annotations"):
        root /= "coco"
    contents, findings, splits = scan(root), FindingList(), {}
    by_part = _files_by_part(contents.jsons, root, named, findings)
    if not any(by_part.values()):
        return {}, [nothing_found(root, contents)]
    others = [file.name for file in by_part["all"]]
    if by_part["train"] or by_part["val"]:
        by_part.pop("all", None)  # what they were split from
    for part in filter(by_part.get, PARTS):
        by_part[part] = _in_order(by_part[part], root, part, findings)
        file = by_part[part][0]
        images = _image_folder(file, root, contents.folders, part)
        if images is not None:
            splits[part] = Split(file, images, for_scoring=part != "train")
            continue
        what = f"no folder in {root} holds its images, such as {', '.join(map(repr, sample_names(file)[:3]))}"
        hint = "Move or link the images there, or name their folder: `data check FILE --images DIR`, data.coco"
        findings.error("layout", str(file), "", what, hint)
    whole = splits.get("train") or splits.get("all")
    if whole and not by_part["val"]:
        what, hint = _without_validation(whole, by_part["train"] or by_part["all"], root)
        if others and by_part["train"]:
            hint += f"; if {others[0]} is one, name it val.json"
        if (test := splits.get("test")) and has_annotations(test.annotations):
            hint += f"; or give the test set as data.coco.val_annotations ({test.annotations}) and val_images"
            hint += f" ({test.images})"
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
    hint = suggest_datasets(root)
    if not hint and (files := list(filter(is_annotation_file, scan(root).jsons))):
        found = ", ".join(str(file.relative_to(root)) for file in files[:3])
        command = f"python -m orchestrator.data init {quote(str(root))}"
        hint = f"Found {found}: use data.coco (`{command}` writes an experiment)"
    return Finding("error", "layout", str(root), "", what, hint or FETCH)


def _files_by_part(
    jsons: list[Path], root: Path, named: Path | None, findings: FindingList
) -> defaultdict[str, list[Path]]:
    """The annotation files of each part, or the one that was named; what `data split` made comes before its origin."""
    by_part: defaultdict[str, list[Path]] = defaultdict(list)
    for file in filter(is_annotation_file, jsons):
        by_part[part_of(file.relative_to(root).as_posix()) or "all"].append(file)
    made = {part: [file for file in by_part[part] if file.parent == root / SPLIT_FOLDER] for part in ("train", "val")}
    part = part_of(named.relative_to(root).as_posix()) or "all" if named else ""
    if all(made.values()) and part != "val":
        origins = [file for file in by_part[part] if file not in made.get(part, [])]
        if named and len(origins) > 1:
            what = f"the split of one of {len(origins)} annotation files is taken"
            hint = f"If it was not {named.name}, remove {root / SPLIT_FOLDER}, then this again"
            findings.warning("layout", str(root), part.replace("all", ""), what, hint)
        by_part |= made
    elif named:
        by_part[part] = [named]
        if part == "all":
            by_part["train"], by_part["val"] = [], []
    return by_part


def _without_validation(whole: Split, files: list[Path], root: Path) -> tuple[str, str]:
    """What is said of a data set without a validation set, and what to do; of several files, none is split unasked."""
    if len(files) > 1:
        what = f"there is no validation set: none of the {len(files)} annotation files is named for one"
        one = "If one of them is it, name it val.json; else export them as one file, or give the one that is meant"
        return what, f"{one} in the place of the folder"
    command = f"python -m orchestrator.data split {quote(str(whole.annotations))} --val 0.2"
    hint = f"Run `{command} --to {quote(str(root / SPLIT_FOLDER))}`, then this again"
    return f"there is no validation set: found {whole.annotations}", hint


def _in_order(files: list[Path], root: Path, part: str, findings: FindingList) -> list[Path]:
    """The annotation files of a part, the one nearest to the data set's folder first; a warning names the others."""
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
    return files


def _image_folder(file: Path, root: Path, folders: list[Path], part: str) -> Path | None:
    """The folder in which most of an annotation file's names are files, or at least have their like; None for none.

    Of several, the one nearest to the annotation file. One that is named for another part is taken for what was split
    from that part only: its files may have the same names.
    """
    names = sample_names(file)
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
