"""From images to what a model finds on them, in COCO's result format, with few waits for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from torch import Tensor, nn

from trainers.batching import Record
from trainers.speedups import rle

IMAGE_FIELD = "image_number"
"""Field of instances: the image of each, by its place in the batch."""


@dataclass(frozen=True, slots=True)
class Detections:
    """R detections on images of one size, on their way from the device to the host."""

    image_ids: list[Any]
    """Of the images."""
    size: tuple[int, int]
    """Height and width of the images in pixels."""
    image_numbers: Tensor
    """(R,): the image of each detection, by its place in `image_ids`."""
    corners: Tensor
    """(R, 4): x0, y0, x1, y1 in pixels."""
    scores: Tensor
    """(R,)."""
    classes: Tensor
    """(R,): class numbers from 0."""
    keypoints: Tensor | None
    """(R, K, 3): x, y, score."""
    mask_changes: Tensor | None
    """Of R masks, from `rle.changes`."""
    copied: torch.cuda.Event | None
    """Recorded when all of it has reached the host; None where it was there."""

    def results(self, category_ids: Mapping[int, int]) -> list[dict[str, Any]]:
        """The detections in COCO's result format: detectron2's `instances_to_coco_json`, byte for byte.

        Waits until they have reached the host.

        Args:
            category_ids: The data set's category id for each class number.

        Returns:
            For each detection `image_id`, `category_id`, `bbox` (x, y, width, height), `score`, `segmentation` (RLE,
            counts as text), and `keypoints` (K times x, y, score).
        """
        if self.copied:
            self.copied.synchronize()
        boxes = torch.cat([self.corners[:, :2], self.corners[:, 2:] - self.corners[:, :2]], dim=1)
        columns = (each.tolist() for each in (self.image_numbers, self.classes, boxes, self.scores))
        found: list[dict[str, Any]] = [
            {"image_id": self.image_ids[number], "category_id": category_ids[category], "bbox": box, "score": score}
            for number, category, box, score in zip(*columns, strict=True)
        ]
        if self.mask_changes is not None:
            rles = rle.encode(self.mask_changes, len(found), *self.size)
            for detection, mask in zip(found, rles, strict=True):
                detection["segmentation"] = mask
        if self.keypoints is not None:
            # A model's coordinates are of a pixel's middle, COCO's are numbers of pixels.
            keypoints = self.keypoints - self.keypoints.new_tensor([0.5, 0.5, 0.0])
            for detection, numbers in zip(found, keypoints.flatten(start_dim=1).tolist(), strict=True):
                detection["keypoints"] = numbers
        return found


def detect(model: nn.Module, batch: Sequence[Record]) -> Detections:
    """What a model in evaluation mode finds on images of one size.

    A `GeneralizedRCNN`'s results are scaled to the original images, and their masks pasted, for all images in one call,
    since that waits for the device some six times.
    """
    if getattr(type(model), "inference", None) is GeneralizedRCNN.inference:
        raw = _together(model.inference(batch, do_postprocess=False))  # type: ignore[operator]
        found = detector_postprocess(raw, batch[0]["height"], batch[0]["width"])
    else:
        found = _together([output["instances"] for output in model(batch)])
    return to_host(found, [record["image_id"] for record in batch])


def _together(found: list[Instances]) -> Instances:
    for number, instances in enumerate(found):
        instances.set(IMAGE_FIELD, torch.full_like(instances.pred_classes, number))
    together: Instances = Instances.cat(found)
    return together


def to_host(found: Instances, image_ids: list[Any]) -> Detections:
    """Begins to copy a model's results to the host; of masks only their changes.

    The copies go into page-locked memory, so that nothing waits for them. The device's memory may be freed meanwhile:
    what reuses it comes after the copies in the same stream.

    Args:
        found: With `IMAGE_FIELD`, and as a model returns them: `pred_boxes`, `scores`, `pred_classes`, and where it has
            them `pred_masks` ((R, height, width), bool) and `pred_keypoints` ((R, K, 3): x, y, score).
        image_ids: Of the images.
    """
    fields = found.get_fields()
    tensors = {
        "image_numbers": fields[IMAGE_FIELD],
        "corners": found.pred_boxes.tensor,
        "scores": found.scores,
        "classes": found.pred_classes,
        "keypoints": fields.get("pred_keypoints"),
        "mask_changes": rle.changes(found.pred_masks) if "pred_masks" in fields else None,
    }
    copies: dict[str, Any] = {
        name: each if each is None else each.to("cpu", non_blocking=True) for name, each in tensors.items()
    }
    copied = torch.cuda.Event(blocking=True) if found.scores.is_cuda else None
    if copied:
        copied.record()
    return Detections(image_ids, found.image_size, **copies, copied=copied)
