"""Folds frozen batch norm into the convolution before it: two passes over each feature map less, in both directions.

A frozen norm multiplies a channel by a constant and adds another. Multiplying the channel's weights instead is the same
but for rounding, and so are the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor
from torch.nn.functional import conv2d


@dataclass(frozen=True, slots=True)
class Folded:
    """What stays the same in training."""

    scale: Tensor
    """(O, 1, 1, 1), in the dtype of the weights."""
    shift: Tensor
    """(O,), in the dtype that is computed in."""
    weight: Tensor | None
    """The folded weight, in the dtype that is computed in; None where it is trained."""


class FoldedConv2d(Conv2d):
    """detectron2's `Conv2d` with a `FrozenBatchNorm2d`, which is folded in training; evaluation is detectron2's.

    The constants are made in the first step and kept outside the state dict. Loading weights (`load_state_dict`)
    overwrites them in place, so that also a captured CUDA graph reads the new ones.
    """

    folded: dict[torch.dtype, Folded] | None = None
    """By the dtype that is computed in; none is ever dropped, because a captured CUDA graph may read it."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) convolved, normalized and activated."""
        if not self.training:
            result: Tensor = super().forward(x)
            return result
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        if self.folded is None:
            self.folded = {}
            self.register_load_state_dict_post_hook(_fold_again)
        if dtype not in self.folded:
            self.folded[dtype] = _fold(self, dtype)
        folded = self.folded[dtype]
        weight = _Scale.apply(self.weight, folded.scale, dtype) if folded.weight is None else folded.weight
        x = conv2d(x, weight, folded.shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def folded_conv(_name: str, conv: Conv2d) -> type[Conv2d] | None:
    """The class that computes a convolution's results; None for one whose norm is not frozen, or that has a bias."""
    return FoldedConv2d if type(conv.norm) is FrozenBatchNorm2d and conv.bias is None else None


@torch.no_grad()
def _fold(conv: Conv2d, dtype: torch.dtype) -> Folded:
    norm = conv.norm
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = (norm.bias - norm.running_mean * scale).to(dtype)
    scale = scale.view(-1, 1, 1, 1)
    return Folded(scale, shift, None if conv.weight.requires_grad else (conv.weight * scale).to(dtype))


def _fold_again(conv: Conv2d, _incompatible_keys: object) -> None:
    for dtype, current in conv.folded.items():
        new = _fold(conv, dtype)
        current.scale.copy_(new.scale)
        current.shift.copy_(new.shift)
        if current.weight is not None:
            current.weight.copy_(new.weight)


class _Scale(torch.autograd.Function):
    """The product of weights and a scale in another dtype: one kernel, where a product and a cast were two."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None
