"""Ways to spoil a good data set and experiment, one for each kind of bad input that preflight must find."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import yaml
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Project:
    """A folder with a small good data set and the experiment that trains on it."""

    root: Path
    experiment: dict[str, Any]
    """What is written to `experiment.yaml`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for the command."""

    def json_file(self, part: str = "train") -> Path:
        return self.root / "data" / "annotations" / f"instances_{part}2017.json"

    def image(self, index: int = 0, part: str = "train") -> Path:
        return sorted((self.root / "data" / f"{part}2017").iterdir())[index]

    def edit(self, change: Callable[[dict[str, Any]], None], part: str = "train") -> None:
        document = json.loads(self.json_file(part).read_text())
        change(document)
        self.json_file(part).write_text(json.dumps(document))

    def write(self) -> Path:
        path = self.root / "experiment.yaml"
        path.write_text(yaml.safe_dump(self.experiment))
        return path


def base_experiment(data: Path) -> dict[str, Any]:
    """An experiment on a data set of three classes that has nothing wrong with it."""
    pair = {
        f"{part}_{what}": str(data / place)
        for part in ("train", "val")
        for what, place in (("annotations", f"annotations/instances_{part}2017.json"), ("images", f"{part}2017"))
    }
    return {
        "name": "spoilt",
        "data": {"coco": pair},
        "model": {
            "config": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
            "weights": "",
            "overrides": {
                "MODEL.ROI_HEADS.NUM_CLASSES": 3,
                "SOLVER.IMS_PER_BATCH": 2,
                "INPUT.MIN_SIZE_TRAIN": [64],
                "INPUT.MAX_SIZE_TRAIN": 64,
            },
        },
        "trials": {"world_sizes": [1], "scaling": "strong"},
        "protocol": {"kind": "throughput", "iterations": 2, "warmup_iterations": 1},
        "resources": {"device": "cpu", "cpus_per_worker": 1},
    }


def annotation(change: Callable[[dict[str, Any]], Any], part: str = "train") -> Callable[[Project], None]:
    """Spoils the third annotation."""
    return lambda project: project.edit(lambda document: change(document["annotations"][2]), part)


def put(**values: Any) -> Callable[[Project], None]:
    return annotation(lambda entry: entry.update(values))


def override(**values: Any) -> Callable[[Project], None]:
    """Sets fields of the experiment, `a__b=value` for a.b."""

    def change(project: Project) -> None:
        for key, value in values.items():
            *path, last = key.split("__")
            node = project.experiment
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value

    return change


def truncate_image(project: Project) -> None:
    path = project.image()
    path.write_bytes(path.read_bytes()[:-200])


def corrupt_image(project: Project) -> None:
    project.image().write_bytes(b"this was never an image" * 10)


def spoil_pixels(project: Project) -> None:
    """Breaks the head of the compressed data and keeps the file's own head and end: only decoding shows it."""
    path = project.image()
    noisy = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = bytearray(cv2.imencode(".png", noisy)[1].tobytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def turn_by_exif(project: Project) -> None:
    path = project.image()
    image = Image.new("RGB", (64, 48), (90, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, "JPEG", exif=exif)
    project.edit(lambda document: document["images"][0].update(width=64, height=48))
    project.edit(lambda document: [a.update(_inside()) for a in document["annotations"] if a["image_id"] == 1])


def _inside() -> dict[str, Any]:
    return {"bbox": [1, 1, 10, 10], "segmentation": [[1, 1, 11, 1, 11, 11]], "area": 50}


def resize_image(project: Project) -> None:
    Image.new("RGB", (32, 64)).save(project.image(), "JPEG")


def truncate_json(project: Project) -> None:
    path = project.json_file()
    path.write_bytes(path.read_bytes()[:1000])


def only_crowds(project: Project) -> None:
    project.edit(lambda document: [entry.update(iscrowd=1) for entry in document["annotations"]])


def without_masks(project: Project) -> None:
    project.edit(lambda document: [entry.pop("segmentation") for entry in document["annotations"]])


def empty_validation(project: Project) -> None:
    project.edit(lambda document: document.update(images=[], annotations=[]), "val")


def other_categories(project: Project) -> None:
    project.edit(lambda document: document["categories"][0].update(name="disc"), "val")


def gapped_and_different(project: Project) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"][2]["id"] = 7
        for entry in document["annotations"]:
            entry["category_id"] = 7 if entry["category_id"] == 3 else entry["category_id"]

    project.edit(change)


def wrong_layout(project: Project) -> None:
    project.experiment["data"] = {"coco2017": True}
    project.environment["DETECTRON2_DATASETS"] = str(project.root)


def corrupt_weights(project: Project) -> None:
    path = project.root / "start.pth"
    path.write_bytes(b"PK\x03\x04 but no archive")
    project.experiment["model"]["weights"] = str(path)


def pickled_weights(project: Project) -> None:
    path = project.root / "start.pkl"
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    project.experiment["model"]["weights"] = str(path)


def storage_in_a_file(project: Project) -> None:
    (project.root / "taken").write_text("a file")
    project.experiment["storage"] = {"path": str(project.root / "taken" / "runs")}


@dataclass(frozen=True)
class Case:
    """A way to spoil the project, and the expected finding: its code, place, and a part of its text."""

    spoil: Callable[[Project], None]
    code: str
    place: str
    words: str
    options: tuple[str, ...] = ()


CASES = {
    "a missing image": Case(lambda p: p.image().unlink(), "image_missing", "image 1", "does not exist"),
    "a truncated JPEG": Case(truncate_image, "image_truncated", "image 1", "truncated"),
    "a corrupt image": Case(corrupt_image, "image_corrupt", "image 1", "no image format"),
    "an empty image file": Case(lambda p: p.image().write_bytes(b""), "image_corrupt", "image 1", "empty"),
    "pixels that cannot be decoded": Case(spoil_pixels, "image_", "image 1", "the image is", ("--verify-images",)),
    "a size not as annotated": Case(resize_image, "size_mismatch", "image 1", "32 x 64 pixels; 64 x 64"),
    "an EXIF turn": Case(turn_by_exif, "exif_orientation", "image 1", "orientation 6"),
    "categories that differ": Case(other_categories, "categories_disagree", "categories", "1: disc"),
    "gapped categories in one file": Case(gapped_and_different, "categories_disagree", "categories", "7: triangle"),
    "gapped categories, the map": Case(gapped_and_different, "category_gaps", "categories", "{1: 0, 2: 1, 7: 2}"),
    "an unknown category": Case(put(category_id=99), "category_unknown", "annotation 3", "category_id 99"),
    "another number of classes": Case(
        lambda p: p.experiment["model"]["overrides"].update({"MODEL.ROI_HEADS.NUM_CLASSES": 80}),
        "num_classes", "categories", "is 80, the data has 3",
    ),
    "truncated JSON": Case(truncate_json, "json_truncated", "", "of 1,000"),
    "an annotation of no image": Case(
        put(image_id=12345), "annotation_orphan", "annotation 3", "12345", ("--strict",)
    ),
    "a duplicate annotation id": Case(put(id=1), "duplicate_annotation_id", "annotation 1", "another annotation"),
    "a duplicate image id": Case(
        lambda p: p.edit(lambda d: d["images"][1].update(id=1)), "duplicate_image_id", "image 1", "two images have"
    ),
    "a box without area": Case(
        put(bbox=[3, 3, 0, 5]), "box_empty", "annotation 3", "no area", ("--strict",)
    ),
    "a box of negative size": Case(
        put(bbox=[9, 9, -3, 5]), "box_empty", "annotation 3", "no area", ("--strict",)
    ),
    "a box of NaN": Case(
        put(bbox=[float("nan"), 3, 4, 5]), "box_not_finite", "annotation 3", "NaN", ("--strict",)
    ),
    "a box over the edge": Case(
        put(bbox=[50, 3, 40, 5]), "box_over_edge", "annotation 3", "out of its 64 x 64", ("--strict",)
    ),
    "a box outside its image": Case(
        put(bbox=[70, 3, 9, 5]), "box_outside", "annotation 3", "outside its 64 x 64", ("--strict",)
    ),
    "no masks for Mask R-CNN": Case(without_masks, "mask_missing", "annotation 1", "have no mask"),
    "a polygon of four numbers": Case(
        put(segmentation=[[1, 1, 5, 5]]), "polygon_short", "annotation 3", "4 numbers", ("--strict",)
    ),
    "a polygon of seven numbers": Case(
        put(segmentation=[[1, 1, 5, 5, 1, 5, 2]]), "polygon_odd", "annotation 3", "odd number", ("--strict",)
    ),
    "RLE with polygon format": Case(
        put(segmentation={"size": [64, 64], "counts": [0, 100, 64 * 64 - 100]}),
        "rle_with_polygon_format", "annotation 3", "INPUT.MASK_FORMAT",
    ),
    "an RLE of another size": Case(
        put(segmentation={"size": [10, 10], "counts": [0, 100]}), "rle_invalid", "annotation 3", "10 x 10"
    ),
    "only crowds": Case(only_crowds, "crowd_only", "image 1", "nothing to train on"),
    "an empty validation set": Case(empty_validation, "split_empty", "", "no image"),
    "a wrong layout": Case(wrong_layout, "layout", "", "instances_train2017.json  missing"),
    "an unknown detectron2 key": Case(
        lambda p: p.experiment["model"]["overrides"].update({"SOLVER.BASE_LRR": 0.1}),
        "config_key", "SOLVER.BASE_LRR", "no such key",
    ),
    "a value of another type": Case(
        lambda p: p.experiment["model"]["overrides"].update({"SOLVER.BASE_LR": 1}),
        "config_value", "SOLVER.BASE_LR", "1 is not of the type of detectron2's default, 0.001",
    ),
    "text among numbers": Case(
        lambda p: p.experiment["model"]["overrides"].update({"INPUT.MIN_SIZE_TRAIN": ["small"]}),
        "config_value", "INPUT.MIN_SIZE_TRAIN", "['small'] is not of the type",
    ),
    "fewer GPUs than asked": Case(
        override(resources__device="cuda", trials__world_sizes=[2], resources__loader_workers=0),
        "too_few_gpus", "trial reference-2xcuda", "asks for 2 GPUs, this machine has",
    ),
    "uneven hosts": Case(
        override(resources__num_nodes=2, tracking__uri="sqlite:///a.db"),
        "uneven_nodes", "trial reference-1xcpu", "evenly",
    ),
    "SQLite for several hosts": Case(
        override(resources__num_nodes=2, tracking__uri="sqlite:///a.db"),
        "tracking_sqlite", "tracking.uri", "several hosts",
    ),
    "storage that cannot be written": Case(storage_in_a_file, "storage_unwritable", "host ", "cannot be written"),
    "storage too small": Case(
        override(storage__keep_checkpoints=10**7), "storage_small", "host ", "the checkpoints of all trials"
    ),
    "checkpoints to no address": Case(
        override(storage__checkpoints="nowhere://bucket/x?option=secret"),
        "storage_unwritable", "storage.checkpoints", "cannot be written there",
    ),
    "too little shared memory": Case(
        override(resources__loader_workers=10**8), "shared_memory", "host ", "the loaders hold up to"
    ),
    "no tracking server": Case(
        override(tracking__uri="http://127.0.0.1:9"), "tracking_unreachable", "http://127.0.0.1:9", "within 3 s"
    ),
    "missing start weights": Case(
        override(model__weights="/nowhere/model.pth"), "weights_missing", "model.weights", "do not exist"
    ),
    "corrupt start weights": Case(corrupt_weights, "weights_corrupt", "model.weights", "corrupt"),
    "weights that would run code": Case(pickled_weights, "weights_unsafe", "model.weights", "would run code"),
    "weights of another checksum": Case(
        lambda p: (corrupt_weights(p), p.experiment["model"].update(weights_sha256="0" * 64)),
        "weights_checksum", "model.weights", "has SHA-256",
    ),
    "an absolute file name": Case(
        lambda p: p.edit(lambda d: d["images"][0].update(file_name="/etc/passwd")),
        "path_absolute", "image 1", "/etc/passwd",
    ),
    "a file name with ..": Case(
        lambda p: p.edit(lambda d: d["images"][0].update(file_name="../x.jpg")), "path_parent", "image 1", "../x.jpg"
    ),
}  # fmt: skip
