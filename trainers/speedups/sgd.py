"""The optimizer of a recipe: gradients clipped all at once, and one kernel for the whole update of SGD."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import Tensor, nn
from torch.optim.sgd import sgd

from trainers.recipes import Recipe

logger = logging.getLogger(__name__)

VECTOR_LENGTH = 16
"""Numbers of 32 bits in the widest vector of a CPU (AVX-512)."""


def build_tuned_optimizer(cfg: CfgNode, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """detectron2's optimizer as a recipe has it.

    detectron2 clips one parameter after the other in the optimizer's `step`, with some ten small operations each;
    `batched_clipping` does it for all of them in a hook before the step.
    """
    clips = cfg.SOLVER.CLIP_GRADIENTS
    batched_clipping = recipe.batched_clipping and clips.ENABLED and clips.CLIP_TYPE == "norm"
    if recipe.batched_clipping and clips.ENABLED and not batched_clipping:
        logger.info("batched_clipping: has no effect, detectron2 clips gradients by %s.", clips.CLIP_TYPE)
    without_clipping = cfg.clone()
    without_clipping.defrost()
    without_clipping.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer: torch.optim.Optimizer = build_optimizer(without_clipping, model)
    if recipe.fused_optimizer and type(optimizer) is torch.optim.SGD:
        optimizer = FusedSGD(optimizer.param_groups, **optimizer.defaults)
    if not batched_clipping:
        clipping: torch.optim.Optimizer = maybe_add_gradient_clipping(cfg, optimizer)
        return clipping

    def clip(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        clip_each(gradients, clips.CLIP_VALUE, clips.NORM_TYPE)

    optimizer.register_step_pre_hook(clip)
    return optimizer


@torch.no_grad()
def clip_each(gradients: list[Tensor], max_norm: float, norm_type: float) -> None:
    """Scales each gradient, in place, to a norm of `max_norm` at most: `torch.nn.utils.clip_grad_norm_` one by one.

    The gradients have one dtype and device.
    """
    if not gradients:
        return
    norms = torch.stack([torch.linalg.vector_norm(gradient, norm_type) for gradient in gradients])
    # 1e-6 keeps torch's own function from dividing by zero (torch/nn/utils/clip_grad.py).
    scales = (max_norm / (norms + 1e-6)).clamp(max=1.0).to(gradients[0].dtype)
    if scales.device.type == "cpu":  # looking at the scales is free here, and most of them are 1
        smaller = (scales != 1).nonzero()[:, 0]
        gradients, scales = [gradients[i] for i in smaller.tolist()], scales[smaller]
    for gradient, scale in zip(gradients, scales.unbind(), strict=True):
        gradient.mul_(scale)


class FusedSGD(torch.optim.SGD):
    """torch's SGD by its fused kernel, which is given all tensors in the order of the weights' memory.

    torch's fused kernel for CPUs takes for granted that weights, gradients and momenta lie in memory in the same order.
    Where one is channels-last and another is not (a momentum from a checkpoint of another recipe), it adds up figures
    of different weights without an error (torch 2.14).

    On CPU the results are those of torch's other ways, bit for bit: the kernel rounds only once where a tensor ends in
    less than a whole vector of numbers, so such tensors (a few biases) are left to `foreach`.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates all weights that have a gradient; momenta are stored as torch's SGD stores them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights: dict[bool, list[Tensor]] = {True: [], False: []}
            for weight in group["params"]:
                if weight.grad is not None:
                    weights[weight.device.type != "cpu" or weight.numel() % VECTOR_LENGTH == 0].append(weight)
            for fused in (True, False):
                self._update(group, weights[fused], fused)
        return loss

    def _update(self, group: dict[str, Any], weights: list[Tensor], fused: bool) -> None:
        momenta: list[Tensor | None] = [None] * len(weights)
        if group["momentum"]:
            for number, weight in enumerate(weights):
                earlier = self.state[weight].get("momentum_buffer")
                # Adding to -0.0 changes no bit, so this is torch's first step; detectron2 never dampens it.
                momentum = torch.full_like(weight, -0.0) if earlier is None else _as_laid_out(earlier, weight)
                self.state[weight]["momentum_buffer"] = momentum
                momenta[number] = _in_memory_order(momentum, weight)
        settings = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
        sgd(
            [_in_memory_order(weight, weight) for weight in weights],
            [_in_memory_order(weight.grad, weight) for weight in weights if weight.grad is not None],
            momenta,
            fused=fused,
            foreach=not fused,
            **{name: group[name] for name in settings},
        )


def _as_laid_out(tensor: Tensor, weight: Tensor) -> Tensor:
    """A tensor of a weight's shape in the weight's memory order; the same tensor where it is in that order."""
    memory_format = torch.channels_last if _is_channels_last(weight) else torch.contiguous_format
    return tensor.contiguous(memory_format=memory_format)


def _in_memory_order(tensor: Tensor, weight: Tensor) -> Tensor:
    """A view of `_as_laid_out` whose elements follow each other in memory."""
    laid_out = _as_laid_out(tensor, weight)
    return laid_out.permute(0, 2, 3, 1) if _is_channels_last(weight) else laid_out


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and not weight.is_contiguous()
