"""The fast mapper is detectron2's, but for one grey level."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import read_image as read_by_detectron2
from detectron2.structures import BoxMode
from PIL import Image, PngImagePlugin
from pycocotools import mask as coco_mask

from trainers.speedups.fast_mapper import FastMapper, read_image, resize
from trainers.speedups.mask_targets import PackedPolygons

KINDS = {
    "jpg": ("L", "RGB", "CMYK", "1"),
    "png": ("L", "RGB", "P", "RGBA", "LA", "1"),
    "bmp": ("L", "RGB", "P", "RGBA", "1"),
}
"""Pillow's modes that each kind of file can hold."""


def config(**changes: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (200, 240, 320)
    cfg.INPUT.MAX_SIZE_TRAIN = 500
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def picture(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Smooth and sharp parts, in colour."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    cv2.circle(image, (width // 2, height // 2), min(height, width) // 3, (250, 20, 130), -1)
    return image


def record_of(path: Path, height: int, width: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    annotations = []
    for number in range(6):
        corners = rng.uniform(0, [width, height], (7, 2)).round(2)
        polygon = corners.ravel().tolist()
        low, high = corners.min(0), corners.max(0)
        box = [*low.tolist(), *(high - low).tolist()]
        if number == 1:  # whole numbers, which detectron2 moves in whole numbers
            polygon, box = [int(value) for value in polygon], [int(value) for value in box]
        polygons = [polygon] if number != 2 else [polygon, (corners / 2).ravel().tolist()]
        annotations.append(
            {
                "iscrowd": 0,
                "bbox": box,
                "category_id": number % 3,
                "segmentation": polygons,
                "bbox_mode": BoxMode.XYWH_ABS,
            }
        )
    annotations.append({**annotations[0], "bbox": [5.0, 5.0, 0.0, 4.0]})  # empty: dropped
    crowd = coco_mask.encode(np.asfortranarray(np.ones((height, width), dtype=np.uint8)))
    annotations.append({**annotations[0], "iscrowd": 1, "segmentation": crowd})
    return {"file_name": str(path), "height": height, "width": width, "image_id": 1, "annotations": annotations}


def both(cfg: CfgNode, record: dict[str, Any], seed: int, is_train: bool = True) -> tuple[dict[str, Any], ...]:
    """What detectron2's mapper and ours make of a record, from the same random numbers."""
    results = []
    for mapper in (
        DatasetMapper(cfg, is_train=is_train),
        FastMapper(cfg, is_train=is_train),
        FastMapper(cfg, is_train=is_train, exact_pixels=True),
    ):
        np.random.seed(seed)
        results.append(mapper(copy.deepcopy(record)))
        results[-1]["drawn next"] = np.random.random()
    exact = results.pop()
    assert exact["image"].equal(results[0]["image"]) and exact["drawn next"] == results[0]["drawn next"]
    return tuple(results)


def assert_alike(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours["drawn next"] == theirs["drawn next"]
    assert ours["image"].shape == theirs["image"].shape and ours["image"].dtype == theirs["image"].dtype
    assert ours["image"].is_contiguous()
    assert (ours["image"].int() - theirs["image"].int()).abs().max() <= 1
    if "instances" in theirs:
        expected, found = theirs["instances"], ours["instances"]
        assert found.image_size == expected.image_size
        assert found.get_fields().keys() == expected.get_fields().keys()
        assert found.gt_boxes.tensor.equal(expected.gt_boxes.tensor)
        assert found.gt_classes.equal(expected.gt_classes)
        if expected.has("gt_masks"):
            pairs = list(zip(found.gt_masks, expected.gt_masks, strict=True))
            for our_polygons, their_polygons in pairs:
                for ours_, theirs_ in zip(our_polygons, their_polygons, strict=True):
                    assert ours_.dtype == theirs_.dtype and np.array_equal(ours_, theirs_)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("height", "width"), [(120, 160), (173, 131), (480, 640), (400, 1200)])
def test_an_augmented_image_and_its_annotations_are_detectron2s(
    tmp_path: Path, seed: int, height: int, width: int
) -> None:
    path = tmp_path / "image.jpg"
    cv2.imwrite(str(path), picture(height, width, seed))
    theirs, ours = both(config(), record_of(path, height, width, seed), seed)
    assert_alike(theirs, ours)
    assert isinstance(ours["instances"].gt_masks, PackedPolygons)
    assert len(ours["instances"]) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"MODEL__MASK_ON": False},
        {"INPUT__RANDOM_FLIP": "vertical"},
        {"INPUT__RANDOM_FLIP": "none"},
        {"INPUT__FORMAT": "RGB"},
        {"INPUT__MASK_FORMAT": "bitmask"},
        {"INPUT__MIN_SIZE_TRAIN": (0,)},
        {"INPUT__CROP__ENABLED": True, "MODEL__MASK_ON": False},
        {"INPUT__CROP__ENABLED": True, "INPUT__CROP__SIZE": [0.3, 0.4]},
        {"INPUT__CROP__ENABLED": True, "INPUT__CROP__TYPE": "absolute", "INPUT__CROP__SIZE": [150, 5000]},
        {"INPUT__CROP__ENABLED": True, "INPUT__MASK_FORMAT": "bitmask"},
        {"INPUT__MIN_SIZE_TRAIN": (100, 300), "INPUT__MIN_SIZE_TRAIN_SAMPLING": "range"},
    ],
    ids=str,
)
def test_other_settings_are_honoured(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "image.jpg"
    cv2.imwrite(str(path), picture(200, 300))
    record = record_of(path, 200, 300)
    for seed in range(3):
        theirs, ours = both(config(**changes), record, seed)
        if "INPUT__MASK_FORMAT" in changes:
            assert ours["instances"].gt_masks.tensor.equal(theirs["instances"].gt_masks.tensor)
            theirs["instances"].remove("gt_masks")
            ours["instances"].remove("gt_masks")
        assert_alike(theirs, ours)


def test_evaluation_images_are_detectron2s(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    cv2.imwrite(str(path), picture(480, 640))
    theirs, ours = both(config(), record_of(path, 480, 640), seed=0, is_train=False)
    assert_alike(theirs, ours)
    assert "annotations" not in ours and "instances" not in ours


def test_a_record_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    cv2.imwrite(str(path), picture(100, 120))
    record = record_of(path, 100, 120)
    before = copy.deepcopy(record)
    for changes in ({}, {"INPUT__MASK_FORMAT": "bitmask"}, {"MODEL__MASK_ON": False}):
        FastMapper(config(**changes), is_train=True)(record)
        assert record == before


def test_an_image_without_annotations_left_has_no_instances(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    cv2.imwrite(str(path), picture(100, 120))
    record = record_of(path, 100, 120) | {"annotations": []}
    assert_alike(*both(config(), record, seed=0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, image_format: str) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture(60, 90)).save(path, exif=exif, quality=90)
    assert np.array_equal(read_image(str(path), image_format), read_by_detectron2(str(path), image_format))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("place", ["xmp", "late exif", "png text", "png raw profile"])
def test_an_orientation_is_found_wherever_pillow_finds_one(tmp_path: Path, place: str) -> None:
    path, image, exif = tmp_path / "turned", Image.fromarray(picture(60, 90)), Image.Exif()
    exif[274] = 6
    if place == "xmp":
        image.save(path, "JPEG", xmp=XMP)
    elif place == "late exif":  # behind a profile of colours of more than 64 KiB
        image.save(path, "JPEG", exif=exif, icc_profile=bytes(200_000))
        data = path.read_bytes()
        start = data.index(b"\xff\xe1")
        size = 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        block, at = data[start : start + size], data.index(b"\xff\xdb")
        path.write_bytes(data[:start] + data[start + size : at] + block + data[at:])
    else:
        info = PngImagePlugin.PngInfo()
        if place == "png text":
            info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        else:
            block = exif.tobytes()
            info.add_text("Raw profile type exif", f"\nexif\n{len(block):8d}\n{block.hex()}\n")
        image.save(path, "PNG", pnginfo=info)
    theirs = read_by_detectron2(str(path), "BGR")
    assert theirs.shape == (90, 60, 3), "the orientation is there"
    assert np.array_equal(read_image(str(path), "BGR"), theirs)


def test_an_animated_png_is_read_alike(tmp_path: Path) -> None:
    first, second, path = picture(50, 70), picture(50, 70, seed=1), tmp_path / "animated.png"
    frames = [Image.fromarray(second)]
    Image.fromarray(first).save(path, save_all=True, append_images=frames, default_image=True)
    assert b"acTL" in path.read_bytes()
    assert np.array_equal(read_image(str(path), "BGR"), read_by_detectron2(str(path), "BGR"))


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(s, m) for s, modes in KINDS.items() for m in modes],
)
def test_every_kind_of_image_is_read_alike(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(picture(50, 70)).convert(mode).save(path)
    assert np.array_equal(read_image(str(path), "BGR"), read_by_detectron2(str(path), "BGR"))


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2}, {"quality": 30}])
def test_every_kind_of_jpeg_is_read_alike(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(picture(101, 77)).save(path, **options)
    assert np.array_equal(read_image(str(path), "BGR"), read_by_detectron2(str(path), "BGR"))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_cut_off_image_is_an_error_not_a_grey_area(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match=r"truncated|broken"):
        read_image(str(path), "BGR")


@pytest.mark.parametrize("size", [(333, 444), (240, 320), (100, 90), (479, 641), (481, 639), (800, 1067), (7, 900)])
def test_resizing_is_pillows_to_one_grey_level(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    for image in (noise, picture(480, 640)):
        theirs = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(theirs - resize(image, *size)).max() <= 1


@pytest.mark.shared
def test_real_coco_images_come_out_alike(shared_data: Path) -> None:
    coco = shared_data / "coco"
    annotations = next((coco / "annotations").glob("instances_train2017*.json"))
    records = load_coco_json(str(annotations), str(coco / "train2017"))
    cfg = config(INPUT__MIN_SIZE_TRAIN=(640, 800), INPUT__MAX_SIZE_TRAIN=1333)
    present = [record for record in records if Path(record["file_name"]).is_file()][:40]
    assert present
    for seed, record in enumerate(present):
        assert_alike(*both(cfg, record, seed))
