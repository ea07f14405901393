"""A training batch as tensors of fixed sizes, whatever its images show.

With such a batch no operation of a training step has a shape that depends on data, so the host never waits for the
device to learn one, and the step can be captured in a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """N images on a canvas of H x W pixels, with room for G objects and E polygon edges in each.

    All tensors are on one device. What lies beyond an image's counts is zero and must not influence anything.
    """

    images: Tensor
    """(N, 3, H, W), uint8, channels in the model's order; each image in the upper left corner, zeros elsewhere."""
    sizes: Tensor
    """(N, 2), int64: height and width of each image in pixels."""
    boxes: Tensor
    """(N, G, 4), float32: corners (x0, y0, x1, y1) of the objects in pixels."""
    classes: Tensor
    """(N, G), int64: contiguous class numbers."""
    num_objects: Tensor
    """(N,), int64: an image's objects are the first ones of its row."""
    edges: Tensor
    """(N, E, 4), float64: edges (x0, y0, x1, y1) of the objects' polygons in pixels; the edges of a polygon in its
    order, the last of them back to its first corner; polygon after polygon, object after object."""
    edge_polygon: Tensor
    """(N, E), int32: number of the polygon of each edge, counted over the image from 0."""
    first_edge: Tensor
    """(N, G + 1), int32: where the edges of each object begin, the last entry where those of the last object end;
    beyond `num_objects` all entries are that end."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def to(self, device: torch.device) -> PaddedBatch:
        """A copy on a device; from page-locked memory without waiting."""
        return PaddedBatch(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()))

    def pin_memory(self) -> PaddedBatch:
        """A copy in page-locked memory; torch's loader calls it."""
        return PaddedBatch(*(tensor.pin_memory() for tensor in self.tensors()))

    def copy_(self, other: PaddedBatch) -> None:
        """Overwrites this batch with one of the same shapes, without waiting."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs, non_blocking=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """What a captured step is good for: N, H, W, G, E."""
        images, _, height, width = self.images.shape
        return images, height, width, self.boxes.shape[1], self.edges.shape[1]
