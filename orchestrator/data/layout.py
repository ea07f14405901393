"""Finds the parts of a data set in COCO's layout, and shows the tree that was looked for where they are not."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.checks import Split
from orchestrator.findings import Finding, FindingList

PARTS = ("train", "val")


def split_of(root: Path, part: str) -> Split:
    """Tells where COCO's layout has a part (`train` or `val`) below `root`; nothing is read."""
    return Split(root / "annotations" / f"instances_{part}2017.json", root / f"{part}2017", for_scoring=part == "val")


def find_splits(path: Path) -> tuple[list[Split], list[Finding]]:
    """Finds the training and validation set in a folder: COCO's own, or the one above it (`DETECTRON2_DATASETS`).

    Returns:
        The complete ones, and what was found wrong with the layout.
    """
    root = path / "coco" if not (path / "annotations").is_dir() and (path / "coco").is_dir() else path
    splits = {part: split_of(root, part) for part in PARTS}
    present = {part: split.annotations.is_file() and split.images.is_dir() for part, split in splits.items()}
    findings = FindingList()
    if not any(present.values()):
        findings.add(layout_finding(root, list(splits.values())))
    for part, split in splits.items():
        if any(present.values()) and not present[part]:
            broken = split.annotations.is_file() or split.images.is_dir()
            report = findings.error if broken else findings.warning
            report("layout", str(root), part, f"there is no complete {part} set:\n{show_tree(root, [split])}", HINT)
    return [split for part, split in splits.items() if present[part]], findings.to_list()


HINT = "Move or link the files there, or run `python -m orchestrator.data fetch coco2017`"


def layout_finding(root: Path, splits: list[Split]) -> Finding:
    """Makes the finding for a data set that is not where it was looked for, with the tree that was."""
    what = f"not in COCO's layout; looked for:\n{show_tree(root, splits)}"
    return Finding("error", "layout", str(root), "", what, _suggest(root) or HINT)


def _suggest(root: Path) -> str:
    """Recognises the commonest slip: DETECTRON2_DATASETS naming the folder `coco` itself instead of the one above."""
    for candidate in (root.parent, *root.parent.glob("*/coco"), *root.glob("*/coco"), *root.glob("*")):
        if candidate != root and split_of(candidate, "train").annotations.is_file():
            if candidate.name == "coco":
                return f"Set DETECTRON2_DATASETS={candidate.parent}, the folder that holds `coco`"
            return f"A set in this layout is in {candidate}: name that folder, or link it to {root}"
    return ""


def show_tree(root: Path, splits: list[Split]) -> str:
    """Draws the expected files and folders with what is there of them."""
    paths = [(split.annotations, "") for split in splits] + [(split.images, "/") for split in splits]
    lines = [str(root)]
    for index, (path, slash) in enumerate(paths):
        there = path.is_dir() if slash else path.is_file()
        name = path.relative_to(root) if path.is_relative_to(root) else path
        branch = "└──" if index == len(paths) - 1 else "├──"
        lines.append(f"{branch} {name}{slash}  {'found' if there else 'missing'}")
    return "\n".join(lines)
