"""Writes an experiment file for a data set: its classes, a model that fits its masks, a schedule for this machine."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from orchestrator.data.checks import check_split, compare_splits
from orchestrator.data.entries import SplitSummary
from orchestrator.data.exports import find_splits
from orchestrator.files import is_file
from orchestrator.findings import Finding, has_errors, printable, sort_findings
from orchestrator.gpus import list_gpus
from trainers.contract.cpus import num_usable_cpus

MASK_CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
BOX_CONFIG = "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"
WEIGHTS = {
    MASK_CONFIG: "detectron2://COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl",
    BOX_CONFIG: "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
}
"""Weights trained on COCO, from detectron2's model zoo (MODEL_ZOO.md)."""

LR_PER_IMAGE = 0.02 / 16
"""detectron2's learning rate for one image of a batch; it grows with the batch (its linear scaling rule)."""

GIB_PER_IMAGE = 2.5
"""GPU memory for one image of a batch: the model zoo measured 1.7 GB for R50-FPN; many objects need more."""

EPOCHS = ((200, 60), (2_000, 36), (20_000, 24))
"""Epochs by the number of images below which they are taken. More images: detectron2's 1x schedule, 12 epochs."""

YAML_WORDS = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n"))


TEMPLATE = """\
# Written by `python -m orchestrator.data init {folder}`.
# {num_train:,} training and {num_val:,} validation images; for a machine with {machine}.
# `python -m orchestrator.run FILE --dry-run` shows the plan, `--preflight` checks everything; neither trains.
name: {name}
data:
  coco:
    name: {name}
    train_annotations: {train_annotations}
    train_images: {train_images}
    val_annotations: {val_annotations}
    val_images: {val_images}
model:
  # {masks}. Other models: any of detectron2's MODEL_ZOO.md for boxes or instances, or your own YAML.
  config: {config}
  # Trained on COCO: a small data set is not enough to train from nothing. The layers that depend on the classes begin
  # untrained. Downloaded once; without a network, give the path of the file.
  weights: {weights}
  overrides:
    # {classes}
    MODEL.ROI_HEADS.NUM_CLASSES: {num_classes}
{more_overrides}\
    # Images in a step, of all workers together: {per_worker} each. If memory runs out, halve it and BASE_LR.
    SOLVER.IMS_PER_BATCH: {batch}
    # detectron2's 0.02 for 16 images, scaled to this batch. If the loss becomes infinite, take a tenth.
    SOLVER.BASE_LR: {base_lr:g}
    # {epochs} epochs of the {num_images:,} images with objects. The learning rate falls at 2/3 and 8/9 of them.
    SOLVER.MAX_ITER: {max_iter}
    SOLVER.STEPS: {steps}
    SOLVER.WARMUP_ITERS: {warmup}
trials:
  # Workers: {workers_reason}. With `strong`, batch, learning rate and iterations are as above for any number of them.
  world_sizes: [{workers}]
  scaling: strong
  # Every switch that saves time; `reference` is detectron2 to the bit.
  recipes: [fast]
protocol:
  kind: time_to_train
  # Ten evaluations. A target, such as target_box_ap: 50, would end the training when it is reached.
  eval_period_iterations: {eval_period}
storage:
  # After every evaluation; the best one and the two newest are kept.
  checkpoint_period_iterations: {eval_period}
resources:
{resources}"""

BITMASKS = """\
    # {num_rle:,} masks are run-length encoded, which detectron2 reads as bitmaps.
    INPUT.MASK_FORMAT: bitmask
"""

SMALL_IMAGES = """\
    # Half of detectron2's 800 pixels, for a quarter of the time on CPUs. Take these out for small objects, or a GPU.
    INPUT.MIN_SIZE_TRAIN: [400]
    INPUT.MAX_SIZE_TRAIN: 667
    INPUT.MIN_SIZE_TEST: 400
    INPUT.MAX_SIZE_TEST: 667
"""


class Machine(NamedTuple):
    """What the schedule is made for."""

    num_gpus: int
    gpu_gib: float
    """Memory of the smallest GPU; 0 where that is not known."""
    num_cpus: int

    @classmethod
    def local(cls) -> Machine:
        """This machine."""
        gpus = list_gpus()
        memory = [gpu.total_bytes / 2**30 for gpu in gpus if gpu.total_bytes]
        return cls(len(gpus), min(memory, default=0.0), num_usable_cpus())


class Schedule(NamedTuple):
    """How long and in which steps a model is trained; the fields are those of the template."""

    num_images: int
    """Training images with objects."""
    workers: int
    per_worker: int
    """Images of a worker in a step."""
    batch: int
    base_lr: float
    epochs: int
    max_iter: int
    steps: list[int]
    """Iterations at which the learning rate falls: 2/3 and 8/9 of all, as in detectron2's 1x."""
    warmup: int
    eval_period: int


def write_experiment(folder: Path, machine: Machine | None = None) -> tuple[str | None, list[Finding]]:
    """The text of an experiment that trains on the data set in a folder, and the findings of its checks.

    Paths in it are absolute, so that it can be moved and run from anywhere. The text is None where there is no training
    or no validation set, or a check found an error.

    Args:
        folder: A data set in any layout that `find_splits` knows, or an annotation file of it.
        machine: What it is made for; None for this one.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - no link is resolved, and no ".." is kept
    splits, findings = find_splits(folder)
    splits.pop("test", None)
    reports = {part: check_split(split) for part, split in splits.items()}
    findings += [finding for report in reports.values() for finding in report.findings]
    if reports.keys() >= {"train", "val"}:
        findings = sort_findings([*findings, *compare_splits(reports["train"], reports["val"])])
        train, val = reports["train"].summary, reports["val"].summary
        if train and val and not has_errors(findings):
            num_bare, num_objects = _count_bare(train, val)
            if 0 < num_bare < num_objects:
                what = f"{num_bare:,} of {num_objects:,} objects have no mask: a model of boxes is taken"
                hint = "Add their masks, or remove them, for a model of masks; nothing, if boxes are intended"
                findings.append(Finding("warning", "masks_missing", str(folder), "", what, hint))
            return _experiment(folder, train, val, machine or Machine.local()), findings
    missing = [replace(finding, level="error") for finding in findings if finding.code == "part_missing"]
    findings = [finding for finding in findings if finding.code != "part_missing"]
    # What is wrong with a lone file comes first: the two that it is split into would inherit it.
    return None, sort_findings(findings if has_errors(findings) else [*findings, *missing])


def schedule(num_images: int, machine: Machine) -> Schedule:
    """A fine-tuning schedule for a number of training images (those with objects) and a machine."""
    workers = max(1, machine.num_gpus)
    per_worker = 2
    for size in (4, 8, 16):
        # Memory sets the limit, and an epoch of ten steps: larger batches leave a small set too few steps.
        if size * GIB_PER_IMAGE <= machine.gpu_gib and 10 * size * workers <= num_images:
            per_worker = size
    batch = per_worker * workers
    epochs = next((epochs for below, epochs in EPOCHS if num_images < below), 12)
    iters = max(10, -(-epochs * num_images // batch))
    steps = [iters * 2 // 3, iters * 8 // 9]
    lr, tenth = LR_PER_IMAGE * batch, iters // 10
    return Schedule(num_images, workers, per_worker, batch, lr, epochs, iters, steps, min(1000, tenth), tenth)


def _gpus(machine: Machine) -> str:
    size = f" of {machine.gpu_gib:.0f} GiB" if machine.gpu_gib else ""
    return f"{machine.num_gpus} GPUs{size}" if machine.num_gpus else "no GPU"


def _experiment(folder: Path, train: SplitSummary, val: SplitSummary, machine: Machine) -> str:
    num_bare, num_objects = _count_bare(train, val)
    config = BOX_CONFIG if num_bare else MASK_CONFIG
    more = BITMASKS.format(num_rle=train.num_rle) if train.num_rle and not num_bare else ""
    resources = "  device: cuda\n"
    name = folder.stem if is_file(folder) else folder.name
    if not machine.num_gpus:
        more += SMALL_IMAGES
        resources = f"  device: cpu\n  # All that this machine has.\n  cpus_per_worker: {machine.num_cpus}\n"
    return TEMPLATE.format(
        **schedule(train.num_images_with_objects, machine)._asdict(),
        folder=printable(str(folder)),
        num_train=train.num_images,
        num_val=val.num_images,
        machine=_gpus(machine),
        name=_scalar(re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:80] or "own_data"),
        train_annotations=_scalar(train.annotations),
        train_images=_scalar(train.images),
        val_annotations=_scalar(val.annotations),
        val_images=_scalar(val.images),
        masks=f"{num_bare:,} of {num_objects:,} objects have no mask" if num_bare else "Every object has a mask",
        config=config,
        weights=WEIGHTS[config],
        classes=_list_classes(train),
        num_classes=len(train.categories),
        more_overrides=more,
        workers_reason="one for each GPU" if machine.num_gpus else "one, with all CPUs",
        resources=resources,
    )


def _count_bare(train: SplitSummary, val: SplitSummary) -> tuple[int, int]:
    """Objects without a mask, and all objects."""
    num_objects = sum(each.num_annotations - each.num_crowd for each in (train, val))
    return train.num_without_mask + val.num_without_mask, num_objects


def _list_classes(train: SplitSummary) -> str:
    """Names of the classes with the number of their objects, in one line."""
    counts = (f"{name} ({train.objects_of_category.get(key, 0):,})" for key, name in train.categories.items())
    text = printable(", ".join(counts))
    return f"Classes, with their objects: {text if len(text) <= 80 else text[:79] + '…'}"


def _scalar(text: str) -> str:
    """A text as a YAML value, in quotes where it could be read as something else."""
    if re.fullmatch(r"[/A-Za-z][A-Za-z0-9/._+-]*", text) and text.lower() not in YAML_WORDS:
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
