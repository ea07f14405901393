"""Precise statistics of batch norm before an evaluation, as detectron2's `TEST.PRECISE_BN` asks for them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from trainers.contract.plan import TrialPlan
from trainers.loading import TrainingImages, training_loader
from trainers.passes import step_seed
from trainers.training_order import Epoch

logger = logging.getLogger(__name__)


def statistics_seed(seed: int, iteration: int) -> int:
    """Seed, 64 bits, of the images shown for the statistics after an iteration, and of their augmentation."""
    return int(np.random.SeedSequence((seed, iteration)).generate_state(1, np.uint64)[0])


def precise_batch_norm(
    cfg: CfgNode, plan: TrialPlan, model: nn.Module, images: TrainingImages, epoch: Epoch, rank: int
) -> Callable[[int], None] | None:
    """What gives a model in training mode precise statistics after an iteration; None where the config asks for none.

    As detectron2's hook does, it runs the model on `TEST.PRECISE_BN.NUM_ITER` augmented training batches and takes the
    mean and variance over all of them in place of the running ones. Here the batches are a function of seed and
    iteration, so that a resumed run repeats them, and what else the model counts while it trains stays as it was. With
    fewer workers than planned, they are those of the first worker that this one stands for.
    """
    settings = cfg.TEST.PRECISE_BN
    if not settings.ENABLED:
        return None
    if not get_bn_modules(model):
        logger.warning("TEST.PRECISE_BN: has no effect, this model has no batch norm layer that is trained.")
        return None

    first_rank, planned = rank * plan.stands_for, replace(plan, world_size=plan.planned_workers, stands_for=1)

    def update(iteration: int) -> None:
        seed = statistics_seed(plan.seed, iteration)
        shown = TrainingImages(images.records, images.mapper, seed)
        batches = training_loader(cfg, planned, shown, epoch, first_rank, 0, num_processes=plan.loader_workers)
        normalizers = {
            module: module.loss_normalizer
            for module in model.modules()
            if isinstance(module, DenseDetector) and hasattr(module, "loss_normalizer")
        }
        norms = get_bn_modules(model)
        running = [(norm.running_mean, norm.running_var) for norm in norms]
        torch.manual_seed(step_seed(seed, first_rank, iteration))
        with EventStorage():  # what the model logs meanwhile is of no use
            inputs = (batch.inputs for batch in itertools.islice(batches, settings.NUM_ITER))
            update_bn_stats(model, inputs, settings.NUM_ITER)
        for norm, (mean, variance) in zip(norms, running, strict=True):
            # fvcore puts other tensors in their place; a CUDA graph goes on with these.
            norm.running_mean, norm.running_var = mean.copy_(norm.running_mean), variance.copy_(norm.running_var)
        for module, normalizer in normalizers.items():
            module.loss_normalizer = normalizer

    return update
