"""Named speed recipes: what each turns on. Standard library only, so that the driver can validate and print them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Precision = Literal["fp32", "amp", "bf16", "auto"]
Scorer = Literal["pycocotools", "hotcoco"]
Mapper = Literal["detectron2", "exact", "fast"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The switches of one way to train. Every switch can be set by itself in the experiment file.

    The defaults are detectron2's own parts. What each switch gains is measured in docs/performance.md.

    Attributes:
        precision: `fp32`; `amp` (float16 autocast with a gradient scaler, GPUs only); `bf16` (bfloat16 autocast);
            `auto`: bf16 where the device computes in it (GPUs since Ampere, CPUs with AVX512-BF16 or AMX), else amp on
            a GPU and fp32 on a CPU, where bf16 would be emulated and slower.
        tf32: Let GPUs multiply matrices and convolve in TF32 (Ampere and later). Changes numerics.
        channels_last: Keep images, activations and convolution weights in NHWC memory order. Rounding.
        compile: Compile the backbone with `torch.compile` at the first step: tens of seconds, and again for each new
            image size. Rounding.
        winograd: On CPU, convolutions with fewer multiplications (trainers/convolution.py); needs `channels_last` and
            fp32. Rounding.
        sparse_pooling: On CPU, ROIAlign as one sparse product (trainers/roi_pooling.py). Rounding.
        mapper: Who reads and augments images: detectron2; trainers/fast_mapper.py with its pixels (`exact`: the
            same records); all of it (`fast`: one grey level at most).
        packed_masks: Draw mask targets an image at a time (trainers/mask_targets.py). The same, bit for bit.
        cached_annotations: Keep parsed annotations in a mapped file (trainers/dataset_cache.py). The same records.
        batched_clipping: Clip all gradients at once instead of one by one. The same, bit for bit.
        fused_optimizer: One kernel for the whole update of SGD. On CPU the same, bit for bit; on GPUs rounding.
        kept_memory: On CPU, keep freed memory for the next step (mallopt of glibc) instead of giving it back. The same.
        quiet_heads: Leave out the heads' training statistics, which fetch figures from the device in every step and
            which nobody reads here. The same losses.
        batched_proposals: Label and choose anchors and proposals for all images of a batch at once
            (trainers/proposals.py). The same, bit for bit.
        gradient_views: With several workers, gradients live in the buckets they are exchanged in. The same.
        pinned_loader: On GPUs, load into page-locked memory and copy the next batch to the device during a step.
        batched_encoding: Encode an image's masks in one call (trainers/evaluation.py). The same detections.
        evaluation_batch: Images of one size that are detected on together; detectron2 takes them one by one. Rounding.
        overlapped_evaluation: Evaluate in a process beside rank 0 (trainers/overlap.py) while training goes on. Takes
            a second model's memory. The same figures; a target that is met ends training some iterations later.
        scorer: Which COCO scorer computes the twelve figures; both give the same to 1e-6.
    """

    precision: Precision = "fp32"
    tf32: bool = False
    channels_last: bool = False
    compile: bool = False
    winograd: bool = False
    sparse_pooling: bool = False
    mapper: Mapper = "detectron2"
    packed_masks: bool = False
    cached_annotations: bool = False
    batched_clipping: bool = False
    fused_optimizer: bool = False
    kept_memory: bool = False
    quiet_heads: bool = False
    batched_proposals: bool = False
    gradient_views: bool = False
    pinned_loader: bool = False
    batched_encoding: bool = False
    evaluation_batch: int = 1
    overlapped_evaluation: bool = False
    scorer: Scorer = "pycocotools"


PLAIN = Recipe()
"""detectron2's parts and nothing else; the foot of the ablation ladder."""

REFERENCE = Recipe(
    mapper="exact",
    packed_masks=True,
    cached_annotations=True,
    batched_clipping=True,
    fused_optimizer=True,
    kept_memory=True,
    quiet_heads=True,
    batched_proposals=True,
    gradient_views=True,
    pinned_loader=True,
    batched_encoding=True,
    scorer="hotcoco",
)
"""detectron2's numerics: on CPU its weights bit for bit; on GPUs the fused update may round otherwise."""

FAST = Recipe(
    precision="auto",
    tf32=True,
    channels_last=True,
    winograd=True,
    sparse_pooling=True,
    mapper="fast",
    packed_masks=True,
    cached_annotations=True,
    batched_clipping=True,
    fused_optimizer=True,
    kept_memory=True,
    quiet_heads=True,
    batched_proposals=True,
    gradient_views=True,
    pinned_loader=True,
    batched_encoding=True,
    evaluation_batch=8,
    scorer="hotcoco",
)
"""Everything that pays, also where results differ by rounding; AP within the spread of the seeds."""

POOLING = replace(REFERENCE, sparse_pooling=True)
"""A rung of the ablation ladder: the reference with the poolers exchanged."""

LAYOUT = replace(POOLING, channels_last=True)
"""The next rung: memory order as well."""

RECIPES: dict[str, Recipe] = {
    "plain": PLAIN,
    "reference": REFERENCE,
    "pooling": POOLING,
    "layout": LAYOUT,
    "fast": FAST,
}
