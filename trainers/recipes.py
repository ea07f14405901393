"""Named speed recipes: what each turns on. Standard library only, so that the driver can validate and print them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Precision = Literal["fp32", "amp", "bf16", "auto"]
Scorer = Literal["pycocotools", "hotcoco"]
Mapper = Literal["detectron2", "exact", "fast"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The switches of one way to train; the defaults are detectron2's own parts.

    Every switch can be set by itself in the experiment file. What they gain is measured by configs/ablation.yaml, a
    recipe at a time, and on GPUs by the ladder of `make bench-gpu`.
    """

    precision: Precision = "fp32"
    """`fp32`; `amp` (float16 autocast with a gradient scaler, GPUs only); `bf16` (bfloat16 autocast); `auto`: bf16
    where the device computes in it (GPUs since Ampere, CPUs with AVX512-BF16 or AMX), else amp on a GPU and fp32 on a
    CPU, where bf16 would be emulated and slower."""
    tf32: bool | None = None
    """Whether GPUs multiply matrices and convolve in TF32 (Ampere and later), which changes numerics; none leaves both
    as torch has them, and so detectron2: convolutions in TF32, products of matrices in fp32."""
    channels_last: bool = False
    """Keep images, activations and convolution weights in NHWC memory order. Rounding."""
    compile: bool = False
    """Compile the backbone with `torch.compile` at the first step: tens of seconds, and again for each new image size.
    Rounding."""
    winograd: bool = False
    """On CPU, convolutions with fewer multiplications (trainers/speedups/convolution.py); needs `channels_last` and
    fp32. Rounding."""
    sparse_pooling: bool = False
    """On CPU, ROIAlign as one sparse product (trainers/speedups/roi_pooling.py). Rounding."""
    mapper: Mapper = "detectron2"
    """What reads and augments images: detectron2's mapper; trainers/speedups/fast_mapper.py with detectron2's pixels
    (`exact`: the same records); all of it (`fast`: pixels differ by one grey level at most)."""
    packed_masks: bool = False
    """Draw mask targets an image at a time (trainers/speedups/mask_targets.py). The same, bit for bit."""
    cached_annotations: bool = False
    """Keep parsed annotations in a mapped file (trainers/dataset_cache.py). The same records."""
    batched_clipping: bool = False
    """Clip all gradients at once instead of one by one (trainers/speedups/sgd.py). The same, bit for bit."""
    fused_optimizer: bool = False
    """One kernel for the whole update of SGD (trainers/speedups/sgd.py). On CPU the same, bit for bit; on GPUs
    rounding."""
    kept_memory: bool = False
    """On CPU, keep freed memory for the next step (mallopt of glibc) instead of giving it back. The same."""
    quiet_heads: bool = False
    """Leave out the heads' training statistics, which fetch figures from the device in every step and which nobody
    reads here (trainers/speedups/quiet_heads.py). The same losses."""
    batched_proposals: bool = False
    """Label and choose anchors and proposals for all images of a batch at once (trainers/speedups/proposals.py). The
    same, bit for bit."""
    fixed_shapes: bool | None = False
    """Train on batches padded to a few sizes (trainers/speedups/padded_batch.py), in operations without a shape that
    depends on data, so that the host does not wait for the device; none: on GPUs only. Rounding, other random
    numbers of the same distributions, and images surrounded by more zeros. Models and batches that it does not know
    train as without it, which is reported."""
    cuda_graphs: bool = False
    """On GPUs, with `fixed_shapes`, replay the whole forward and backward pass as one CUDA graph for each size of
    batch (trainers/speedups/graphs.py). The same."""
    triton_pooling: bool = False
    """On GPUs, ROIAlign of all levels in one kernel each way, in NHWC memory order, in training and detection; the same
    bits each time (trainers/speedups/level_pooling.py). Batches of `fixed_shapes` are pooled so in any case.
    Rounding."""
    folded_norms: bool = False
    """On GPUs, fold frozen batch norm into the convolutions in training (trainers/speedups/folded_norms.py).
    Rounding."""
    deterministic: bool = False
    """Only operations that give the same bits each time; what has none is refused (docs/settings.md). Slower on GPUs,
    where it needs `triton_pooling`."""
    gradient_views: bool = False
    """With several workers, gradients live in the buckets they are exchanged in. The same."""
    pinned_loader: bool = False
    """On GPUs, load into page-locked memory and copy the next batch to the device during a step or a detection."""
    batched_encoding: bool = False
    """Encode a batch's masks at once from the places where they change (trainers/speedups/rle.py). A GPU sends only
    these to the host, and detects on while they are encoded. The same detections."""
    evaluation_batch: int = 1
    """Images of one size that are detected on together; detectron2 takes them one by one. Rounding."""
    overlapped_evaluation: bool | None = False
    """Evaluate in a separate process while training goes on (trainers/overlap.py): the one on the device of rank 0,
    unless `resources.evaluation` reserves others. Takes a second model's memory. The same figures; a target that is met
    ends training some iterations later. None: where a run's one host has CPUs to spare for it, or others are reserved
    (docs/settings.md, "Evaluations while training goes on")."""
    scorer: Scorer = "pycocotools"
    """Which COCO scorer computes the twelve figures; both give the same to 1e-6."""

    def has_fixed_shapes(self, device: str) -> bool:
        """What `fixed_shapes` means on a device, `cuda` or `cpu`."""
        return device == "cuda" if self.fixed_shapes is None else self.fixed_shapes


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

POOLING = replace(REFERENCE, sparse_pooling=True)
LAYOUT = replace(POOLING, channels_last=True)

FAST = replace(
    LAYOUT,
    precision="auto",
    tf32=True,
    winograd=True,
    mapper="fast",
    evaluation_batch=8,
    fixed_shapes=None,
    triton_pooling=True,
    folded_norms=True,
    cuda_graphs=True,
    overlapped_evaluation=None,
)
"""Everything that pays, also where results differ by rounding; AP within the spread of the seeds."""

RECIPES = {"plain": PLAIN, "reference": REFERENCE, "pooling": POOLING, "layout": LAYOUT, "fast": FAST}
"""By name; `pooling` and `layout` are rungs of the ablation ladder between the reference and the fast recipe."""
