"""Puts a recipe's switches into effect, on a model and on this process."""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import cv2
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead
from detectron2.utils import comm
from torch import nn

from trainers.contract.problems import ConfigurationError
from trainers.matmul_precision import restored_matmul_precision
from trainers.recipes import Precision, Recipe
from trainers.speedups.convolution import winograd_conv
from trainers.speedups.determinism import deterministic_process
from trainers.speedups.fixed_rcnn import FixedRCNN, unsupported
from trainers.speedups.fixed_roi_heads import FixedROIHeads
from trainers.speedups.fixed_rpn import FixedRPN
from trainers.speedups.folded_norms import folded_conv
from trainers.speedups.keypoint_head import ContiguousKeypointHead
from trainers.speedups.level_pooling import triton_pooler
from trainers.speedups.proposals import BatchedCascadeROIHeads, BatchedRes5ROIHeads, BatchedRPN, BatchedStandardROIHeads
from trainers.speedups.quiet_heads import QuietFastRCNNOutputLayers, QuietMaskRCNNHead
from trainers.speedups.roi_pooling import sparse_pooler

logger = logging.getLogger(__name__)

Table = Mapping[type[nn.Module], type[nn.Module] | Callable[[str, Any], type[nn.Module] | None]]
"""What modules of exactly these classes become: a class, or what a function of a module's name and the module returns;
None leaves the module as it is."""

Exchanged = list[tuple[nn.Module, type[nn.Module]]]
"""The modules whose class was exchanged, each with its original class."""

REPLACEMENTS: dict[str, Table] = {
    "sparse_pooling": {ROIPooler: sparse_pooler},
    "triton_pooling": {ROIPooler: triton_pooler},
    "batched_proposals": {
        RPN: BatchedRPN,
        StandardROIHeads: BatchedStandardROIHeads,
        Res5ROIHeads: BatchedRes5ROIHeads,
        CascadeROIHeads: BatchedCascadeROIHeads,
    },
    "fixed_shapes": {GeneralizedRCNN: FixedRCNN, RPN: FixedRPN, StandardROIHeads: FixedROIHeads},
    "quiet_heads": {FastRCNNOutputLayers: QuietFastRCNNOutputLayers, MaskRCNNConvUpsampleHead: QuietMaskRCNNHead},
    "winograd": {Conv2d: winograd_conv},
    "folded_norms": {Conv2d: folded_conv},
    "channels_last": {KRCNNConvDeconvUpsampleHead: ContiguousKeypointHead},
}
"""For each switch of a recipe the classes of detectron2 that it exchanges; `fixed_shapes` stands in for
`batched_proposals`, whose replacements its own are subclasses of."""

MMAP_THRESHOLD, MMAP_MAX, TRIM_THRESHOLD = -3, -4, -1  # options of mallopt(3)
GLIBC_MEMORY = ((MMAP_MAX, 65536), (MMAP_THRESHOLD, 32 * 2**20), (TRIM_THRESHOLD, 64 * 2**20))
"""What glibc itself comes to in a program that frees large blocks (mallopt(3), M_MMAP_THRESHOLD)."""


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "amp", "bf16"]:
    """What `auto` means on a device: the fastest precision that it computes in without emulating it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        ampere = torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
        return "bf16" if ampere else "amp"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_tile") else "fp32"


def agree_on_precision(precision: Precision, device: torch.device, host: str) -> None:
    """Makes sure that `auto` is the same for all ranks, whose gradients are averaged: those of `amp` are scaled.

    To be called by every rank, in its process group; one alone communicates nothing.

    Raises:
        ConfigurationError: It is not; the same on every rank.
    """
    if precision != "auto":
        return
    hosts: dict[str, set[str]] = {}
    for resolved, name in comm.all_gather((resolve_precision(precision, device), host)):
        hosts.setdefault(resolved, set()).add(name)
    if len(hosts) > 1:
        found = ", ".join(f"{resolved} on {', '.join(sorted(hosts[resolved]))}" for resolved in sorted(hosts))
        what = f"auto is not the same precision for all workers: it is {found}"
        hint = "Set it to fp32, on GPUs also amp, or put the trial on one kind of GPU or CPU"
        raise ConfigurationError(what, "mixed_precision", "trials.switches.precision", hint)


def exchange(model: nn.Module, tables: Mapping[str, Table]) -> Exchanged:
    """Exchanges the classes of a model's modules, in place, by one table for each switch.

    A module keeps its identity, and with it its parameters, buffers, settings, hooks, and every list in which a model
    of detectron2 holds it a second time (`FPN.lateral_convs`); names in checkpoints stay. torch's own
    `register_parametrization` and `fully_shard` exchange classes in the same way. Modules of a subclass that the table
    does not name are left alone: they may override what a replacement relies on.

    Raises:
        ValueError: Two switches exchange the same class.
        TypeError: A replacement is not a subclass of what it replaces.
    """
    owners: dict[type[nn.Module], str] = {}
    for switch, table in tables.items():
        for original in table:
            if owners.setdefault(original, switch) != switch:
                raise ValueError(f"both {owners[original]} and {switch} exchange {original.__name__}")
    exchanged: Exchanged = []
    for switch, table in tables.items():
        counts: Counter[str] = Counter()
        for name, module in model.named_modules():
            original, choice = type(module), table.get(type(module))
            replacement = choice if choice is None or isinstance(choice, type) else choice(name, module)
            if replacement is None:
                continue
            if not issubclass(replacement, original):
                raise TypeError(f"{replacement.__name__} is not a subclass of {original.__name__}")
            module.__class__ = replacement
            exchanged.append((module, original))
            counts[replacement.__name__] += 1
        if counts:
            parts = ", ".join(f"{count} {name}" for name, count in counts.items())
            logger.info("%s: the model now has %s.", switch, parts)
        else:
            logger.warning("%s: has no effect, this model has no part that it exchanges.", switch)
    return exchanged


def restore(exchanged: Exchanged) -> None:
    """Gives every module its original class back."""
    for module, original in exchanged:
        module.__class__ = original


def tune_model(model: nn.Module, recipe: Recipe, device: torch.device) -> Exchanged:
    """Applies a recipe to a model with its weights loaded, in place; returns what `restore` puts back.

    Checkpoints stay as they are, so that a trial can go on under another recipe.
    """
    on_cpu = device.type == "cpu"
    fixed_shapes = recipe.has_fixed_shapes(device.type)
    reason = unsupported(model) if fixed_shapes else None
    if reason:
        logger.warning("fixed_shapes: has no effect, %s.", reason)
        fixed_shapes = False
    pooling = recipe.sparse_pooling if on_cpu else recipe.triton_pooling  # gives features in NHWC memory order
    with_keypoints = any(type(module) is KRCNNConvDeconvUpsampleHead for module in model.modules())
    switches = {
        "channels_last": (recipe.channels_last or pooling) and with_keypoints,
        "sparse_pooling": pooling and on_cpu,
        "triton_pooling": pooling and not on_cpu,
        "fixed_shapes": fixed_shapes,
        "batched_proposals": recipe.batched_proposals and not fixed_shapes,
        "quiet_heads": recipe.quiet_heads,
        "winograd": recipe.winograd and on_cpu and resolve_precision(recipe.precision, device) == "fp32",
        "folded_norms": recipe.folded_norms and not on_cpu,
    }
    exchanged = exchange(model, {switch: REPLACEMENTS[switch] for switch, on in switches.items() if on})
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.compile:
        backbone = getattr(model, "backbone", None)
        if isinstance(backbone, nn.Module):
            backbone.compile(dynamic=False)  # in place: the names of its weights stay
            logger.info("The backbone is compiled at its first step.")
        else:
            logger.warning("compile: has no effect, this model has no backbone.")
    return exchanged


@contextmanager
def process_settings(recipe: Recipe, device: torch.device, cudnn_benchmark: bool = False) -> Iterator[None]:
    """Sets what a recipe needs for the whole process, and puts it back at the end, so that another can follow.

    `cudnn_benchmark` is the config's `CUDNN_BENCHMARK`.
    """
    num_threads = cv2.getNumThreads()  # the fast mapper sets it
    on_cpu = _kept_memory() if recipe.kept_memory else nullcontext()
    try:
        with (
            _gpu_numerics(recipe.tf32, cudnn_benchmark) if device.type == "cuda" else on_cpu,
            deterministic_process() if recipe.deterministic else nullcontext(),
        ):
            yield
    finally:
        cv2.setNumThreads(num_threads)


@contextmanager
def _gpu_numerics(tf32: bool | None, cudnn_benchmark: bool) -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    with restored_matmul_precision():
        if tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        cudnn.benchmark = cudnn_benchmark
        try:
            yield
        finally:
            cudnn.allow_tf32, cudnn.benchmark = before


@contextmanager
def _kept_memory() -> Iterator[None]:
    """Lets this process keep the memory that it frees, where its C library can (glibc).

    glibc gives large blocks back to the system at once, and the next step's activations are then cleared and mapped
    again, page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        logger.warning("kept_memory: has no effect, this C library has no mallopt.")
        yield
        return
    accepted = mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1)
    logger.info("Freed memory is %s.", "kept" if accepted else "given back: mallopt refused")
    try:
        yield
    finally:
        for option, value in GLIBC_MEMORY:
            mallopt(option, value)
