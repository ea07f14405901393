"""Every Triton kernel compiles for the GPUs that people have, and fits into their registers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders.commands import ROOT
from tests.builders.compiled import AMPERE, HOPPER, compiled, resources
from trainers.speedups.kernels import masks, matching, nms, roi_align

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
CANVAS = 832, 1344


def pooling(dtype: torch.dtype, size: int, sampling_ratio: int, aligned: bool) -> Iterator[tuple[Any, ...]]:
    """ROIAlign of a feature pyramid, forward and backward."""
    heights, widths = ([int(side * scale) for scale in SCALES] for side in CANVAS)
    features = [torch.empty(1, 256, height, width, dtype=dtype) for height, width in zip(heights, widths, strict=True)]
    boxes, numbers = torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64)
    settings = SCALES, sampling_ratio, aligned
    yield roi_align.pool, features, boxes, numbers, numbers, SCALES, size, sampling_ratio, aligned
    grad = torch.empty(8, 256, size, size, dtype=dtype)
    yield roi_align.pool_backward, grad, boxes, numbers, numbers, 1, heights, widths, *settings


def calls() -> Iterator[tuple[Any, ...]]:
    """Functions that launch kernels, each with the arguments of a training step."""
    yield from pooling(torch.bfloat16, 7, 0, aligned=True)
    yield from pooling(torch.float16, 14, 0, aligned=True)
    yield from pooling(torch.float32, 7, 2, aligned=False)
    yield nms.nms_keep, torch.zeros(4, 2000, 4), torch.ones(4, 2000, dtype=torch.bool), 0.7
    matched = torch.zeros(2, 40, 4), torch.ones(2, dtype=torch.int64), torch.zeros(5000, 4)
    yield matching.best_overlaps, *matched
    yield matching.is_best, *matched
    edges, edge_polygon = torch.zeros(2, 90, 4, dtype=torch.float64), torch.zeros(2, 90, dtype=torch.int32)
    numbers = torch.zeros(256, dtype=torch.int64)
    first_edge = torch.zeros(2, 41, dtype=torch.int32)
    yield masks.draw_masks, edges, edge_polygon, first_edge, torch.zeros(256, 4), numbers, numbers, 28


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_each_kernel_compiles_and_fits_into_the_registers(capability: int) -> None:
    for function, *arguments in calls():
        for kernel in compiled(capability, function, *arguments):
            registers, local_bytes = resources(kernel)
            threads = 32 * kernel.metadata.num_warps
            assert registers * threads <= 65536 // 2, f"{kernel.metadata.name}: two programs do not fit"
            assert local_bytes <= 32 and kernel.metadata.shared <= 49152, kernel.metadata.name


def test_no_module_of_kernels_is_left_out() -> None:
    modules = {Path(function.__code__.co_filename).stem for function, *_ in calls()}
    assert modules == {path.stem for path in (ROOT / "trainers/speedups/kernels").glob("[!_]*.py")}


@pytest.mark.parametrize(("capability", "product"), [(AMPERE, "mma.sync"), (HOPPER, "wgmma.mma_async")])
def test_gradients_in_16_bits_are_summed_by_tensor_cores_in_a_fixed_order(capability: int, product: str) -> None:
    (backward,) = (call for call in pooling(torch.bfloat16, 7, 0, aligned=True) if call[0] is roi_align.pool_backward)
    (kernel,) = compiled(capability, *backward)
    assert re.search(rf"{re.escape(product)}\.\S*\.f32\.bf16\.bf16", kernel.asm["ptx"]), "sums in 32 bits"
    assert "ld.global.v4" in kernel.asm["ptx"] and "st.global.v4" in kernel.asm["ptx"], "16 bytes at once"
    assert "atom" not in kernel.asm["ptx"] and "red.global" not in kernel.asm["ptx"]
