"""Training and evaluation data: the images, and the loaders that read them in their order.

Every random choice of an image's augmentation is a function of the seed and its place in the training order. So a run
that was killed sees each image exactly as an undisturbed one does, whatever the number of loader processes.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data.build import filter_images_with_few_keypoints
from detectron2.data.samplers import InferenceSampler
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainers.batching import Batch, Collation, DevicePrefetch, Record
from trainers.contract.memory import is_out_of_memory
from trainers.contract.plan import PREFETCHED_BATCHES, DatasetPlan, TrialPlan
from trainers.dataset_cache import cached_records, image_sizes
from trainers.speedups.canvases import choose_canvases
from trainers.speedups.fast_mapper import FastMapper
from trainers.speedups.fixed_rcnn import unsupported
from trainers.speedups.mask_targets import pack
from trainers.speedups.packing import Packer, capacities
from trainers.training_order import Epoch, Place, TrainingOrder

logger = logging.getLogger(__name__)

Mapper = Callable[[Record], Record | None]
"""detectron2's DatasetMapper, or one with its interface: from a record to the model's input."""


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
    """Reads, augments and returns the image at a place of the training order; `collation` makes batches of them."""

    def __init__(
        self, records: Sequence[Record], mapper: Mapper, seed: int, collation: Collation | None = None
    ) -> None:
        self.records, self.mapper, self.seed = records, mapper, seed
        self.collation = collation or Collation()

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


def training_records(cfg: CfgNode, plan: TrialPlan) -> Sequence[Record]:
    """The training images, without those of no usable object where the config says so; ValueError if none is left.

    A model of keypoints leaves out images with few of them (`MIN_KEYPOINTS_PER_IMAGE`), as in detectron2.
    """
    return _usable_records(cfg, plan, plan.train, cfg.DATASETS.TRAIN)


def validation_loss_records(cfg: CfgNode, plan: TrialPlan) -> Sequence[Record]:
    """The validation images that would be trained on, if they were training images; ValueError if there is none."""
    return _usable_records(cfg, plan, plan.val, cfg.DATASETS.TEST)


def _usable_records(cfg: CfgNode, plan: TrialPlan, dataset: DatasetPlan, names: Sequence[str]) -> Sequence[Record]:
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    records: Sequence[Record]
    if plan.recipe.cached_annotations:
        records = cached_records(dataset, filter_empty)
    else:
        try:
            records = get_detection_dataset_dicts(names, filter_empty=filter_empty)
        except AssertionError as error:  # detectron2's way of saying that there are none
            raise ValueError(f"{dataset.name}: no image with a usable object: {error}") from error
    min_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    if min_keypoints > 0 and records:
        records = filter_images_with_few_keypoints(records, min_keypoints)
    if not records:
        raise ValueError(f"{dataset.name}: no image with a usable object: every image is empty or holds crowds only")
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


def training_images(cfg: CfgNode, plan: TrialPlan, records: Sequence[Record], model: nn.Module) -> TrainingImages:
    """The images of `training_records`, read by the recipe's mapper, and their batches as the model takes them."""
    mapper = build_mapper(cfg, plan, is_train=True)
    return TrainingImages(records, mapper, plan.seed, _collation(cfg, plan, records, model))


def _collation(cfg: CfgNode, plan: TrialPlan, records: Sequence[Record], model: nn.Module) -> Collation:
    divisibility: int = getattr(getattr(model, "backbone", None), "size_divisibility", 0)
    if not plan.recipe.has_fixed_shapes(plan.device):
        return Collation(divisibility)
    if reason := unsupported(model):
        return Collation(divisibility, eager_reason=reason)
    canvases = choose_canvases(cfg, image_sizes(records), plan.batch_per_worker, divisibility)
    packer = Packer(tuple(canvases), *capacities(records), with_masks=cfg.MODEL.MASK_ON)
    logger.info(
        "fixed_shapes: batches are padded to %s, with room for %d objects and %d edges of polygons in an image.",
        ", ".join(f"{height} x {width}" for height, width in canvases), packer.max_objects, packer.max_edges,
    )  # fmt: skip
    return Collation(divisibility, packer)


def training_loader(
    cfg: CfgNode, plan: TrialPlan, images: TrainingImages, epoch: Epoch, rank: int, skip: int, num_processes: int
) -> Iterable[Batch]:
    """The endless batches of one worker after the first `skip` steps, in the order of the images' seed.

    With fewer workers than planned, a step has those of every worker that this one stands for.

    With no processes, they are read in this one.
    """
    sizes = image_sizes(images.records)
    wide = (sizes[:, 1] > sizes[:, 0]) & bool(cfg.DATALOADER.ASPECT_RATIO_GROUPING)
    batch_size = plan.batch_per_worker * plan.accumulate
    order = TrainingOrder(
        epoch.draw,
        wide.tolist(),
        batch_size,
        images.seed,
        rank * plan.stands_for,
        plan.planned_workers,
        skip,
        plan.accumulate,
        plan.stands_for,
    )
    pinned = plan.recipe.pinned_loader and plan.device == "cuda"
    loader: Iterable[Batch] = DataLoader(
        images,
        batch_sampler=order,
        num_workers=num_processes,
        collate_fn=images.collation,
        pin_memory=pinned,
        prefetch_factor=PREFETCHED_BATCHES if num_processes else None,
    )
    if pinned or (images.collation.packer and plan.device == "cuda"):
        return DevicePrefetch(loader, torch.device("cuda", torch.cuda.current_device()))
    return loader


def evaluation_loader(cfg: CfgNode, plan: TrialPlan, records: Sequence[Record]) -> Iterable[Batch]:
    """This worker's share of the validation images, in batches of one as in detectron2 or of one size.

    They are read while others are detected on: by loader processes, and copied to a GPU ahead of their turn.
    """
    batches = batches_of_a_size(InferenceSampler(len(records)), image_sizes(records), plan.recipe.evaluation_batch)
    images = EvaluationImages(records, build_mapper(cfg, plan, is_train=False))
    # detectron2's test-time augmentation transforms images on the host.
    return _validation_loader(plan, images, batches, on_device=not cfg.TEST.AUG.ENABLED)


def validation_loss_loader(
    cfg: CfgNode, plan: TrialPlan, records: Sequence[Record]
) -> tuple[Sequence[int], Iterable[Batch]]:
    """This worker's share of `validation_loss_records` one by one, with their objects but not augmented.

    Returns:
        Their places among the records, and the batches.
    """
    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.MIN_SIZE_TRAIN, plain.INPUT.MAX_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST
    plain.INPUT.MIN_SIZE_TRAIN_SAMPLING, plain.INPUT.RANDOM_FLIP, plain.INPUT.CROP.ENABLED = "choice", "none", False
    images = EvaluationImages(records, build_mapper(plain, plan, is_train=True))
    places = list(InferenceSampler(len(records)))
    return places, _validation_loader(plan, images, [[place] for place in places], on_device=True)


def _validation_loader(
    plan: TrialPlan, images: EvaluationImages, batches: list[list[int]], *, on_device: bool
) -> Iterable[Batch]:
    pinned = plan.recipe.pinned_loader and plan.device == "cuda"
    loader: Iterable[Batch] = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=plan.loader_workers,
        collate_fn=Collation(),
        pin_memory=pinned,
        persistent_workers=plan.loader_workers > 0,
    )
    if pinned and on_device:
        return DevicePrefetch(loader, torch.device("cuda", torch.cuda.current_device()))
    return loader


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
