"""COCO evaluation of the model being trained: every worker detects on its share, rank 0 scores them all."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_context
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn

from trainers.contract.events import measured
from trainers.contract.plan import SAMPLES_FILE, TrialPlan
from trainers.detections import coco_detections
from trainers.loading import evaluation_loader, evaluation_records
from trainers.scoring import IouType, score

NUM_SAMPLES = 6
"""Images, evenly spaced over the validation set, whose detections are kept apart for the report."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What rank 0 found.

    Attributes:
        figures: COCO's twelve figures for boxes (`box_…`) and masks (`mask_…`), 0–100; None where not measured.
        box_scored: When the box figures were known (Unix seconds).
        mask_scored: When the mask figures were known; None for a model without masks.
        part_seconds: Seconds by part: `inference`, `gather`, `score`.
    """

    figures: dict[str, float | None]
    box_scored: float
    mask_scored: float | None
    part_seconds: dict[str, float]


class Evaluator:
    """This worker's share of the validation images, and the scoring of all shares.

    Args:
        cfg: detectron2's config.
        plan: The trial.

    Attributes:
        num_images: Validation images over all workers.
    """

    def __init__(self, cfg: CfgNode, plan: TrialPlan) -> None:
        self._plan = plan
        self._with_masks: bool = cfg.MODEL.MASK_ON
        records = evaluation_records(cfg, plan)
        self.num_images = len(records)
        self._loader = evaluation_loader(cfg, plan, records)
        shown = [record["image_id"] for record in records if record.get("annotations")] or [None]
        self._sample_ids = {shown[n * len(shown) // NUM_SAMPLES] for n in range(NUM_SAMPLES)}
        # The model's class indices are contiguous, COCO's category ids have gaps.
        contiguous = MetadataCatalog.get(plan.val.name).thing_dataset_id_to_contiguous_id
        self._category_ids = {index: category for category, index in contiguous.items()}

    @torch.no_grad()
    def run(self, model: nn.Module) -> Scores:
        """Detects and scores; all workers call it together.

        Args:
            model: The model, not wrapped in DistributedDataParallel.

        Returns:
            The scores on rank 0; on other ranks the same without figures.
        """
        started = time.perf_counter()
        detections: list[dict[str, Any]] = []
        with inference_context(model):
            for batch in self._loader:
                for record, output in zip(batch, model(batch), strict=True):
                    detections += self._detections(output["instances"], record["image_id"])
        detected = time.perf_counter()
        gathered = comm.gather(detections, dst=0)
        parts = {"inference": detected - started, "gather": time.perf_counter() - detected}
        if not comm.is_main_process():
            return Scores({}, time.time(), None, parts)
        everything = [found for share in gathered for found in share]
        results = Path(self._plan.trial_dir, "coco_instances_results.json")
        results.write_bytes(orjson.dumps(everything))
        samples = [found for found in everything if found["image_id"] in self._sample_ids]
        values = {"image_ids": sorted(self._sample_ids - {None}), "detections": samples}
        Path(self._plan.trial_dir, SAMPLES_FILE).write_text(json.dumps(values), encoding="utf-8")
        scoring_started = time.perf_counter()
        figures = self._figures("box", everything)
        box_scored, mask_scored = time.time(), None
        if self._with_masks:
            figures |= self._figures("mask", everything)
            mask_scored = time.time()
        parts["score"] = time.perf_counter() - scoring_started
        return Scores(figures, box_scored, mask_scored, parts)

    def _detections(self, instances: Instances, image_id: int) -> list[dict[str, Any]]:
        if self._plan.recipe.batched_encoding:
            return coco_detections(instances, image_id, self._category_ids)
        found: list[dict[str, Any]] = instances_to_coco_json(instances.to("cpu"), image_id)
        for detection in found:
            detection["category_id"] = self._category_ids[detection["category_id"]]
        return found

    def _figures(self, part: Literal["box", "mask"], detections: list[dict[str, Any]]) -> dict[str, float | None]:
        iou_type: IouType = "bbox" if part == "box" else "segm"
        figures = score(self._plan.val.annotations, detections, iou_type, self._plan.recipe.scorer)
        return {f"{part}_{name}": measured(value) for name, value in figures.items()}
