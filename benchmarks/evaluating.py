"""Runs one evaluation, ours or detectron2's, of the same weights on the same images, and writes its seconds.

`python -m benchmarks.evaluating PLAN.json RESULT.json ours|peer`. The weights are random and the score threshold is
low, so that every image has as many detections as the config allows: the work of a trained model, without training.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset

from trainers import mask_rcnn
from trainers.contract.plan import TrialPlan
from trainers.evaluation import Evaluator
from trainers.speedups.apply import process_settings

SCORE_THRESHOLD = 0.0
ROUNDS = 3


def main(plan_path: str, result_path: str, side: str) -> None:
    """Evaluates a few times and writes the fastest round's seconds and the figures."""
    plan = TrialPlan.from_dict(json.loads(Path(plan_path).read_text(encoding="utf-8")))
    Path(plan.trial_dir).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(plan.cpus_per_worker)
    torch.manual_seed(plan.seed)
    cfg = mask_rcnn.build_config(plan)
    mask_rcnn.register(cfg, plan.train)
    mask_rcnn.register(cfg, plan.val)
    if side == "ours":
        model = mask_rcnn.build_detector(cfg, plan)
    else:
        from detectron2.modeling import build_model

        model = build_model(cfg)
    predictor: Any = model.get_submodule("roi_heads.box_predictor")
    predictor.test_score_thresh = SCORE_THRESHOLD
    rounds, figures = [], {}
    if side == "ours":
        evaluator = Evaluator(cfg, plan)
        with process_settings(plan.recipe, torch.device(plan.device)):
            for _ in range(ROUNDS):
                started = time.perf_counter()
                figures = evaluator.run(model, 0).figures
                rounds.append(time.perf_counter() - started)
    else:
        theirs = COCOEvaluator(plan.val.name, output_dir=plan.trial_dir)
        loader = build_detection_test_loader(cfg, plan.val.name)
        for _ in range(ROUNDS):
            started = time.perf_counter()
            results = inference_on_dataset(model, loader, theirs)
            rounds.append(time.perf_counter() - started)
            figures = {"box_ap": results["bbox"]["AP"], "mask_ap": results["segm"]["AP"]}
    Path(result_path).write_text(json.dumps({"seconds": min(rounds), "figures": figures}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
