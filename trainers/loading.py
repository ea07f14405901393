"""Training and evaluation data: which image comes when, and the loader that reads it.

The training order is decided on indices, before anything is read: the same images in the same batches as detectron2's
`TrainingSampler` with `AspectRatioGroupedDataset` gives for the seed, but a resumed run skips to its place at no cost,
and every random choice of an image's augmentation is a function of the seed and its place in the order. So a run that
was killed sees each image exactly as an undisturbed one does, whatever the number of loader processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data.samplers import InferenceSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from trainers.contract import TrialPlan

Record = dict[str, Any]
"""One image in detectron2's dataset format."""

Place = tuple[int, int]
"""Position in the training order over all workers, and index of the image."""


class BadInputError(ValueError):
    """An image or its annotations cannot be used.

    Attributes:
        image_file: The image.
    """

    def __init__(self, image_file: str, problem: str) -> None:
        super().__init__(image_file, problem)
        self.image_file = image_file

    def __str__(self) -> str:
        return f"{self.image_file}: {self.args[1]}"


class TrainingOrder(Sampler[list[Place]]):
    """The endless sequence of one worker's batches.

    Args:
        wide: For each image, whether it is wider than high; a batch holds only one of the two kinds.
        batch_size: Images per batch on this worker.
        seed: Seed of the shuffles, the same on all workers.
        rank: This worker.
        world_size: Number of workers.
        skip: Batches that were trained on already.
    """

    def __init__(
        self, wide: Sequence[bool], batch_size: int, seed: int, rank: int, world_size: int, skip: int = 0
    ) -> None:
        self.wide, self.batch_size, self.seed = wide, batch_size, seed
        self.rank, self.world_size, self.skip = rank, world_size, skip

    def __iter__(self) -> Iterator[list[Place]]:
        return itertools.islice(self._batches(), self.skip, None)

    def _batches(self) -> Iterator[list[Place]]:
        buckets: tuple[list[Place], list[Place]] = ([], [])
        for place in itertools.islice(enumerate(self._indices()), self.rank, None, self.world_size):
            bucket = buckets[self.wide[place[1]]]
            bucket.append(place)
            if len(bucket) == self.batch_size:
                yield bucket.copy()
                bucket.clear()

    def _indices(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.wide), generator=generator).tolist()


class TrainingImages(Dataset[Record]):
    """Reads, augments and returns the image at a place of the training order.

    Args:
        records: The images.
        mapper: detectron2's mapper or one that takes the same and gives the same.
        seed: Seed of the augmentations.
    """

    def __init__(self, records: Sequence[Record], mapper: Callable[[Record], Record | None], seed: int) -> None:
        self.records, self.mapper, self.seed = records, mapper, seed

    def __getitem__(self, place: Place) -> Record:
        position, index = place
        record = self.records[index]
        # detectron2's augmentations draw from NumPy's global generator.
        np.random.seed(np.random.SeedSequence((self.seed, position)).generate_state(4))
        try:
            mapped = self.mapper(record)
        except Exception as error:
            raise BadInputError(record["file_name"], f"{type(error).__name__}: {error}") from error
        if mapped is None:
            raise BadInputError(record["file_name"], "no usable annotation")
        return mapped

    def __len__(self) -> int:
        return len(self.records)


class EvaluationImages(Dataset[Record]):
    """Reads images for evaluation, in their order."""

    def __init__(self, records: Sequence[Record], mapper: Callable[[Record], Record | None]) -> None:
        self.records, self.mapper = records, mapper

    def __getitem__(self, index: int) -> Record:
        record = self.records[index]
        try:
            mapped = self.mapper(record)
        except Exception as error:
            raise BadInputError(record["file_name"], f"{type(error).__name__}: {error}") from error
        assert mapped is not None
        return mapped

    def __len__(self) -> int:
        return len(self.records)


def _as_list(batch: list[Record]) -> list[Record]:
    return batch


def training_records(cfg: CfgNode) -> list[Record]:
    """The training images, those without a usable object left out where the config says so.

    Raises:
        ValueError: None is left.
    """
    try:
        records: list[Record] = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
    except AssertionError as error:
        raise ValueError(f"{cfg.DATASETS.TRAIN[0]}: no image with a usable object: {error}") from error
    return records


def training_loader(
    cfg: CfgNode, plan: TrialPlan, records: Sequence[Record], rank: int, skip: int
) -> DataLoader[Record]:
    """The endless loader of one worker's training batches.

    Args:
        cfg: detectron2's config.
        plan: The trial.
        records: Images, from `training_records`.
        rank: This worker.
        skip: Iterations done already.
    """
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    order = TrainingOrder(
        [grouped and record["width"] > record["height"] for record in records],
        plan.batch_per_worker,
        plan.seed,
        rank,
        plan.world_size,
        skip,
    )
    return DataLoader(
        TrainingImages(records, DatasetMapper(cfg, is_train=True), plan.seed),
        batch_sampler=order,
        num_workers=plan.loader_workers,
        collate_fn=_as_list,
    )


def evaluation_loader(cfg: CfgNode, plan: TrialPlan, records: Sequence[Record]) -> DataLoader[Record]:
    """The loader of this worker's share of the validation images, one at a time as in detectron2."""
    return DataLoader(
        EvaluationImages(records, DatasetMapper(cfg, is_train=False)),
        sampler=InferenceSampler(len(records)),
        batch_size=1,
        num_workers=plan.loader_workers,
        collate_fn=_as_list,
    )
