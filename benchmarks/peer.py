"""Plain detectron2 on the same work: `DefaultTrainer`, set up as its `tools/train_net.py` does, in one process.

`python -m benchmarks.peer PLAN.json RESULT.json [--stop-at-target]`. The config is the one that our plan resolves to,
so model, data, schedule and evaluation are the same; nothing else is changed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
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
from trainers.contract.targets import all_met
from trainers.evaluation import Scores


class TargetReached(Exception):  # noqa: N818 - not an error
    """Both targets are met."""


class PlainTrainer(DefaultTrainer):
    """DefaultTrainer as tools/train_net.py has it, with a clock around each step."""

    last_results: dict[str, dict[str, float]] = {}  # noqa: RUF012 - set by `test`, which is a class method
    """Figures of the last evaluation by task, as detectron2 names them."""

    def __init__(self, cfg: Any, wait: Callable[[], None]) -> None:
        super().__init__(cfg)
        self.step_seconds: list[float] = []
        self.first_step: float | None = None
        self.wait = wait

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str, output_folder: str | None = None) -> COCOEvaluator:
        """COCO's, with its file of detections."""
        return COCOEvaluator(dataset_name, output_dir=output_folder or str(Path(cfg.OUTPUT_DIR, "inference")))

    @classmethod
    def test(cls, cfg: Any, model: Any, evaluators: Any = None) -> dict[str, dict[str, float]]:
        """Evaluates, and keeps the results."""
        cls.last_results = super().test(cfg, model, evaluators)
        return cls.last_results

    def build_hooks(self) -> list[HookBase]:
        """Those of DefaultTrainer, without an evaluation where there is nothing to evaluate on."""
        hooks = super().build_hooks()
        return hooks if self.cfg.DATASETS.TEST else [hook for hook in hooks if not isinstance(hook, EvalHook)]

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


class StopAtTarget(HookBase):
    """Ends training once the last evaluation has met the plan's targets."""

    def __init__(self, plan: TrialPlan) -> None:
        self.plan = plan

    def after_step(self) -> None:
        """Checks the last evaluation."""
        results = self.trainer.last_results
        figures = {"box_ap": results.get("bbox", {}).get("AP"), "mask_ap": results.get("segm", {}).get("AP")}
        if all_met(Scores(figures, 0.0, None, {}), self.plan):
            raise TargetReached


def build_trainer(plan: TrialPlan, before_step: Callable[[], None]) -> PlainTrainer:
    """Plain detectron2 about to train the plan; `before_step` is called before every step."""
    torch.set_num_threads(plan.cpus_per_worker)
    torch.manual_seed(plan.seed)
    Path(plan.trial_dir).mkdir(parents=True, exist_ok=True)
    setup_logger(plan.trial_dir)
    cfg = mask_rcnn.build_config(plan)
    mask_rcnn.register(cfg, plan.train)
    mask_rcnn.register(cfg, plan.val)
    cfg.defrost()
    if not (plan.solver.evaluate_at_end or plan.solver.eval_period):
        cfg.DATASETS.TEST = ()
    # detectron2 divides by the period, so that none is written only with a period beyond the end.
    cfg.SOLVER.CHECKPOINT_PERIOD = plan.solver.checkpoint_period or plan.solver.max_iter + 1
    cfg.freeze()
    trainer = PlainTrainer(cfg, before_step)
    trainer.resume_or_load(resume=False)
    return trainer


def train(plan: TrialPlan, stop_at_target: bool) -> dict[str, Any]:
    """Trains the plan with plain detectron2; returns the measurements."""
    trainer = build_trainer(plan, turns.waiting())
    if stop_at_target:
        trainer.register_hooks([StopAtTarget(plan)])
    reached = False
    try:
        trainer.train()
    except TargetReached:
        reached = True
    return {
        "step_seconds": trainer.step_seconds,
        "first_step": trainer.first_step,
        "reached": reached,
        "iterations": len(trainer.step_seconds),
        "results": {task: dict(figures) for task, figures in trainer.last_results.items()},
    }


def main(plan_path: str, result_path: str, *flags: str) -> None:
    """Trains the plan of a JSON file and writes the measurements."""
    plan = TrialPlan.from_dict(json.loads(Path(plan_path).read_text(encoding="utf-8")))
    Path(result_path).write_text(json.dumps(train(plan, "--stop-at-target" in flags)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
