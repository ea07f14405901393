"""A training batch, what makes one of mapped images, and its way to the GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from trainers.speedups.canvases import padded
from trainers.speedups.packing import NotPackedError, Packer
from trainers.speedups.padded_batch import PaddedBatch

Record = dict[str, Any]
"""One image in detectron2's dataset format."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A training batch of one worker."""

    inputs: list[Record] | PaddedBatch
    """What the model is called with: mapped records, or tensors of fixed sizes."""
    image_files: tuple[str, ...]
    """Its images, in order; named where a step fails."""
    shape: tuple[int, int, int]
    """Images, and height and width to which they are padded."""
    wasted_pixels: int = 0
    """Pixels of a padded batch that detectron2's own padding would not have."""
    eager_reason: str | None = None
    """Why it has no fixed sizes; None where it has, and where nobody asks for them."""

    def __len__(self) -> int:
        return len(self.image_files)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; torch's loader calls it."""
        if isinstance(self.inputs, PaddedBatch):
            return replace(self, inputs=self.inputs.pin_memory())
        return replace(self, inputs=[{**record, "image": record["image"].pin_memory()} for record in self.inputs])

    def to(self, device: torch.device) -> Batch:
        """The batch with its images on a device; from page-locked memory without waiting."""
        if isinstance(self.inputs, PaddedBatch):
            return replace(self, inputs=self.inputs.to(device))
        copied = [{**record, "image": record["image"].to(device, non_blocking=True)} for record in self.inputs]
        return replace(self, inputs=copied)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps the memory of what `to` copied until this stream's work on it is done."""
        if isinstance(self.inputs, PaddedBatch):
            tensors = self.inputs.tensors()
        else:
            tensors = tuple(record["image"] for record in self.inputs)
        for tensor in tensors:
            tensor.record_stream(stream)


@dataclass(slots=True)
class BatchTally:
    """What the batches of several steps were like."""

    per_step: int = 1
    """Batches of a step."""
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    """Of each batch, in order."""
    wasted_pixels: int = 0
    eager: Counter[str] = field(default_factory=Counter)
    """Batches without fixed sizes, by the reason, where the recipe asks for them."""

    def add(self, batch: Batch) -> None:
        """Counts a batch."""
        self.shapes.append(batch.shape)
        self.wasted_pixels += batch.wasted_pixels
        if batch.eager_reason:
            self.eager[batch.eager_reason] += 1


class ShapesMet:
    """Which shapes of batches this process has met; `fixed`: whether the recipe asks for fixed ones."""

    def __init__(self, fixed: bool) -> None:
        self._fixed = fixed
        self._met: set[tuple[int, int, int]] = set()

    def fields(self, tally: BatchTally) -> dict[str, Any]:
        """The fields of `StepsDone` on the batches of the next window of steps."""
        new_shapes = {}
        for number, shape in enumerate(tally.shapes):
            if shape not in self._met:
                self._met.add(shape)
                new_shapes[" x ".join(map(str, shape))] = number // tally.per_step
        return {
            "new_shapes": new_shapes,
            "pixels": sum(math.prod(shape) for shape in tally.shapes),
            "wasted_pixels": tally.wasted_pixels,
            "eager_batches": dict(tally.eager) if self._fixed else None,
            "batches_per_step": tally.per_step,
        }


@dataclass(frozen=True, slots=True)
class Collation:
    """Makes batches of mapped records: padded ones where the recipe asks for them and it can be done."""

    divisibility: int = 0
    """What detectron2 pads the sides to multiples of: the backbone's `size_divisibility`."""
    packer: Packer | None = None
    eager_reason: str | None = None
    """Why there is no packer; None where nobody asks for one."""

    def __call__(self, records: list[Record]) -> Batch:
        """A batch of one or more records."""
        files = tuple(record["file_name"] for record in records)
        sizes = np.array([record["image"].shape[-2:] for record in records], dtype=np.int64)
        height, width = padded(sizes.max(axis=0), self.divisibility).tolist()
        reason = self.eager_reason
        if self.packer:
            try:
                packed = self.packer.pack(records)
            except NotPackedError as error:
                reason = str(error)
            else:
                count, _, *canvas = packed.images.shape
                wasted = count * (canvas[0] * canvas[1] - height * width)
                return Batch(packed, files, (count, canvas[0], canvas[1]), wasted)
        return Batch(records, files, (len(records), height, width), eager_reason=reason)


class DevicePrefetch(Iterable[Batch]):
    """Batches that are on the GPU already: copied during the previous step, on a separate stream."""

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device)
        ahead: Batch | None = None
        for batch in self.batches:
            with torch.cuda.stream(stream):
                copied = batch.to(self.device)
            if ahead is not None:
                yield ahead
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            # The memory belongs to the copying stream, which may reuse it only after this stream's work on it.
            copied.record_stream(current)
            ahead = copied
        if ahead is not None:
            yield ahead
