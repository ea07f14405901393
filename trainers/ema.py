"""A running average of a model's weights, which is evaluated instead of them or as well (`protocol.ema`).

The average is exponential, as that of detectron2's relatives (d2go's `MODEL_EMA`) and of torch's own
`swa_utils.get_ema_multi_avg_fn`, which computes it. Buffers, such as the statistics of batch norm, are averaged too,
and the first updates forget faster: an average over 5,000 steps would otherwise be mostly of the start weights for as
long. It costs the memory of the weights a second time, on the device and in checkpoints, and one pass over them after
each step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

HASTE = 9
"""After n updates the decay is at most n / (n + HASTE), so that the average is over a tenth of the steps so far."""


class WeightAverage:
    """The average of a model's weights, begun with those after the first update.

    Args:
        model: Not wrapped for several workers; its weights must be written in place.
        decay: What is kept of the average in an update, between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model)
        """A model with the averaged weights, to be evaluated; in training mode, as `model`."""
        self._decay, self._num_updates = decay, 0
        mine, theirs = self.model.state_dict(), model.state_dict()
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        fixed = {name for name, _ in model.named_parameters()} - trained
        names = [name for name in theirs if name not in fixed]
        self._averaged = [(mine[name], theirs[name]) for name in names if theirs[name].is_floating_point()]
        self._copied = [(mine[name], theirs[name]) for name in names if not theirs[name].is_floating_point()]
        modules = zip(self.model.modules(), model.modules(), strict=True)
        self._dense = [(own, other) for own, other in modules if isinstance(other, DenseDetector)]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights as they are now into the average, without waiting for the device."""
        decay = min(self._decay, self._num_updates / (self._num_updates + HASTE))
        averages, weights = map(list, zip(*self._averaged, strict=True))
        get_ema_multi_avg_fn(decay)(averages, weights, self._num_updates)
        for own, other in self._copied:
            own.copy_(other)
        for own, other in self._dense:
            if hasattr(other, "loss_normalizer"):  # by which it divides its losses, also those on validation images
                own.loss_normalizer = other.loss_normalizer
        self._num_updates += 1

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"model": self.model.state_dict(), "num_updates": self._num_updates}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.model.load_state_dict(state["model"])
        self._num_updates = state["num_updates"]


def evaluated_models(model: nn.Module, average: WeightAverage | None, *, both: bool) -> list[nn.Module]:
    """What each evaluation evaluates: the model, its average, or first the average and then the model."""
    if average is None:
        return [model]
    return [average.model, model] if both else [average.model]
