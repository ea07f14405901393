"""Named speed recipes: what each turns on. Standard library only, so that the driver can validate and print them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "amp", "bf16"]
Scorer = Literal["pycocotools", "hotcoco"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The switches of one way to train. Every switch can be set by itself in the experiment file.

    Attributes:
        precision: `fp32`; `amp` (float16 autocast with a gradient scaler, GPUs only); `bf16` (bfloat16 autocast).
        channels_last: Keep images, activations and convolution weights in NHWC memory order.
        scorer: Which COCO scorer computes the twelve figures; both give the same to 1e-6.
    """

    precision: Precision = "fp32"
    channels_last: bool = False
    scorer: Scorer = "pycocotools"


RECIPES: dict[str, Recipe] = {
    # detectron2's own numerics and its own parts.
    "reference": Recipe(),
    "fast": Recipe(precision="bf16", channels_last=True, scorer="hotcoco"),
}
