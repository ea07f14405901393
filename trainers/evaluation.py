"""COCO evaluation of the model being trained: every worker detects on its share, rank 0 scores all detections."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pycocotools.mask
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_context
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn

from trainers.contract import clock
from trainers.contract.events import measured
from trainers.contract.plan import SAMPLES_FILE, TrialPlan
from trainers.loading import evaluation_loader, evaluation_records
from trainers.scoring import score
from trainers.scoring_input import IouType

NUM_SAMPLES = 6
"""Images, evenly spaced over the validation set, whose detections are written to a file for the report."""

MAX_MASKS_PER_CALL = 255
"""Masks per call: pycocotools 2.0.11 counts some arrays in 8 bits."""


PARTS: dict[IouType, str] = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
"""What the names of the figures begin with."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one evaluation (rank 0): the fields of `Evaluated` by the same names."""

    figures: dict[str, float | None]
    box_scored: float
    mask_scored: float | None
    part_seconds: dict[str, float]
    keypoint_scored: float | None = None

    @property
    def scored(self) -> float:
        """When all figures were known."""
        return max(filter(None, (self.box_scored, self.mask_scored, self.keypoint_scored)))


class Evaluator:
    """This worker's share of the validation images, and the scoring of all shares."""

    def __init__(self, cfg: CfgNode, plan: TrialPlan) -> None:
        self._cfg, self._plan = cfg, plan
        records = evaluation_records(cfg, plan)
        self.num_images = len(records)
        """Validation images over all workers."""
        self._loader = evaluation_loader(cfg, plan, records)
        shown = [record["image_id"] for record in records if record.get("annotations")] or [None]
        self._sample_ids = {shown[n * len(shown) // NUM_SAMPLES] for n in range(NUM_SAMPLES)}
        # The model's class indices are contiguous, COCO's category ids have gaps between them.
        contiguous = MetadataCatalog.get(plan.val.name).thing_dataset_id_to_contiguous_id
        self._category_ids = {index: category for category, index in contiguous.items()}

    @torch.no_grad()
    def run(self, model: nn.Module) -> Scores:
        """The scores of a model that is not wrapped for several workers; all of them call it together.

        Returns:
            The scores on rank 0; on other ranks the same without figures.
        """
        started = time.perf_counter()
        if self._cfg.TEST.AUG.ENABLED:
            model = GeneralizedRCNNWithTTA(self._cfg, model)
        detections: list[dict[str, Any]] = []
        with inference_context(model):
            for batch in self._loader:
                for record, output in zip(batch, model(batch), strict=True):
                    detections += self._detections(output["instances"], record["image_id"])
        detected = time.perf_counter()
        gathered = comm.gather(detections, dst=0)
        parts = {"inference": detected - started, "gather": time.perf_counter() - detected}
        if not comm.is_main_process():
            return Scores({}, clock.now(), None, parts)
        everything = [found for share in gathered for found in share]
        folder = Path(self._plan.trial_dir)
        (folder / "coco_instances_results.json").write_bytes(orjson.dumps(everything))
        samples = [found for found in everything if found["image_id"] in self._sample_ids]
        values = {"image_ids": sorted(self._sample_ids - {None}), "detections": samples}
        (folder / SAMPLES_FILE).write_text(json.dumps(values), encoding="utf-8")
        scoring_started = time.perf_counter()
        figures: dict[str, float | None] = {}
        known: dict[IouType, float] = {}
        for iou_type in scored_types(self._cfg):
            figures |= self._figures(iou_type, everything)
            known[iou_type] = clock.now()
        parts["score"] = time.perf_counter() - scoring_started
        return Scores(figures, known["bbox"], known.get("segm"), parts, known.get("keypoints"))

    def _detections(self, instances: Instances, image_id: int) -> list[dict[str, Any]]:
        if self._plan.recipe.batched_encoding:
            return coco_detections(instances, image_id, self._category_ids)
        found: list[dict[str, Any]] = instances_to_coco_json(instances.to("cpu"), image_id)
        for detection in found:
            detection["category_id"] = self._category_ids[detection["category_id"]]
        return found

    def _figures(self, iou_type: IouType, detections: list[dict[str, Any]]) -> dict[str, float | None]:
        sigmas = self._cfg.TEST.KEYPOINT_OKS_SIGMAS
        figures = score(self._plan.val.annotations, detections, iou_type, self._plan.recipe.scorer, sigmas)
        return {f"{PARTS[iou_type]}_{name}": measured(value) for name, value in figures.items()}


def scored_types(cfg: CfgNode) -> list[IouType]:
    """What is scored of a model's detections, in this order."""
    types: dict[IouType, bool] = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return [iou_type for iou_type, is_on in types.items() if is_on]


def coco_detections(instances: Instances, image_id: int, category_ids: Mapping[int, int]) -> list[dict[str, Any]]:
    """An image's detections in COCO's result format: detectron2's `instances_to_coco_json`, byte for byte, only faster.

    Args:
        instances: The model's output for one image: `pred_boxes`, `scores`, `pred_classes`, and where it has them
            `pred_masks` ((N, height, width), bool) and `pred_keypoints` ((N, K, 3): x, y, score); on any device.
        image_id: The image.
        category_ids: The data set's category id for each class index.

    Returns:
        For each detection `image_id`, `category_id`, `bbox` (x, y, width, height), `score`, `segmentation` (RLE,
        counts as text), and `keypoints` (K times x, y, score).
    """
    if not len(instances):
        return []
    corners = instances.pred_boxes.tensor
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    found: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[category], "bbox": box, "score": score}
        for category, box, score in zip(instances.pred_classes.tolist(), boxes, instances.scores.tolist(), strict=True)
    ]
    if instances.has("pred_masks"):
        for detection, rle in zip(found, encode(instances.pred_masks), strict=True):
            detection["segmentation"] = rle
    if instances.has("pred_keypoints"):
        # A model's coordinates are of a pixel's middle, COCO's are numbers of pixels.
        keypoints = instances.pred_keypoints - instances.pred_keypoints.new_tensor([0.5, 0.5, 0.0])
        for detection, numbers in zip(found, keypoints.flatten(start_dim=1).tolist(), strict=True):
            detection["keypoints"] = numbers
    return found


def encode(masks: torch.Tensor) -> list[dict[str, Any]]:
    """The RLE of each mask, its counts as text.

    pycocotools reads columns, and copies a mask in row order element by element: all masks of an image are transposed
    at once by torch, and encoded in one call.

    Args:
        masks: (N, height, width), bool, on any device.
    """
    columns = masks.transpose(1, 2).contiguous().cpu().view(torch.uint8).numpy()
    rles: list[dict[str, Any]] = []
    for first in range(0, len(columns), MAX_MASKS_PER_CALL):
        rles += pycocotools.mask.encode(columns[first : first + MAX_MASKS_PER_CALL].transpose(2, 1, 0))
    for rle in rles:
        rle["counts"] = rle["counts"].decode("ascii")
    return rles
