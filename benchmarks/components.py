"""The parts of training and evaluation, each against detectron2's or pycocotools' on the same work in one process."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode, PolygonMasks
from pycocotools import mask as coco_mask

from benchmarks.coco_shaped import coco_shaped, polygon
from benchmarks.measure import Row, alternate, seconds, timed
from benchmarks.training import DATA
from trainers.contract.plan import DatasetPlan
from trainers.dataset_cache import cached_records, image_sizes
from trainers.scoring import score
from trainers.scoring_input import IouType
from trainers.speedups.canvases import choose_canvases
from trainers.speedups.fast_mapper import FastMapper
from trainers.speedups.mask_targets import PackedPolygons
from trainers.speedups.packing import Packer, capacities

HEIGHT, WIDTH = 480, 640
COCO_IMAGES, OBJECTS_PER_IMAGE = 118_287, 7
GPU_IMAGES_PER_SECOND, GPU_CPUS = 120, 16
"""What a GPU trains on, and the CPUs that must keep up with it."""


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch's threads, for both sides alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_box(rng: np.random.Generator) -> list[float]:
    """x, y, width, height of an object in an image of HEIGHT x WIDTH."""
    width, height = rng.uniform(10, 300, 2)
    box = [rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height), width, height]
    return [round(float(value), 2) for value in box]


def mapper() -> Row:
    """Training images a second on one core: a JPEG of 640 x 480 with 7 objects, enlarged to 800."""
    rng = np.random.default_rng(0)
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (800,)
    with tempfile.TemporaryDirectory() as folder, threads(1):
        records = []
        for number in range(12):
            coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            image = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
            image = cv2.add(image, np.asarray(rng.integers(0, 12, image.shape, dtype=np.uint8)))
            path = f"{folder}/{number}.jpg"
            cv2.imwrite(path, image, [cv2.IMWRITE_JPEG_QUALITY, 92])
            boxes = [random_box(rng) for _ in range(OBJECTS_PER_IMAGE)]
            annotations = [
                {"iscrowd": 0, "bbox": box, "category_id": 1, "segmentation": [polygon(box, rng)],
                 "bbox_mode": BoxMode.XYWH_ABS}
                for box in boxes
            ]  # fmt: skip
            records.append({"file_name": path, "height": HEIGHT, "width": WIDTH, "annotations": annotations})
        ours, peer = FastMapper(cfg, is_train=True), DatasetMapper(cfg, is_train=True)

        def rate(mapped: Callable[[dict[str, Any]], Any]) -> Callable[[], float]:
            return lambda: len(records) / seconds(lambda: [mapped(record) for record in records])

        rate(ours)(), rate(peer)()
        found, theirs = alternate(rate(ours), rate(peer), 7)
    return Row("mapper", "detectron2's DatasetMapper, 640 x 480 to 800", "images/s", tuple(found), tuple(theirs),
               target=2.0, higher_is_better=True)  # fmt: skip


def decoding() -> Row:
    """Training images a second on one core, as loader processes make them: read, resized, flipped, packed."""
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (640, 672, 704, 736, 768, 800)
    train = coco_shaped((DATA / "coco-shaped-64-1").absolute(), 64).train
    records = load_coco_json(str(train.annotations), str(train.images))
    canvases = choose_canvases(cfg, image_sizes(records), 1, 32)
    packer = Packer(tuple(canvases), *capacities(records), with_masks=True)
    ours, peer = FastMapper(cfg, is_train=True), DatasetMapper(cfg, is_train=True)

    def rate(make: Callable[[dict[str, Any]], object]) -> Callable[[], float]:
        def measured() -> float:
            np.random.seed(0)  # the same sizes for both sides
            return len(records) / seconds(lambda: [make(record) for record in records])

        return measured

    sides = rate(lambda record: packer.pack([ours(record)])), rate(peer)
    with threads(1):
        alternate(*sides, 1)  # warms up
        found, theirs = alternate(*sides, 3)
    needed = GPU_IMAGES_PER_SECOND / GPU_CPUS
    note = (
        f"images of COCO's sizes, objects and detail, packed only by ours; a GPU that trains on {GPU_IMAGES_PER_SECOND}"
        f" images a second with {GPU_CPUS} cores needs {needed:g} of each, ours makes {min(found) / needed:.0f} times"
        " as many"
    )
    return Row("decoding", "detectron2's DatasetMapper, 640 to 800, without packing", "images/s", tuple(found),
               tuple(theirs), target=1.5, higher_is_better=True, note=note)  # fmt: skip


def mask_targets() -> Row:
    """Mask targets of 64 proposals of an image with 7 objects, one of them in two parts."""
    rng = np.random.default_rng(0)
    boxes = [random_box(rng) for _ in range(OBJECTS_PER_IMAGE)]
    polygons = [[np.array(polygon(box, rng, 40))] for box in boxes]
    polygons[0].append(np.array(polygon(boxes[1], rng, 40)))
    objects = torch.tensor(rng.integers(0, OBJECTS_PER_IMAGE, 64))
    corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes])[objects] + torch.randn(64, 4)
    ours, peer = PackedPolygons(polygons)[objects], PolygonMasks(polygons)[objects]
    with threads(1):
        return timed(
            "mask_targets",
            "PolygonMasks.crop_and_resize, 64 proposals, 28 x 28",
            3.0,
            lambda: [ours.crop_and_resize(corners, 28) for _ in range(20)],
            lambda: [peer.crop_and_resize(corners, 28) for _ in range(20)],
        )


def _scored_work(folder: Path, num_images: int = 1000, per_image: int = 100) -> tuple[Path, list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        images.append({"id": image_id, "height": HEIGHT, "width": WIDTH, "file_name": f"{image_id}.jpg"})
        boxes = [random_box(rng) for _ in range(OBJECTS_PER_IMAGE)]
        classes = rng.integers(1, 81, OBJECTS_PER_IMAGE)
        for box, category in zip(boxes, classes.tolist(), strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": box,
                 "area": box[2] * box[3] * 0.7, "iscrowd": 0, "segmentation": [polygon(box, rng)]}
            )  # fmt: skip
        for number in range(per_image):
            which = number % OBJECTS_PER_IMAGE
            near = np.clip(np.array(boxes[which]) + rng.normal(0, 8, 4), [0, 0, 3, 3], [WIDTH, HEIGHT, 300, 300])
            rle = coco_mask.frPyObjects([polygon(near.tolist(), rng)], HEIGHT, WIDTH)[0]
            category = int(classes[which]) if rng.random() < 0.5 else int(rng.integers(1, 81))
            found.append(
                {"image_id": image_id, "category_id": category, "bbox": near.tolist(), "score": float(rng.random()),
                 "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
            )  # fmt: skip
    path = folder / "truth.json"
    categories = [{"id": number, "name": str(number)} for number in range(1, 81)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path, found


def _scoring(iou_type: IouType, name: str, target: float) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path, found = _scored_work(Path(folder))
        figures: dict[str, dict[str, float | None]] = {}

        def run(scorer: Any) -> None:
            figures[scorer] = score(path, found, iou_type, scorer)

        row = timed(
            name,
            "pycocotools, 1,000 images x 100 detections",
            target,
            lambda: run("hotcoco"),
            lambda: run("pycocotools"),
            repeats=3,
            note="the scorer takes all cores, pycocotools one",
        )
        apart = max(abs((figures["hotcoco"][key] or 0) - (value or 0)) for key, value in figures["pycocotools"].items())
        if apart > 1e-4:  # 1e-6 on COCO's own 0–1 scale
            raise AssertionError(f"{name}: the scorers are {apart} apart")
    return row


def scoring_box() -> Row:
    """COCO's twelve figures for boxes."""
    return _scoring("bbox", "scoring_box", 20.0)


def scoring_mask() -> Row:
    """COCO's twelve figures for masks."""
    return _scoring("segm", "scoring_mask", 10.0)


def dataset_ready() -> Row:
    """Records ready to be read, at the second start, at the size of COCO's training set."""
    from detectron2.data import DatasetFromList, get_detection_dataset_dicts
    from detectron2.data.datasets import register_coco_instances

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "instances_bench.json"
        _write_coco_sized(path)
        dataset = DatasetPlan("bench_cache", str(path), str(folder))
        cached_records(dataset, True, folder / "cache")

        def peer() -> None:
            if dataset.name in DatasetCatalog:
                DatasetCatalog.remove(dataset.name)
                MetadataCatalog.remove(dataset.name)
            register_coco_instances(dataset.name, {}, dataset.annotations, dataset.images)
            with contextlib.redirect_stdout(io.StringIO()):
                DatasetFromList(get_detection_dataset_dicts([dataset.name]), copy=False)

        def ours() -> None:
            records = cached_records(dataset, True, folder / "cache")
            assert records[0] and records[len(records) - 1]

        found, theirs = alternate(lambda: seconds(ours), lambda: seconds(peer), 2)
    return Row("dataset_ready", f"load, filter and serialise {COCO_IMAGES:,} images", "s", tuple(found), tuple(theirs),
               target=10.0, higher_is_better=False)  # fmt: skip


def _write_coco_sized(path: Path) -> None:
    """Annotations of as many images and objects as COCO's training set has, written as a stream."""
    rng = np.random.default_rng(0)
    boxes = [random_box(rng) for _ in range(500)]
    pool = [(box, [polygon(box, rng)]) for box in boxes]
    with path.open("w", encoding="utf-8") as file:
        file.write('{"images": [')
        file.write(
            ",".join(
                json.dumps({"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i:012d}.jpg"})
                for i in range(COCO_IMAGES)
            )
        )
        file.write('], "annotations": [')
        shared = [f'"bbox": {json.dumps(box)}, "segmentation": {json.dumps(outline)}' for box, outline in pool]
        for number in range(COCO_IMAGES * OBJECTS_PER_IMAGE):
            file.write("," if number else "")
            file.write(
                f'{{"id": {number + 1}, "image_id": {number // OBJECTS_PER_IMAGE}, "category_id": {number % 80 + 1}, '
                f'"iscrowd": 0, "area": 100.0, {shared[number % len(shared)]}}}'
            )
        file.write('], "categories": ')
        file.write(json.dumps([{"id": i, "name": str(i)} for i in range(1, 81)]) + "}")


def roi_pooling() -> Row:
    """ROIAlign forward and backward over a pyramid of 320 px, 1,024 boxes, 256 channels."""
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    from trainers.speedups.roi_pooling import SparsePooler

    torch.manual_seed(0)
    peer, ours = (kind(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIAlignV2") for kind in (ROIPooler, SparsePooler))
    features = [torch.randn(2, 256, 320 // s, 320 // s, requires_grad=True) for s in (4, 8, 16, 32)]
    centre, sides = torch.rand(1024, 2) * 320, torch.exp(torch.rand(1024, 2) * 3 + 2.3)
    boxes = torch.cat([(centre - sides / 2).clamp(min=0), (centre + sides / 2).clamp(max=320)], dim=1)
    halves = [Boxes(boxes[:512]), Boxes(boxes[512:])]
    direction = torch.randn(1024, 256, 7, 7)

    def run(pooler: torch.nn.Module) -> None:
        torch.autograd.grad(pooler(features, halves), features, direction)

    with threads(1):
        return timed("roi_pooling", "torchvision's ROIAlign on CPU, forward and backward", 2.0,
                     lambda: run(ours), lambda: run(peer), repeats=3)  # fmt: skip
