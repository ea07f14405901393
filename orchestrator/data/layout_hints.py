"""Says what a folder or file without annotations in COCO's format is instead, and what to do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from orchestrator.data.folder_contents import Contents, is_annotation_file, read_text
from orchestrator.data.layout import coco_layout
from orchestrator.data.name_matching import SUFFIXES, part_of
from orchestrator.files import is_file, is_folder
from orchestrator.findings import Finding
from trainers.contract.annotations import AnnotationFileError, read_annotations

LAYOUTS = (
    "annotations/instances_train2017.json + train2017/ (COCO), train/_annotations.coco.json (Roboflow), "
    "annotations/instances_default.json + images/ (CVAT), result.json + images/ (Label Studio), "
    "via_project_…_coco.json (VIA), annotations.json + JPEGImages/ (labelme2coco), train.json and val.json"
)
FETCH = "Correct its name, move or link the files there, or run `python -m orchestrator.data fetch coco2017`"


def refusal(file: Path) -> Finding | None:
    """The finding for a file in the place of a data set that nothing can be trained on; None for an annotation file."""
    if not is_annotation_file(file):
        what, is_json = "not an annotation file in COCO's format", file.suffix.lower() == ".json"
        hint = _suggest_export(Contents([], [file] if is_json else [], Counter([file.suffix.lower()])))
        try:
            if is_json:
                read_annotations(file.read_bytes())
        except OSError as error:
            what, hint = f"cannot be read: {error.strerror}", "Give yourself read access"
        except AnnotationFileError as error:
            what, hint = error.what, error.hint
        return Finding("error", "layout", str(file), "", what, hint)
    if part_of(file.name) == "test":
        what = "it is named for a test set, on which nothing is trained"
        hint = "Name the folder of the data set, or rename the file if it is to be trained on"
        return Finding("error", "layout", str(file), "", what, hint)
    return None


def nothing_found(root: Path, contents: Contents) -> Finding:
    """The finding for a folder without an annotation file: what it holds instead, and what to do."""
    suggestion = suggest_datasets(root)
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


def _suggest_export(contents: Contents) -> str:
    """What to do with labels in another format."""
    counts, again = contents.suffixes, 'export the data set again as "COCO" (JSON)'
    if any(b'"shapes"' in (read_text(file) or b"")[:4096] for file in contents.jsons[:3]):
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


def suggest_datasets(root: Path) -> str:
    """Recognises the most common mistake: DETECTRON2_DATASETS names the folder `coco` instead of the one above it."""
    inside = (*root.glob("*/coco"), *root.glob("*")) if is_folder(root) else ()
    for candidate in (root.parent, *inside):
        if candidate != root and is_file(coco_layout(candidate).train.annotations):
            if candidate.name == "coco":
                return f"Set DETECTRON2_DATASETS={candidate.parent}, the folder that holds `coco`"
            return f"A set in this layout is in {candidate}: name that folder, or link it to {root}"
    return ""
