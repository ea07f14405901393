"""Where COCO's layout has the parts of a data set, and what is reported when they are not there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.findings import Finding, FindingList

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYOUT_HINT = "Move or link the files there, or run `python -m orchestrator.data fetch coco2017`"


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
        return self.annotations.is_file() and self.images.is_dir()


class Dataset(NamedTuple):
    """A training and a validation set."""

    train: Split
    val: Split


def coco_layout(root: Path) -> Dataset:
    """Where COCO's layout has the two splits below `root`; nothing is read."""
    annotations = root / "annotations"
    return Dataset(
        Split(annotations / "instances_train2017.json", root / "train2017"),
        Split(annotations / "instances_val2017.json", root / "val2017", for_scoring=True),
    )


def find_splits(path: Path) -> tuple[dict[str, Split], list[Finding]]:
    """Finds the splits in a folder: COCO's own, or the one above it (`DETECTRON2_DATASETS`).

    Returns:
        The complete splits by name (`train`, `val`), and what is wrong with the layout.
    """
    root = path / "coco" if not (path / "annotations").is_dir() and (path / "coco").is_dir() else path
    dataset = coco_layout(root)
    present = {part: split for part, split in dataset._asdict().items() if split.is_present()}
    if not present:
        return {}, [layout_finding(root, dataset)]
    findings = FindingList()
    for part, split in dataset._asdict().items():
        if part not in present:
            is_partial = split.annotations.is_file() or split.images.is_dir()
            report = findings.error if is_partial else findings.warning
            what = f"there is no complete {part} set:\n{_show_tree(root, [split])}"
            report("layout", str(root), part, what, LAYOUT_HINT)
    return present, findings.to_list()


def layout_finding(root: Path, dataset: Dataset) -> Finding:
    """The finding for a data set that is not where it was expected, with the expected tree."""
    what = f"not in COCO's layout; looked for:\n{_show_tree(root, dataset)}"
    return Finding("error", "layout", str(root), "", what, _suggest(root) or LAYOUT_HINT)


def _suggest(root: Path) -> str:
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
