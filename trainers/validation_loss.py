"""The training losses on the validation images: detectron2's own functions, without augmentation, on the same samples.

The model is in training mode except for batch norm, which uses its running statistics, as in an evaluation. Each image
is a batch of its own, and what is sampled on it is a function of the seed and its place in the validation set. So the
losses are a function of weights and seed: not of the batch, the workers, or what was trained before. Nothing of the
model is changed. They are computed in fp32, as detections are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from trainers.contract.plan import TrialPlan
from trainers.loading import validation_loss_loader, validation_loss_records
from trainers.passes import step_seed

logger = logging.getLogger(__name__)

NORMALIZER_SHARE = 0.1
"""What a batch adds to the running normaliser of a dense detector (detectron2, `DenseDetector._ema_update`)."""


class ValidationLoss:
    """This worker's share of the validation images that training could use, and the mean over all shares."""

    def __init__(self, cfg: CfgNode, plan: TrialPlan) -> None:
        self._seed = plan.seed
        self._places, self._loader = validation_loss_loader(cfg, plan, validation_loss_records(cfg, plan))

    @torch.no_grad()
    def run(self, model: nn.Module) -> dict[str, float]:
        """The losses of a model that is not wrapped for several workers; all of them call it together.

        Returns:
            On rank 0 the means over the images by detectron2's name, and their sum as `total_loss`; nothing where one
            is not finite. A dense detector divides by positive anchors: its losses are the sums over all images, over
            all of their positive anchors. On other ranks nothing.
        """
        rows: list[torch.Tensor] = []
        names: list[str] = []
        try:
            with _undisturbed(model) as dense:
                for place, batch in zip(self._places, self._loader, strict=True):
                    torch.manual_seed(step_seed(self._seed, 0, place))
                    if dense:
                        dense.loss_normalizer = 0.0
                    losses = model(batch.inputs)
                    names = names or list(losses)
                    normalizer = dense.loss_normalizer if dense else 1.0
                    weight = normalizer / NORMALIZER_SHARE if dense else 1.0  # positive anchors, or an image
                    values = torch.stack([losses[name].double() for name in names]) * normalizer
                    rows.append(torch.cat([values, values.new_tensor([weight])]))
        except FloatingPointError as error:  # detectron2's word for predictions that are not finite
            logger.warning("there is no validation loss: %s", error)
            rows, names = [torch.full((1,), math.nan)], []
        shares = comm.gather((names, torch.stack(rows).tolist() if rows else []), dst=0)
        return _means(shares) if comm.is_main_process() else {}


def _means(shares: list[tuple[list[str], list[list[float]]]]) -> dict[str, float]:
    """The sums of all workers' rows over the sum of their weights, exactly the same for any number of workers."""
    names = next((each for each, _ in shares if each), [])
    rows = [row for _, each in shares for row in each]
    if not rows or not all(map(math.isfinite, (value for row in rows for value in row))):
        return {}
    *sums, weight = (math.fsum(column) for column in zip(*rows, strict=True))
    means = {name: value / weight for name, value in zip(names, sums, strict=True)}
    return {**means, "total_loss": math.fsum(means.values())}


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[DenseDetector | None]:
    """Training mode, after which the model and all generators are as before; gives the dense detector, if it is one."""
    was_training, numpy_state = model.training, np.random.get_state()
    norms = get_bn_modules(model.train())
    dense = next((module for module in model.modules() if isinstance(module, DenseDetector)), None)
    normalizer = getattr(dense, "loss_normalizer", None)
    try:
        for norm in norms:
            norm.eval()
        device = next(model.parameters()).device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            EventStorage(),
        ):  # nobody reads the storage
            yield dense
    finally:
        model.train(was_training)
        np.random.set_state(numpy_state)
        if dense and normalizer is None:
            del dense.loss_normalizer
        elif dense:
            dense.loss_normalizer = normalizer
