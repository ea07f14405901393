"""Training and evaluation data: the images, and the loaders that read them in their order.

Every random choice of an image's augmentation is a function of the seed and its place in the training order. So a run
that was killed sees each image exactly as an undisturbed one does, whatever the number of loader processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data.build import filter_images_with_few_keypoints
from detectron2.data.samplers import InferenceSampler
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from trainers.contract.memory import is_out_of_memory
from trainers.contract.plan import PREFETCHED_BATCHES, TrialPlan
from trainers.dataset_cache import cached_records, image_sizes
from trainers.speedups.fast_mapper import FastMapper
from trainers.speedups.mask_targets import pack
from trainers.speedups.padded_batch import PaddedBatch
from trainers.training_order import Epoch, Place, TrainingOrder

Record = dict[str, Any]
"""One image in detectron2's dataset format."""

Mapper = Callable[[Record], Record | None]
"""detectron2's DatasetMapper, or one with its interface: from a record to the model's input."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A training batch of one worker."""

    inputs: list[Record] | PaddedBatch
    """What the model is called with: mapped records, or tensors of fixed sizes."""
    image_files: tuple[str, ...]
    """Its images, in order; named where a step fails."""

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


def _as_batch(records: list[Record]) -> Batch:
    return Batch(records, tuple(record["file_name"] for record in records))


class BadInputError(ValueError):
    """An image or its annotations cannot be used.

    Its only argument is the message: a loader process passes on an exception as its type and its text, and one that
    cannot be rebuilt from these becomes a RuntimeError.
    """

    @classmethod
    def of(cls, image_file: str, problem: str) -> BadInputError:
        """The error for an image and a problem with it."""
        return cls(f"image {json.dumps(image_file)}: {problem}")

    @property
    def image_file(self) -> str:
        """The image; empty where the message names none."""
        named = re.search(r'image ("(?:[^"\\]|\\.)*"):', str(self))
        return str(json.loads(named[1])) if named else ""


def augmentation_seed(seed: int, position: int) -> NDArray[np.uint32]:
    """Seed, 4 words of 32 bits, of one image's augmentation by its position in the training order of all workers."""
    return np.asarray(np.random.SeedSequence((seed, position)).generate_state(4), dtype=np.uint32)


class TrainingImages(Dataset[Record]):
    """Reads, augments and returns the image at a place of the training order."""

    def __init__(self, records: Sequence[Record], mapper: Mapper, seed: int) -> None:
        self.records, self.mapper, self.seed = records, mapper, seed

    def __getitem__(self, place: Place) -> Record:
        position, index = place
        # detectron2's augmentations draw from NumPy's global generator.
        np.random.seed(augmentation_seed(self.seed, position))
        return _mapped(self.mapper, self.records[index])

    def __len__(self) -> int:
        return len(self.records)


class EvaluationImages(Dataset[Record]):
    """Reads images for evaluation, in their order."""

    def __init__(self, records: Sequence[Record], mapper: Mapper) -> None:
        self.records, self.mapper = records, mapper

    def __getitem__(self, index: int) -> Record:
        return _mapped(self.mapper, self.records[index])

    def __len__(self) -> int:
        return len(self.records)


def _mapped(mapper: Mapper, record: Record) -> Record:
    try:
        mapped = mapper(record)
    except ImportError:  # no fault of the image
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise BadInputError.of(record["file_name"], f"{type(error).__name__}: {error}") from error
    if mapped is None:
        raise BadInputError.of(record["file_name"], "no usable annotation")
    return mapped


def _as_list(batch: list[Record]) -> list[Record]:
    return batch


def training_records(cfg: CfgNode, plan: TrialPlan) -> Sequence[Record]:
    """The training images, without those of no usable object where the config says so; ValueError if none is left.

    A model of keypoints leaves out images with few of them (`MIN_KEYPOINTS_PER_IMAGE`), as in detectron2.
    """
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    records: Sequence[Record]
    if plan.recipe.cached_annotations:
        records = cached_records(plan.train, filter_empty)
    else:
        try:
            records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=filter_empty)
        except AssertionError as error:  # detectron2's way of saying that there are none
            raise ValueError(f"{plan.train.name}: no image with a usable object: {error}") from error
    min_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    if min_keypoints > 0 and records:
        records = filter_images_with_few_keypoints(records, min_keypoints)
    if not records:
        raise ValueError(f"{plan.train.name}: no image with a usable object: every image is empty or holds crowds only")
    return records


def evaluation_records(cfg: CfgNode, plan: TrialPlan) -> Sequence[Record]:
    """All validation images."""
    if plan.recipe.cached_annotations:
        return cached_records(plan.val, filter_empty=False)
    records: list[Record] = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=False)
    return records


def build_mapper(cfg: CfgNode, plan: TrialPlan, is_train: bool) -> Mapper:
    """The recipe's mapper."""
    recipe = plan.recipe
    if recipe.mapper != "detectron2":
        return FastMapper(cfg, is_train, recipe.packed_masks, exact_pixels=recipe.mapper == "exact")
    mapper: Mapper = DatasetMapper(cfg, is_train=is_train)
    return PackingMapper(mapper) if is_train and recipe.packed_masks else mapper


class PackingMapper:
    """Packs the masks of another mapper's records."""

    def __init__(self, mapper: Mapper) -> None:
        self.mapper = mapper

    def __call__(self, record: Record) -> Record | None:
        """Maps one image's record."""
        mapped = self.mapper(record)
        if mapped is not None and "instances" in mapped:
            pack(mapped["instances"])
        return mapped


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


def training_images(cfg: CfgNode, plan: TrialPlan, records: Sequence[Record]) -> TrainingImages:
    """The images of `training_records`, read by the recipe's mapper."""
    return TrainingImages(records, build_mapper(cfg, plan, is_train=True), plan.seed)


def training_loader(
    cfg: CfgNode, plan: TrialPlan, images: TrainingImages, epoch: Epoch, rank: int, skip: int, num_processes: int
) -> Iterable[Batch]:
    """The endless batches of one worker after the first `skip`, in the order of the images' seed.

    With no processes, they are read in this one.
    """
    sizes = image_sizes(images.records)
    wide = (sizes[:, 1] > sizes[:, 0]) & bool(cfg.DATALOADER.ASPECT_RATIO_GROUPING)
    batch_size, world_size = plan.batch_per_worker, plan.world_size
    order = TrainingOrder(epoch.draw, wide.tolist(), batch_size, images.seed, rank, world_size, skip)
    pinned = plan.recipe.pinned_loader and plan.device == "cuda"
    loader: Iterable[Batch] = DataLoader(
        images,
        batch_sampler=order,
        num_workers=num_processes,
        collate_fn=_as_batch,
        pin_memory=pinned,
        prefetch_factor=PREFETCHED_BATCHES if num_processes else None,
    )
    return DevicePrefetch(loader, torch.device("cuda", torch.cuda.current_device())) if pinned else loader


def evaluation_loader(cfg: CfgNode, plan: TrialPlan, records: Sequence[Record]) -> DataLoader[Record]:
    """The loader of this worker's share of the validation images, in batches of one as in detectron2 or of one size."""
    batches = batches_of_a_size(InferenceSampler(len(records)), image_sizes(records), plan.recipe.evaluation_batch)
    return DataLoader(
        EvaluationImages(records, build_mapper(cfg, plan, is_train=False)),
        batch_sampler=batches,
        num_workers=plan.loader_workers,
        collate_fn=_as_list,
        pin_memory=plan.recipe.pinned_loader and plan.device == "cuda",
        persistent_workers=plan.loader_workers > 0,
    )


def batches_of_a_size(indices: Iterable[int], sizes: NDArray[np.int32], max_batch: int) -> list[list[int]]:
    """Images in batches of up to `max_batch`, in the order in which batches fill.

    Only images of one size go together: padding one to another's size would change what is detected near its border.
    """
    open_batches: dict[tuple[int, ...], list[int]] = {}
    batches: list[list[int]] = []
    for index in indices:
        size = tuple(sizes[index].tolist())
        batch = open_batches.setdefault(size, [])
        batch.append(index)
        if len(batch) == max_batch:
            batches.append(open_batches.pop(size))
    return batches + list(open_batches.values())
