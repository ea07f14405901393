"""What is trained in `make bench-gpu`: the seed's model on images of COCO's shapes, under which recipes."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.coco_shaped import coco_shaped
from benchmarks.gpu_probe import Order
from benchmarks.gpu_side import Kind
from benchmarks.training import DATA, generated_plan
from orchestrator.data.layout import Split
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import DEFAULT_CONFIG
from orchestrator.gpus import list_gpus
from trainers.contract.cpus import num_usable_cpus
from trainers.contract.plan import TrialPlan
from trainers.recipes import FAST, PLAIN, REFERENCE, Recipe

DETECTRON2 = "detectron2"
"""Name of the row that all others are compared with."""

CONTENDERS: dict[str, tuple[Kind, Recipe]] = {
    DETECTRON2: ("peer", PLAIN),
    "detectron2, SOLVER.AMP": ("peer", dataclasses.replace(PLAIN, precision="amp")),
    "plain": ("ours", PLAIN),
    "reference": ("ours", REFERENCE),
    "fast": ("ours", FAST),
}
"""The rows of a batch size."""

DEMO = {
    "plain": PLAIN,
    "reference": REFERENCE,
    "fast": FAST,
    "fast, overlapped evaluation": dataclasses.replace(FAST, overlapped_evaluation=True),
}
"""The recipes that train the demo to its targets."""

LADDER = ("tf32", "channels_last", "mapper", "precision", "folded_norms", "fixed_shapes",
          "triton_pooling", "cuda_graphs")  # fmt: skip
"""The order in which the ladder turns on the switches of the fast recipe; those that are not named here come last."""

NOT_IN_THE_LADDER = {
    "sparse_pooling": "CPUs only", "winograd": "CPUs only", "evaluation_batch": "evaluation only",
    "overlapped_evaluation": "evaluation only", "scorer": "evaluation only",
}  # fmt: skip
"""Switches that a training step on a GPU does not have, and why."""


def ladder() -> dict[str, Recipe]:
    """From the reference to the fast recipe, one switch after the other, each by its line in an experiment file."""
    names = [field.name for field in dataclasses.fields(Recipe)]
    changed = [name for name in names if getattr(REFERENCE, name) != getattr(FAST, name)]
    order = [*(name for name in LADDER if name in changed), *(name for name in changed if name not in LADDER)]
    recipe, rungs = REFERENCE, {"reference": REFERENCE}
    for name in order:
        if name not in NOT_IN_THE_LADDER:
            value = getattr(FAST, name)
            recipe = dataclasses.replace(recipe, **{name: value})
            rungs[yaml.safe_dump({name: value}).strip()] = recipe
    return rungs


MAX_CPUS = 16
"""Most CPUs of a GPU, those of the machine of the published figures: more would only start more loader processes."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How large the models are, and for how long they are measured."""

    tiny: bool = False
    """A small model on images of a seventh of the size, on a CPU: for tests."""
    batches: tuple[int, ...] = (2, 16)
    """Images of a step."""
    ladder_batch: int = 16
    at_once: int = 2
    """Trainings whose memory the device holds at a time next to detectron2's, from a batch of 16 on."""
    rounds: int = 3
    """Timed blocks of each training."""
    warmup_seconds: float = 6.0
    warmup_steps: int = 25
    """Fewest steps before the first timed block: the first ones compile kernels and fill caches."""
    block_seconds: float = 2.5
    block_steps: int = 4
    """Fewest steps of a block."""

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return "cpu" if self.tiny else "cuda"

    @property
    def warmup(self) -> Order:
        """What every training begins with."""
        return Order("time", self.warmup_seconds, self.warmup_steps)

    @property
    def block(self) -> Order:
        """A turn of a training."""
        return Order("time", self.block_seconds, self.block_steps)


TINY = Settings(True, (2,), 2, rounds=2, warmup_seconds=0.0, warmup_steps=1, block_seconds=0.0, block_steps=2)
"""For tests: shows that everything works, and measures nothing."""

TINY_MODEL: dict[str, Any] = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8, "MODEL.RESNETS.WIDTH_PER_GROUP": 8, "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.FPN.OUT_CHANNELS": 16, "MODEL.ROI_BOX_HEAD.FC_DIM": 32, "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32, "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50, "MODEL.RPN.POST_NMS_TOPK_TEST": 20, "MODEL.PIXEL_STD": [57.0, 57.0, 57.0],
    "INPUT.MIN_SIZE_TRAIN": [64], "INPUT.MIN_SIZE_TEST": 64, "TEST.DETECTIONS_PER_IMAGE": 10,
}  # fmt: skip
"""Changes to the seed's model that make it train a step in hundredths of a second."""


def dataset(settings: Settings) -> tuple[str, dict[str, Any]]:
    """What is trained on, in words and as the `data` of an experiment."""
    real = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"), "coco").expanduser()  # as detectron2 does
    split = Split(real / "annotations" / "instances_val2017.json", real / "val2017")
    if split.is_present() and not settings.tiny:
        train = val = split
        what = f"COCO's val2017 in {real}: its annotations are read in a second, those of train2017 in half a minute"
    else:
        num_images, scale = (16, 0.15) if settings.tiny else (512, 1.0)
        train, val = coco_shaped((DATA / f"coco-shaped-{num_images}-{scale:g}").absolute(), num_images, scale)
        what = f"{num_images} images drawn with COCO's sizes, objects and detail (benchmarks/coco_shaped.py)"
    paths = {"train_annotations": train.annotations, "train_images": train.images,
             "val_annotations": val.annotations, "val_images": val.images}  # fmt: skip
    return what, {"coco": {"name": "gpu", **{key: str(path.absolute()) for key, path in paths.items()}}}


def training_plan(settings: Settings, data: dict[str, Any], recipe: Recipe, batch: int, folder: Path) -> TrialPlan:
    """An endless training of the seed's model from random weights, with all but two of its GPU's share of the CPUs."""
    # Without that division, random layers grow values beyond what float16 holds.
    divided: dict[str, Any] = {"MODEL.PIXEL_STD": [57.375, 57.12, 58.395]}
    overrides = dict(TINY_MODEL) if settings.tiny else divided
    overrides |= {"SOLVER.IMS_PER_BATCH": batch, "SOLVER.BASE_LR": 0.0001}
    share = num_usable_cpus() // max(1, len(list_gpus()))
    cpus = 1 if settings.tiny else max(1, min(share, MAX_CPUS) - 2)
    values = {
        "name": "gpu",
        "data": data,
        "model": {"weights": "", "overrides": overrides},
        "trials": {"world_sizes": [1], "scaling": "strong"},
        "protocol": {"kind": "throughput", "iterations": 1_000_000, "evaluate_at_end": False},
        "resources": {"device": settings.device, "cpus_per_worker": cpus},
        "storage": {"checkpoint_period_iterations": 0},
        "log_period_iterations": 2 if settings.tiny else 20,
    }
    hardware = Hardware(num_gpus=1, num_cpus=cpus)
    (plan,) = expand(parse_experiment(values, "benchmark"), hardware, str(folder), folder)
    return dataclasses.replace(plan, recipe=recipe)


def with_all_loaders(plan: TrialPlan) -> TrialPlan:
    """The plan with as many loader processes from its start as it may come to have.

    Their number would change at step 20, with CUDA graphs at step 100, which may be in a timed block or after the last.
    """
    return dataclasses.replace(plan, loader_workers=max(plan.loader_workers, plan.most_loader_workers))


def demo_plan(settings: Settings, recipe: Recipe, folder: Path) -> TrialPlan:
    """The demo's training to its targets; a tiny one takes two steps."""
    values = yaml.safe_load(DEFAULT_CONFIG.read_text(encoding="utf-8"))
    if settings.tiny:
        values["data"]["generated"] |= {"num_train": 8, "num_val": 2, "size": 64}
        values["model"]["overrides"] = {**TINY_MODEL, "SOLVER.IMS_PER_BATCH": 8}
        values["protocol"] |= {"iterations": 2, "eval_period_iterations": 1}
    cpus = 1 if settings.tiny else 4
    plan = generated_plan(values, cpus, 1, "fast", values["protocol"], settings.device)
    plan = dataclasses.replace(plan, trial_dir=str(folder / "trial"), checkpoint_dir=str(folder / "checkpoints"))
    return dataclasses.replace(plan, recipe=recipe)
