"""The optimizer of a recipe: gradients clipped all at once, and one kernel for the whole update of SGD.

The trap this module protects against: torch's fused kernel for CPUs walks through memory and takes for granted that
weights, gradients and momenta lie there in the same order. Where one is channels-last and another is not (a momentum
from a checkpoint of another recipe), it adds up figures of different weights without a word (torch 2.14).
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.optim.sgd import sgd

from trainers.recipes import Recipe

VECTOR = 16
"""Numbers of 32 bits in the widest vector of a CPU (AVX-512)."""


def tune_optimizer(optimizer: torch.optim.Optimizer, cfg: CfgNode, recipe: Recipe) -> torch.optim.Optimizer:
    """Applies a recipe to detectron2's optimizer, in place; returns it.

    detectron2 clips by making a subclass whose `step` clips one parameter after the other, with some ten small
    operations each. The subclass is exchanged for one that clips all of them in three.
    """
    clips = cfg.SOLVER.CLIP_GRADIENTS
    found = type(optimizer)
    plain: Any = found.__mro__[1] if clips.ENABLED else found
    if recipe.fused_optimizer and issubclass(plain, torch.optim.SGD):
        plain = FusedSGD
        # The kernel can undo the scaling of float16 itself; but clipping comes before it, and needs true gradients.
        optimizer._step_supports_amp_scaling = not clips.ENABLED  # type: ignore[attr-defined]
    steps = {"step": found.step} if clips.ENABLED else {}
    if recipe.batched_clipping and clips.ENABLED and clips.CLIP_TYPE == "norm":

        def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            clip_each(gradients, clips.CLIP_VALUE, clips.NORM_TYPE)
            return plain.step(self, closure)

        steps = {"step": step}
    optimizer.__class__ = type(f"Tuned{plain.__name__}", (plain,), steps)
    return optimizer


@torch.no_grad()
def clip_each(gradients: list[Tensor], most: float, norm_type: float) -> None:
    """Scales each gradient, in place, to a norm of at most `most`, as `torch.nn.utils.clip_grad_norm_` does one by one.

    Args:
        gradients: Tensors of one dtype and device.
        most: Greatest norm.
        norm_type: Order of the norm.
    """
    if not gradients:
        return
    norms = torch._foreach_norm(gradients, norm_type)
    # One vector for all scales; 1e-6 keeps a gradient of zeros from dividing by zero (torch/nn/utils/clip_grad.py).
    scales = (most / (torch.stack(norms) + 1e-6)).clamp(max=1.0).to(gradients[0].dtype)
    if gradients[0].device.type == "cpu":  # looking at the scales is free here, and most of them are 1
        smaller = (scales != 1).nonzero()[:, 0]
        gradients, scales = [gradients[i] for i in smaller.tolist()], scales[smaller]
    if gradients:
        torch._foreach_mul_(gradients, scales.unbind())


class FusedSGD(torch.optim.SGD):
    """torch's SGD by its fused kernel, which is shown all tensors in the order of the weights' memory.

    On CPU the results are those of torch's other ways, bit for bit: the kernel rounds only once where a tensor ends in
    less than a whole vector of numbers, so such tensors (a few biases) are left to `foreach`.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates all weights that have a gradient; momenta are kept as torch's SGD keeps them."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            whole = [weight.device.type != "cpu" or weight.numel() % VECTOR == 0 for weight in weights]
            self._update(group, [weight for weight, fits in zip(weights, whole, strict=True) if fits], fused=True)
            self._update(group, [weight for weight, fits in zip(weights, whole, strict=True) if not fits], fused=False)
        return loss

    def _update(self, group: dict[str, Any], weights: list[Tensor], fused: bool) -> None:
        if group["momentum"]:
            for weight in weights:
                earlier = self.state[weight].get("momentum_buffer")
                # Adding to -0.0 changes no bit, so this is torch's first step; detectron2 never dampens it.
                momentum = torch.full_like(weight, -0.0) if earlier is None else as_laid_out(earlier, weight)
                self.state[weight]["momentum_buffer"] = momentum
        momenta = [self.state[weight].get("momentum_buffer") for weight in weights]
        sgd(
            [in_memory_order(weight, weight) for weight in weights],
            [in_memory_order(weight.grad, weight) for weight in weights if weight.grad is not None],
            [
                None if momentum is None else in_memory_order(momentum, w)
                for momentum, w in zip(momenta, weights, strict=True)
            ],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            fused=fused,
            foreach=not fused,
            grad_scale=getattr(self, "grad_scale", None) if fused else None,
            found_inf=getattr(self, "found_inf", None) if fused else None,
        )


def as_laid_out(tensor: Tensor, weight: Tensor) -> Tensor:
    """A tensor of a weight's shape in the weight's memory order; the same tensor where it is in that order."""
    return tensor.contiguous(memory_format=_order(weight))


def in_memory_order(tensor: Tensor, weight: Tensor) -> Tensor:
    """A view of `as_laid_out` whose elements follow each other in memory."""
    laid_out = as_laid_out(tensor, weight)
    return laid_out.permute(0, 2, 3, 1) if _order(weight) is torch.channels_last else laid_out


def _order(weight: Tensor) -> torch.memory_format:
    last = weight.dim() == 4 and not weight.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
