"""A data set in COCO's layout rearranged into the layouts that labelling tools export."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from orchestrator.data.layout import coco_layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Document = dict[str, Any]

PARTS = ("train", "val")


def read(source: Path, part: str) -> tuple[Document, Path]:
    """A part's annotations, and its image folder."""
    split = coco_layout(source)._asdict()[part]
    return json.loads(split.annotations.read_text(encoding="utf-8")), split.images


def merged(source: Path) -> tuple[Document, list[tuple[Path, str]]]:
    """Both parts as one document with ids of its own, and its images with their new names."""
    documents = [read(source, part) for part in PARTS]
    whole: Document = {**documents[0][0], "images": [], "annotations": []}
    files = []
    for part, (document, images) in zip(PARTS, documents, strict=True):
        number = {image["id"]: len(whole["images"]) + index for index, image in enumerate(document["images"], 1)}
        for image in document["images"]:
            name = f"{part}_{image['file_name']}"
            whole["images"].append({**image, "id": number[image["id"]], "file_name": name})
            files.append((images / image["file_name"], name))
        for entry in document["annotations"]:
            count = len(whole["annotations"]) + 1
            whole["annotations"].append({**entry, "id": count, "image_id": number[entry["image_id"]]})
    return whole, files


def write(path: Path, document: Document) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)


def rename(document: Document, change: Callable[[str], str]) -> Document:
    """The document with other file names."""
    images = [{**image, "file_name": change(image["file_name"])} for image in document["images"]]
    return {**document, "images": images}


def coco(source: Path, to: Path) -> None:
    """COCO 2017: annotations/instances_PART2017.json, PART2017/; and what else lies in its annotations folder."""
    for part in PARTS:
        document, images = read(source, part)
        write(to / f"annotations/instances_{part}2017.json", document)
        captions = [{"id": 1, "image_id": document["images"][0]["id"], "caption": "shapes"}]
        write(to / f"annotations/captions_{part}2017.json", {**document, "annotations": captions})
        shutil.copytree(images, to / f"{part}2017", copy_function=shutil.copyfile)


def roboflow(source: Path, to: Path) -> None:
    """Roboflow's COCO export: a folder for each part with images and _annotations.coco.json in it."""
    for part, folder in (("train", "train"), ("val", "valid"), ("val", "test")):
        document, images = read(source, part)
        shutil.copytree(images, to / folder, copy_function=shutil.copyfile)
        renamed = rename(document, lambda name, folder=folder: f"{folder}_{name}")  # type: ignore[misc]
        for file in list((to / folder).iterdir()):
            file.rename(file.with_name(f"{folder}_{file.name}"))
        info = {"year": "2026", "version": "1", "description": "Exported from roboflow.com", "date_created": ""}
        write(to / folder / "_annotations.coco.json", {"info": info, **renamed})
    (to / "README.roboflow.txt").write_text("exported", encoding="utf-8")


def cvat(source: Path, to: Path) -> None:
    """CVAT's COCO 1.0 export of two subsets: annotations/instances_PART.json, images/PART/."""
    for part in PARTS:
        document, images = read(source, part)
        write(to / f"annotations/instances_{part}.json", {"licenses": [], "info": {"year": ""}, **document})
        shutil.copytree(images, to / "images" / part, copy_function=shutil.copyfile)


def fiftyone(source: Path, to: Path) -> None:
    """FiftyOne's COCODetectionDataset of two splits: PART/data/, PART/labels.json."""
    for part in PARTS:
        document, images = read(source, part)
        write(to / part / "labels.json", document)
        shutil.copytree(images, to / part / "data", copy_function=shutil.copyfile)


def yolo_like(source: Path, to: Path) -> None:
    """COCO files next to the folders of YOLO's layout: images/PART/, train.json, val.json."""
    for part in PARTS:
        document, images = read(source, part)
        write(to / f"{part}.json", document)
        shutil.copytree(images, to / "images" / f"{part}2017", copy_function=shutil.copyfile)


def cvat_task(source: Path, to: Path) -> None:
    """CVAT's COCO 1.0 export of one task: annotations/instances_default.json, images/."""
    document, files = merged(source)
    write(to / "annotations/instances_default.json", document)
    for file, name in files:
        copy(file, to / "images" / name)


def label_studio(source: Path, to: Path) -> None:
    """Label Studio's COCO export: result.json, images/, names with that folder in front."""
    document, files = merged(source)
    write(to / "result.json", rename(document, lambda name: f"images/0a1b2c3d-{name}"))
    for file, name in files:
        copy(file, to / "images" / f"0a1b2c3d-{name}")


def label_studio_on_windows(source: Path, to: Path) -> None:
    """The same from a server on Windows, which writes backslashes."""
    label_studio(source, to)
    document = json.loads((to / "result.json").read_text(encoding="utf-8"))
    write(to / "result.json", rename(document, lambda name: name.replace("/", "\\")))


def via(source: Path, to: Path) -> None:
    """VIA's COCO export next to its images."""
    document, files = merged(source)
    write(to / "via_project_26Nov2026_12h00m_coco.json", document)
    for file, name in files:
        copy(file, to / name)


def labelme(source: Path, to: Path) -> None:
    """The output of labelme's labelme2coco.py: annotations.json, JPEGImages/, names with that folder in front."""
    document, files = merged(source)
    write(to / "annotations.json", rename(document, lambda name: f"JPEGImages/{name}"))
    for file, name in files:
        copy(file, to / "JPEGImages" / name)


def trainval(source: Path, to: Path) -> None:
    """The output of another labelme2coco: trainval.json next to the images."""
    via(source, to)
    next(to.glob("via_project*.json")).rename(to / "trainval.json")


TWO_PARTS = (coco, roboflow, cvat, fiftyone, yolo_like)
"""Layouts with a training and a validation set."""

ONE_FILE = (cvat_task, label_studio, via, labelme, trainval)
"""Layouts with one annotation file."""
