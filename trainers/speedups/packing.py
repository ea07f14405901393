"""Packs mapped images into a batch of fixed sizes, in the loader's process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import PolygonMasks

from trainers.speedups.canvases import Canvas, smallest_fitting
from trainers.speedups.mask_targets import PackedPolygons
from trainers.speedups.padded_batch import PaddedBatch

MIN_CAPACITY, MAX_OBJECTS, MAX_EDGES = 16, 1024, 16384
"""Bounds of the capacities. At the upper ones an image's objects take half a megabyte, a sixth of its pixels at 800 x
1333."""

NUM_COUNTED = 1024
"""Images, evenly spaced over the data set, whose objects are counted."""

RESERVE = 2
"""The capacities over the largest image among them, at least."""


class NotPackedError(ValueError):
    """A batch is not one of fixed sizes; its text is the reason, the same for all batches with that reason."""


@dataclass(frozen=True, slots=True)
class Packer:
    """Makes a `PaddedBatch` of mapped records.

    All batches have the same capacities: another capacity would be another captured step.
    """

    canvases: tuple[Canvas, ...]
    """Smallest first; a batch gets the first that takes all of its images."""
    max_objects: int
    max_edges: int
    with_masks: bool
    """Whether the model is trained on masks."""

    def pack(self, records: Sequence[dict[str, Any]]) -> PaddedBatch:
        """Packs one batch; raises NotPackedError."""
        images = [record["image"] for record in records]
        if any(image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3 for image in images):
            raise NotPackedError("images that are not of three bytes a pixel")
        sizes = torch.tensor([image.shape[1:] for image in images])
        canvas = smallest_fitting(self.canvases, *sizes.amax(dim=0).tolist())
        if canvas is None:
            raise NotPackedError("images that are larger than every canvas")
        batch = _empty(len(images), canvas, self.max_objects, self.max_edges if self.with_masks else MIN_CAPACITY)
        batch.sizes.copy_(sizes)
        for number, record in enumerate(records):
            height, width = images[number].shape[1:]
            batch.images[number].numpy()[:, :height, :width] = images[number].numpy()
            if "instances" not in record:
                raise NotPackedError("images without annotations")
            self._write_objects(batch, number, record["instances"])
        return batch

    def _write_objects(self, batch: PaddedBatch, number: int, instances: Any) -> None:
        count = len(instances)
        if count > self.max_objects:
            raise NotPackedError(f"images of more than {self.max_objects:,} objects")
        if instances.has("gt_keypoints"):
            raise NotPackedError("objects with keypoints")
        batch.num_objects[number] = count
        if count:
            batch.boxes[number, :count] = instances.gt_boxes.tensor
            batch.classes[number, :count] = instances.gt_classes
            if self.with_masks:
                self._write_edges(batch, number, instances)

    def _write_edges(self, batch: PaddedBatch, number: int, instances: Any) -> None:
        if not instances.has("gt_masks") or not isinstance(instances.gt_masks, PolygonMasks):
            raise NotPackedError("masks that are not polygons")
        masks = instances.gt_masks
        packed = masks if isinstance(masks, PackedPolygons) else PackedPolygons(masks.polygons)
        points, polygon, owners = packed.flat()
        count = points.shape[1]
        if count > self.max_edges:
            raise NotPackedError(f"images whose polygons have more than {self.max_edges:,} corners")
        following = np.arange(1, count + 1)
        last = np.flatnonzero(np.diff(polygon, append=-1))
        following[last] = np.append(0, last[:-1] + 1)[: len(last)]
        edges = batch.edges[number].numpy()
        edges[:count, :2], edges[:count, 2:] = points.T, points.take(following, axis=1).T
        batch.edge_polygon[number].numpy()[:count] = polygon
        batch.first_edge[number].numpy()[:] = np.searchsorted(owners[polygon], np.arange(self.max_objects + 1))


def _empty(num_images: int, canvas: Canvas, num_objects: int, num_edges: int) -> PaddedBatch:
    return PaddedBatch(
        # NumPy does not write zeros into memory that the system has just cleared: half the time of torch.zeros.
        images=torch.from_numpy(np.zeros((num_images, 3, *canvas), dtype=np.uint8)),
        sizes=torch.zeros((num_images, 2), dtype=torch.int64),
        boxes=torch.zeros((num_images, num_objects, 4)),
        classes=torch.zeros((num_images, num_objects), dtype=torch.int64),
        num_objects=torch.zeros(num_images, dtype=torch.int64),
        edges=torch.zeros((num_images, num_edges, 4), dtype=torch.float64),
        edge_polygon=torch.zeros((num_images, num_edges), dtype=torch.int32),
        first_edge=torch.zeros((num_images, num_objects + 1), dtype=torch.int32),
    )


def capacities(records: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Objects and polygon edges of an image for which a batch has room: powers of two, by a sample of the data set.

    They are twice those of the largest image among `NUM_COUNTED`, within the bounds. The same records give the same.
    """
    objects, edges = [0], [0]
    for record in records[:: max(1, len(records) // NUM_COUNTED)]:
        annotations = [each for each in record["annotations"] if not each.get("iscrowd", 0)]
        objects.append(len(annotations))
        outlines = [each["segmentation"] for each in annotations if isinstance(each.get("segmentation"), list)]
        edges.append(sum(len(polygon) // 2 for outline in outlines for polygon in outline))
    return _capacity(max(objects), MAX_OBJECTS), _capacity(max(edges), MAX_EDGES)


def _capacity(largest: int, most: int) -> int:
    """The power of two from `RESERVE * largest` up."""
    return int(min(max(MIN_CAPACITY, 1 << (RESERVE * largest - 1).bit_length()), most))
