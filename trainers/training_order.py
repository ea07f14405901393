"""The training order: which images come in which batches, decided on indices before anything is read.

They are the batches that detectron2's samplers with `AspectRatioGroupedDataset` give for the same seed. The order is a
function of data, settings, seed and planned world size alone, so that a resumed run skips to its place at no cost, and
one that goes on with another number of workers repeats and leaves out nothing: a worker that stands for several planned
ones trains the batches of each.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)

Place = tuple[int, int]
"""Position in the training order over all workers, and index of the image."""

Draw = Callable[[torch.Generator], torch.Tensor]
"""The images of the next epoch before they are shuffled, as indices; may draw from the order's generator."""


class Epoch(NamedTuple):
    """One pass over the training data: which images it shows, and how often."""

    num_images: int
    """Images of it, repeats counted; the rounded mean where it differs from epoch to epoch."""
    draw: Draw


def training_epoch(cfg: CfgNode, records: Sequence[dict[str, Any]], seed: int) -> Epoch:
    """What `DATALOADER.SAMPLER_TRAIN` makes of the training images: an epoch of detectron2's sampler of that name."""
    sampler, size = cfg.DATALOADER.SAMPLER_TRAIN, len(records)
    if sampler == "RepeatFactorTrainingSampler":
        epoch = repeated(
            RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
            )
        )
    elif sampler == "RandomSubsetTrainingSampler":
        epoch = random_subset(size, cfg.DATALOADER.RANDOM_SUBSET_RATIO, seed)
    else:
        epoch = whole(size)
    logger.info("%s: an epoch has %d images, of %d.", sampler, epoch.num_images, size)
    return epoch


def whole(size: int) -> Epoch:
    """Every image once."""
    indices = torch.arange(size)
    return Epoch(size, lambda _: indices)


def repeated(factors: torch.Tensor) -> Epoch:
    """Each image as often as its factor says, (N,); a fraction is the chance of one more in an epoch."""
    certain = factors.trunc()

    def draw(generator: torch.Generator) -> torch.Tensor:
        counts = certain + (torch.rand(len(factors), generator=generator) < factors - certain)
        return torch.repeat_interleave(counts.long())

    return Epoch(round(factors.sum().item()), draw)


def random_subset(size: int, ratio: float, seed: int) -> Epoch:
    """The same share of the images in every epoch, at least one, chosen by the seed."""
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: max(1, int(size * ratio))]
    return Epoch(len(chosen), lambda _: chosen)


class TrainingOrder(Sampler[list[Place]]):
    """The endless sequence of the batches of one worker, or of several that it stands for: step by step.

    Args:
        draw: The images of each epoch.
        wide: For each image, whether it is wider than high; a batch holds only one of the two kinds.
        batch_size: Images of a step on a planned worker.
        seed: Seed of the shuffles, the same on all workers.
        rank: The first planned worker whose batches these are.
        world_size: Number of planned workers.
        skip: Steps that were trained already.
        parts: Batches into which the images of such a worker's step are cut, in their order; divides `batch_size`.
        num_ranks: Planned workers, from `rank` on, whose batches follow each other in a step.
    """

    def __init__(
        self,
        draw: Draw,
        wide: Sequence[bool],
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        skip: int = 0,
        parts: int = 1,
        num_ranks: int = 1,
    ) -> None:
        self.draw, self.wide, self.batch_size, self.seed = draw, wide, batch_size, seed
        self.rank, self.world_size, self.skip, self.parts = rank, world_size, skip, parts
        self.num_ranks = num_ranks

    def __iter__(self) -> Iterator[list[Place]]:
        size = self.batch_size // self.parts
        for step in itertools.islice(self._steps(), self.skip, None):
            yield from (step[first : first + size] for first in range(0, len(step), size))

    def _steps(self) -> Iterator[list[Place]]:
        """The images of each step, planned worker by planned worker."""
        places = enumerate(self._indices())
        own = itertools.compress(places, itertools.cycle(self._is_own()))
        buckets: list[tuple[list[Place], list[Place]]] = [([], []) for _ in range(self.num_ranks)]
        full: list[deque[list[Place]]] = [deque() for _ in range(self.num_ranks)]
        for number, place in zip(itertools.cycle(range(self.num_ranks)), own, strict=False):
            bucket = buckets[number][self.wide[place[1]]]
            bucket.append(place)
            if len(bucket) == self.batch_size:
                full[number].append(bucket.copy())
                bucket.clear()
                if all(full):
                    yield [place for batches in full for place in batches.popleft()]

    def _is_own(self) -> list[bool]:
        return [self.rank <= rank < self.rank + self.num_ranks for rank in range(self.world_size)]

    def _indices(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.seed)
        while True:
            images = self.draw(generator)
            yield from images[torch.randperm(len(images), generator=generator)].tolist()
