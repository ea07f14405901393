"""Random images with objects, as detectron2's records and as a padded batch of the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, PolygonMasks
from torch import Tensor

from tests.builders.polygons import as_edges
from trainers.speedups.padded_batch import PaddedBatch


def random_records(
    sizes: Sequence[tuple[int, int]], counts: Sequence[int], seed: int = 0, num_classes: int = 3
) -> list[dict[str, Any]]:
    """Images (height, width) of noise with so many objects each, whose masks are one or two quadrilaterals."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for (height, width), count in zip(sizes, counts, strict=True):
        corners = rng.uniform(0, 0.7, (count, 2)) * (width, height)
        ends = np.minimum(corners + rng.uniform(4, 40, (count, 2)), (width, height))
        boxes = torch.tensor(np.concatenate([corners, ends], axis=1), dtype=torch.float32).view(-1, 4)
        instances = Instances((height, width), gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.tensor(rng.integers(0, num_classes, count), dtype=torch.int64)
        instances.gt_masks = PolygonMasks(
            [[rng.uniform(low, high, (4, 2)).ravel() for _ in range(1 + n % 2)] for n, (low, high) in
             enumerate(zip(corners, ends, strict=True))]
        )  # fmt: skip
        image = torch.tensor(rng.integers(0, 256, (3, height, width)), dtype=torch.uint8)
        records.append({"file_name": f"{len(records)}.jpg", "image": image, "instances": instances})
    return records


def padded(records: list[dict[str, Any]], canvas: tuple[int, int], max_objects: int = 6) -> PaddedBatch:
    """The same images on a canvas (height, width), with room for so many objects each."""
    objects = [record["instances"] for record in records]
    images = torch.zeros(len(records), 3, *canvas, dtype=torch.uint8)
    for image, record in zip(images, records, strict=True):
        height, width = record["image"].shape[1:]
        image[:, :height, :width] = record["image"]
    return PaddedBatch(
        images,
        torch.tensor([record["image"].shape[1:] for record in records]),
        _rows([each.gt_boxes.tensor for each in objects], max_objects),
        _rows([each.gt_classes for each in objects], max_objects),
        torch.tensor([len(each) for each in objects]),
        *as_edges([each.gt_masks.polygons for each in objects], max_objects, 8 * max_objects),
    )


def _rows(values: list[Tensor], capacity: int) -> Tensor:
    rows = values[0].new_zeros((len(values), capacity, *values[0].shape[1:]))
    for row, value in zip(rows, values, strict=True):
        row[: len(value)] = value
    return rows
