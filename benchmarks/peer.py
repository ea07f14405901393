"""Plain detectron2 on the same work: `DefaultTrainer`, set up as its `tools/train_net.py` does, in one process.

`python -m benchmarks.peer PLAN.json RESULT.json [--stop-at-target]`. The config is the one that our plan resolves to,
so model, data, schedule and evaluation are the same; nothing else is touched.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.logger import setup_logger

from benchmarks import turns
from trainers import mask_rcnn
from trainers.contract.plan import TrialPlan


class TargetReached(Exception):  # noqa: N818 - not an error
    """Both targets are met."""


class PlainTrainer(DefaultTrainer):  # type: ignore[misc]
    """What tools/train_net.py makes of DefaultTrainer, with the clock around each step."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.step_seconds: list[float] = []
        self.first_step: float | None = None
        self.wait = turns.waiting()

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str, output_folder: str | None = None) -> COCOEvaluator:
        """COCO's, with its file of detections."""
        return COCOEvaluator(dataset_name, output_dir=output_folder or str(Path(cfg.OUTPUT_DIR, "inference")))

    def before_step(self) -> None:
        """Waits for its turn, where steps are taken in turns."""
        self.wait()
        super().before_step()

    def run_step(self) -> None:
        """One step, timed."""
        started = time.perf_counter()
        super().run_step()
        self.step_seconds.append(time.perf_counter() - started)
        self.first_step = self.first_step or time.time()


class StopAtTarget(HookBase):  # type: ignore[misc]
    """Ends training once the last evaluation has met the plan's targets."""

    def __init__(self, plan: TrialPlan) -> None:
        self.plan = plan

    def after_step(self) -> None:
        """Looks at the last evaluation."""
        results = getattr(self.trainer, "_last_eval_results", None) or {}
        wanted = {"bbox": self.plan.target_box_ap, "segm": self.plan.target_mask_ap}
        targets = {task: target for task, target in wanted.items() if target is not None}
        if results and all(results.get(task, {}).get("AP", 0) >= target for task, target in targets.items()):
            raise TargetReached


def train(plan: TrialPlan, stop_at_target: bool) -> dict[str, Any]:
    """Trains the plan the plain way; returns what was measured."""
    torch.set_num_threads(plan.cpus_per_worker)
    torch.manual_seed(plan.seed)
    Path(plan.trial_dir).mkdir(parents=True, exist_ok=True)
    setup_logger(plan.trial_dir)
    cfg = mask_rcnn.build_config(plan)
    mask_rcnn.register(plan.train)
    mask_rcnn.register(plan.val)
    cfg.defrost()
    if not (plan.solver.evaluate_at_end or plan.solver.eval_period):
        cfg.DATASETS.TEST = ()
    # detectron2 divides by the period; one beyond the end is its way of writing no checkpoint on the way.
    cfg.SOLVER.CHECKPOINT_PERIOD = plan.solver.checkpoint_period or plan.solver.max_iter + 1
    cfg.freeze()
    trainer = PlainTrainer(cfg)
    if not cfg.DATASETS.TEST:
        trainer._hooks = [hook for hook in trainer._hooks if not isinstance(hook, EvalHook)]
    if stop_at_target:
        trainer.register_hooks([StopAtTarget(plan)])
    trainer.resume_or_load(resume=False)
    reached = False
    try:
        trainer.train()
    except TargetReached:
        reached = True
    results = getattr(trainer, "_last_eval_results", None)
    return {
        "step_seconds": trainer.step_seconds,
        "first_step": trainer.first_step,
        "reached": reached,
        "iterations": len(trainer.step_seconds),
        "results": {task: dict(figures) for task, figures in (results or {}).items()},
    }


def main(plan_path: str, result_path: str, *flags: str) -> None:
    """Trains the plan of a JSON file and writes what was measured."""
    plan = TrialPlan.from_dict(json.loads(Path(plan_path).read_text(encoding="utf-8")))
    Path(result_path).write_text(json.dumps(train(plan, "--stop-at-target" in flags)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
