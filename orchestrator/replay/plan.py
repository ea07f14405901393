"""Reads a trial's settings from the head of its log; what the head does not print stays None."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from orchestrator.figures.logged_plan import LoggedDataset, LoggedPlan, LoggedSolver
from orchestrator.replay.runs import Launch, LoggedRun

COCO_TARGETS = (37.7, 33.9)
"""Box and mask AP at which Mask R-CNN on COCO 2017 counts as trained (MLPerf Training's and AI-Rank's rules)."""

RECIPE = "detectron2"
"""Recipe name of runs of other programs."""

LOG_PERIOD = 20
"""Iterations between detectron2's progress lines."""


@dataclass(frozen=True, slots=True)
class Targets:
    """AP that counts as trained."""

    box: float | None
    """Box AP, 0–100; None for no target."""
    mask: float | None
    """Mask AP, 0–100; None for no target."""


def known_targets(run: LoggedRun) -> Targets:
    """The targets of a run whose task has public ones: Mask R-CNN on COCO 2017, evaluated during training."""
    head = run.launches[0]
    if "coco_2017_val" not in head.config.get("DATASETS.TEST", "") or not head.integer("TEST.EVAL_PERIOD"):
        return Targets(None, None)
    return Targets(COCO_TARGETS[0], COCO_TARGETS[1] if head.config.get("MODEL.MASK_ON") == "True" else None)


def logged_plan(run: LoggedRun, name: str, targets: Targets) -> LoggedPlan:
    """The settings that the head of a run's log prints.

    Args:
        run: The run.
        name: Name for it.
        targets: What counts as trained.
    """
    head = run.launches[0]
    eval_period, steps = head.integer("TEST.EVAL_PERIOD"), head.config.get("SOLVER.STEPS")
    return LoggedPlan(
        name=name,
        source=str(run.source.absolute()),
        world_size=head.world_size or 1,
        num_nodes=head.num_nodes,
        recipe_name=RECIPE,
        precision=_PRECISIONS.get(head.config.get("SOLVER.AMP.ENABLED", "")),
        seed=head.seed,
        scaling="weak",
        protocol=None if eval_period is None else "time_to_train" if eval_period else "throughput",
        weights=head.config.get("MODEL.WEIGHTS"),
        train=_dataset(head, "DATASETS.TRAIN"),
        val=_dataset(head, "DATASETS.TEST"),
        solver=LoggedSolver(
            global_batch_size=head.integer("SOLVER.IMS_PER_BATCH"),
            base_lr=head.number("SOLVER.BASE_LR"),
            max_iter=head.integer("SOLVER.MAX_ITER"),
            steps=tuple(int(step) for step in re.findall(r"\d+", steps)) if steps is not None else None,
            warmup_iters=head.integer("SOLVER.WARMUP_ITERS"),
            eval_period=eval_period,
            checkpoint_period=head.integer("SOLVER.CHECKPOINT_PERIOD"),
        ),
        throughput_warmup_iters=LOG_PERIOD,
        target_box_ap=targets.box,
        target_mask_ap=targets.mask,
        device=_DEVICES.get(head.config.get("MODEL.DEVICE", "cuda" if gpu_name(head) else "")),
    )


def gpu_name(launch: Launch) -> str | None:
    """Model name of the GPU in a launch's environment table; None where it names none."""
    for key, value in launch.environment.items():
        if key.startswith("GPU ") and key != "GPU available":
            return re.sub(r" \(arch=.*", "", value)
    return None


_PRECISIONS: dict[str, Literal["fp32", "amp"]] = {"False": "fp32", "True": "amp"}
_DEVICES: dict[str, Literal["cuda", "cpu"]] = {"cuda": "cuda", "cpu": "cpu"}


def _dataset(launch: Launch, key: str) -> LoggedDataset:
    name = re.search(r"[\w-]+", launch.config.get(key, ""))
    return LoggedDataset(name[0] if name else None)
