"""Reads and augments images as detectron2's DatasetMapper does, in a fraction of its time.

OpenCV reads, resizes and flips, and NumPy moves all of an image's boxes and polygons at once.
Augmentations are detectron2's own objects and draw from the same random numbers in the same order, so the fast mapper
makes the same choices. The image differs by at most one grey level, or not at all where detectron2's functions are used
for it (`exact_pixels`); boxes and masks never do. Whatever might not come out alike goes through detectron2's own code.
"""

from __future__ import annotations

import copy
import io
import itertools
import logging
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as detection
from detectron2.data import transforms as augment
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, Transform, TransformList, VFlipTransform
from numpy.typing import NDArray
from PIL import ExifTags, Image

from trainers.speedups.mask_targets import PackedPolygons, pack

logger = logging.getLogger(__name__)

Pixels = NDArray[Any]
"""An image, (height, width, 3), in bytes."""

ELEMENTWISE = (augment.ResizeTransform, HFlipTransform, VFlipTransform, NoOpTransform)
"""Transforms that move each point by itself, whatever else is in the array."""

ORIENTATION_MARKS = (b"Exif", b"eXIf", b"tiff:Orientation", b"Raw profile type exif")
"""What a JPEG or PNG holds in which Pillow finds an orientation."""

MIN_BOX_SIDE = 1e-5
"""Sides above this count as a box (detectron2's `filter_empty_instances`)."""


class FastMapper(DatasetMapper):
    """Reads and augments one image; the same arguments and the same result as detectron2's DatasetMapper.

    OpenCV computes on the calling thread alone from then on, in the whole process: its threads and a forked loader
    process could wait for each other forever. `process_settings` puts that back.
    """

    def __init__(self, cfg: CfgNode, is_train: bool, packed_masks: bool = True, exact_pixels: bool = False) -> None:
        super().__init__(cfg, is_train=is_train)
        self.packed_masks, self.exact_pixels = packed_masks, exact_pixels
        usual = augment.ResizeShortestEdge, augment.RandomFlip
        slow = {
            "crops": any(type(augmentation) not in usual for augmentation in self.augmentations.augs),
            "keypoints": self.use_keypoint,
            "bitmasks": self.use_instance_mask and self.instance_mask_format != "polygon",
        }
        if is_train and any(slow.values()):
            names = ", ".join(name for name, is_on in slow.items() if is_on)
            logger.info("mapper: detectron2's functions move the objects of an image one by one: %s.", names)
        cv2.setNumThreads(0)

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Maps one image's record, which is left as it was.

        Raises:
            OSError: The image cannot be read.
            detectron2.data.detection_utils.SizeMismatchError: It is not of the size its annotations say.
        """
        if "sem_seg_file_name" in dataset_dict or self.proposal_topk is not None:
            mapped: dict[str, Any] = super().__call__(dataset_dict)
            return mapped
        record = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        read, augmented_class = (
            (detection.read_image, augment.AugInput) if self.exact_pixels else (read_image, _Augmented)
        )
        image = read(record["file_name"], self.image_format)
        detection.check_image_size(record, image)
        augmented = augmented_class(image)
        transforms: TransformList = self.augmentations(augmented)
        record["image"] = torch.from_numpy(_planes(augmented.image))
        if self.is_train and "annotations" in dataset_dict:
            shape: tuple[int, int] = augmented.image.shape[:2]
            record["instances"] = self._instances(dataset_dict["annotations"], transforms, shape)
        return record

    def _instances(
        self, annotations: list[dict[str, Any]], transforms: TransformList, shape: tuple[int, int]
    ) -> Instances:
        objects = [annotation for annotation in annotations if annotation.get("iscrowd", 0) == 0]
        with_masks = self.use_instance_mask and bool(objects) and "segmentation" in objects[0]
        if not self._is_plain(objects, transforms, with_masks):
            found = self._instances_one_by_one(objects, transforms, shape)
            return pack(found) if self.packed_masks else found
        boxes = _move_boxes([annotation["bbox"] for annotation in objects], transforms, shape)
        nonempty = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] > MIN_BOX_SIDE).all(axis=1))
        instances = Instances(shape)
        instances.gt_boxes = Boxes(torch.from_numpy(boxes[nonempty]))
        instances.gt_classes = torch.tensor([int(objects[i]["category_id"]) for i in nonempty], dtype=torch.int64)
        if with_masks:
            segmentations = [objects[i]["segmentation"] for i in nonempty]
            mask_class = PackedPolygons if self.packed_masks else detection.PolygonMasks
            instances.gt_masks = mask_class(_move_polygons(segmentations, transforms))
        return instances

    def _instances_one_by_one(
        self, objects: list[dict[str, Any]], transforms: TransformList, shape: tuple[int, int]
    ) -> Instances:
        """By the functions of detectron2 of which its mapper consists."""
        unused = {"segmentation": not self.use_instance_mask, "keypoints": not self.use_keypoint}
        used = [{key: value for key, value in annotation.items() if not unused.get(key)} for annotation in objects]
        transformed = [
            detection.transform_instance_annotations(
                annotation, transforms, shape, keypoint_hflip_indices=self.keypoint_hflip_indices
            )
            for annotation in copy.deepcopy(used)  # detectron2 changes what it is given
        ]
        instances = detection.annotations_to_instances(transformed, shape, mask_format=self.instance_mask_format)
        if self.recompute_boxes:  # a box may no longer fit what cropping has left of its object
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        return detection.filter_empty_instances(instances)

    def _is_plain(self, objects: list[dict[str, Any]], transforms: TransformList, with_masks: bool) -> bool:
        """Whether the vectorised code gives what detectron2's gives: boxes and polygons as JSON has them."""
        return (
            not self.use_keypoint
            and not self.recompute_boxes
            and self.instance_mask_format == "polygon"
            and all(type(transform) in ELEMENTWISE for transform in transforms.transforms)
            and all(
                annotation["bbox_mode"] == BoxMode.XYWH_ABS
                and type(annotation["bbox"]) is list
                and len(annotation["bbox"]) == 4
                and (not with_masks or (type(annotation.get("segmentation")) is list and annotation["segmentation"]))
                for annotation in objects
            )
        )


class _Augmented(augment.AugInput):
    """An image that detectron2's augmentations transform, by OpenCV where that comes out alike."""

    image: NDArray[Any]

    def transform(self, tfm: Transform) -> None:
        image: NDArray[Any] = self.image
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            if type(tfm) is augment.ResizeTransform and tfm.interp == Image.Resampling.BILINEAR:
                self.image = resize(image, tfm.new_h, tfm.new_w)
                return
            if type(tfm) is HFlipTransform:
                self.image = cv2.flip(image, 1)
                return
        self.image = tfm.apply_image(image)


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """Pillow's bilinear resize to within one grey level.

    Enlarging is plain interpolation, which OpenCV is fastest at. Shrinking averages, which torch's antialiased kernel
    for bytes does as Pillow does, and OpenCV does not.
    """
    if (height, width) == image.shape[:2]:
        return image
    if height >= image.shape[0] and width >= image.shape[1]:
        enlarged: Pixels = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return enlarged
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).unsqueeze(0)
    shrunk = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(shrunk[0].permute(1, 2, 0).numpy())


def read_image(file: str, image_format: str) -> Pixels:
    """Reads an image as detectron2 does, turned as its EXIF orientation says; greyscale becomes three channels.

    OpenCV reads a JPEG that was cut off as a half-grey image; such files are left to Pillow, which raises.

    Raises:
        OSError: The file cannot be read or is cut off.
    """
    with PathManager.open(file, "rb") as stream:
        data: bytes = stream.read()
    if image_format in ("BGR", "RGB") and (_is_whole_jpeg(data) or _is_whole_png(data)):
        flag = cv2.IMREAD_COLOR if image_format == "BGR" else cv2.IMREAD_COLOR_RGB
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is not None:
            return _upright(image, data)
    read: Pixels = detection.read_image(file, format=image_format)
    return read


def _is_whole_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG of one or three channels that runs to its end marker."""
    if not data.startswith(b"\xff\xd8\xff") or data[-2:] != b"\xff\xd9":
        return False
    at = 2
    while at + 10 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame header (ITU T.81, B.2.2)
            return data[at + 9] in (1, 3)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _is_whole_png(data: bytes) -> bool:
    """Whether this is a PNG of 8-bit grey or colour without transparency that runs to its end."""
    return (
        data.startswith(b"\x89PNG\r\n\x1a\n")
        and data[24:26] in (b"\x08\x00", b"\x08\x02")
        and data[-8:-4] == b"IEND"
        and b"tRNS" not in data
        and b"acTL" not in data  # animated: Pillow shows its first frame, which need not be the image
    )


def _upright(image: Pixels, data: bytes) -> Pixels:
    """Turns an image by the orientation Pillow finds, which is the one detectron2 goes by."""
    if not any(mark in data for mark in ORIENTATION_MARKS):
        return image
    try:
        orientation = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - a damaged EXIF block raises anything; detectron2 ignores it, too
        return image
    if orientation in (5, 6, 7, 8):
        image = cv2.transpose(image)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation or 1)
    return image if flip is None else cv2.flip(image, flip)


def _planes(image: Pixels) -> Pixels:
    """An image as (channels, height, width), contiguous; OpenCV is several times faster at it than NumPy."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        return np.ascontiguousarray(image.transpose(2, 0, 1))
    planes = np.empty((3, *image.shape[:2]), dtype=np.uint8)
    cv2.split(np.ascontiguousarray(image), [planes[0], planes[1], planes[2]])
    return planes


def _move_boxes(boxes: list[list[float]], transforms: TransformList, shape: tuple[int, int]) -> NDArray[np.float32]:
    """COCO's boxes (x, y, width, height) as transformed corners within the image, (N, 4).

    detectron2 adds the sides in 32 bits, and moves a box of whole numbers in whole numbers.
    """
    moved = np.zeros((len(boxes), 4))
    whole = np.array([all(type(value) is int for value in box) for box in boxes], dtype=bool)
    for mask, dtype, wide_dtype in ((~whole, np.float32, np.float64), (whole, np.int64, np.int64)):
        if mask.any():
            selected: NDArray[Any] = np.array(list(itertools.compress(boxes, mask)), dtype)
            corners = np.concatenate([selected[:, :2], selected[:, 2:] + selected[:, :2]], axis=1)
            moved[mask] = transforms.apply_box(corners.astype(wide_dtype))
    height, width = shape
    clipped: NDArray[np.float32] = np.minimum(moved.clip(min=0), [width, height, width, height]).astype(np.float32)
    return clipped


def _move_polygons(segmentations: list[list[Any]], transforms: TransformList) -> list[list[NDArray[np.float64]]]:
    """Each instance's polygons, transformed. A polygon of whole numbers is moved in whole numbers, as by detectron2."""
    flat = [np.asarray(polygon) for segmentation in segmentations for polygon in segmentation]
    moved: list[NDArray[np.float64]] = [np.empty(0)] * len(flat)
    for dtype in {polygon.dtype for polygon in flat}:
        numbers = [number for number, polygon in enumerate(flat) if polygon.dtype == dtype]
        points = np.concatenate([flat[number] for number in numbers]).reshape(-1, 2)
        coordinates = transforms.apply_coords(points).reshape(-1).astype(np.float64)
        bounds = np.cumsum([flat[number].size for number in numbers])[:-1]
        for number, polygon in zip(numbers, np.split(coordinates, bounds), strict=True):
            moved[number] = polygon
    remaining = iter(moved)
    return [[next(remaining) for _ in segmentation] for segmentation in segmentations]
