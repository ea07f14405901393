"""COCO evaluation of the model being trained: every worker detects on its share, rank 0 scores all detections."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_context
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from trainers.batching import Record
from trainers.class_scores import Scored
from trainers.contract import clock
from trainers.contract.evaluation_details import DETAILS_FOLDER, MIN_SCORE, ClassCurve, EvaluationDetails
from trainers.contract.events import measured
from trainers.contract.plan import TrialPlan
from trainers.detections import detect
from trainers.loading import evaluation_loader, evaluation_records
from trainers.matches import match, read_objects
from trainers.scoring import score_classes
from trainers.scoring_input import IouType
from trainers.validation_loss import ValidationLoss

NUM_SAMPLES = 6
"""Images, evenly spaced over the validation set, whose detections every evaluation keeps for the report."""

MAX_PENDING = 2
"""Batches whose detections are encoded while a GPU detects on the next one."""

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
    class_ap: dict[str, float | None] = field(default_factory=dict)
    validation_losses: dict[str, float] = field(default_factory=dict)
    details_file: str = ""

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
        self._loss = ValidationLoss(cfg, plan) if plan.validation_loss else None
        shown = [record["image_id"] for record in records if record.get("annotations")] or [None]
        self._sample_ids = {shown[n * len(shown) // NUM_SAMPLES] for n in range(NUM_SAMPLES)}
        # The model's class indices are contiguous, COCO's category ids have gaps between them.
        contiguous = MetadataCatalog.get(plan.val.name).thing_dataset_id_to_contiguous_id
        self._category_ids = {index: category for category, index in contiguous.items()}

    @torch.no_grad()
    def run(self, model: nn.Module, iteration: int) -> Scores:
        """The scores of a model that is not wrapped for several workers; all of them call it together.

        Args:
            model: The model.
            iteration: Iterations it was trained for; names the file of details.

        Returns:
            The scores on rank 0; on other ranks the same without figures.
        """
        started = time.perf_counter()
        losses = self._loss.run(model) if self._loss else {}
        parts = {"loss": time.perf_counter() - started} if self._loss else {}
        started = time.perf_counter()
        if self._cfg.TEST.AUG.ENABLED:
            model = GeneralizedRCNNWithTTA(self._cfg, model)
        with inference_context(model):
            found = self._in_background(model) if self._plan.recipe.batched_encoding else self._one_by_one(model)
            detections = [detection for batch in found for detection in batch]
        detected = time.perf_counter()
        gathered = comm.gather(detections, dst=0)
        parts |= {"inference": detected - started, "gather": time.perf_counter() - detected}
        if not comm.is_main_process():
            return Scores({}, clock.now(), None, parts)
        everything = [found for share in gathered for found in share]
        Path(self._plan.trial_dir, "coco_instances_results.json").write_bytes(orjson.dumps(everything))
        scoring_started = time.perf_counter()
        scored, known = {}, {}
        for iou_type in scored_types(self._cfg):
            scored[PARTS[iou_type]] = self._score(iou_type, everything)
            known[iou_type] = clock.now()
        parts["score"] = time.perf_counter() - scoring_started
        file = self._write_details(iteration, {part: each.curves for part, each in scored.items()}, everything)
        parts["details"] = time.perf_counter() - scoring_started - parts["score"]
        return Scores(
            figures=_joined("_", {part: each.figures for part, each in scored.items()}),
            box_scored=known["bbox"],
            mask_scored=known.get("segm"),
            part_seconds=parts,
            keypoint_scored=known.get("keypoints"),
            class_ap=_joined("_ap/", {part: each.class_ap for part, each in scored.items()}),
            validation_losses=losses,
            details_file=file,
        )

    def _write_details(
        self, iteration: int, curves: dict[str, tuple[ClassCurve, ...]], detections: list[dict[str, Any]]
    ) -> str:
        """Writes the file of an evaluation's details; returns its path within the trial's folder."""
        objects = read_objects(self._plan.val.annotations)
        matches = match(objects, detections)
        sample_ids = tuple(sorted(self._sample_ids - {None}))
        shown = {*sample_ids, *(image.image_id for image in matches.worst_images)}
        certain = [each for each in detections if each["image_id"] in shown and each["score"] >= MIN_SCORE]
        details = EvaluationDetails(
            iteration=iteration,
            classes=objects.class_names,
            curves=curves,
            confusion=matches.confusion,
            worst_images=matches.worst_images,
            sample_ids=sample_ids,
            detections=tuple(sorted(certain, key=lambda each: -each["score"])),
        )
        file = f"{DETAILS_FOLDER}/{iteration:07d}.json"
        path = Path(self._plan.trial_dir, file)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(details.to_json(), encoding="utf-8")
        part.replace(path)
        return file

    def _batches(self) -> Iterator[list[Record]]:
        for batch in self._loader:
            yield cast("list[Record]", batch.inputs)  # none is padded

    def _one_by_one(self, model: nn.Module) -> Iterator[list[dict[str, Any]]]:
        """The detections on each image, by detectron2's own functions."""
        for batch in self._batches():
            for record, output in zip(batch, model(batch), strict=True):
                found: list[dict[str, Any]] = instances_to_coco_json(output["instances"].to("cpu"), record["image_id"])
                for detection in found:
                    detection["category_id"] = self._category_ids[detection["category_id"]]
                yield found

    def _in_background(self, model: nn.Module) -> Iterator[list[dict[str, Any]]]:
        """The same detections on each batch; on a GPU, they are encoded while it detects on the next batches."""
        pending: deque[Future[list[dict[str, Any]]]] = deque()
        with ThreadPoolExecutor(1) as encoder:
            for batch in self._batches():
                found = detect(model, batch)
                if found.copied is None:
                    yield found.results(self._category_ids)
                    continue
                pending.append(encoder.submit(found.results, self._category_ids))
                if len(pending) > MAX_PENDING:
                    yield pending.popleft().result()
            for future in pending:
                yield future.result()

    def _score(self, iou_type: IouType, detections: list[dict[str, Any]]) -> Scored:
        sigmas = self._cfg.TEST.KEYPOINT_OKS_SIGMAS
        return score_classes(self._plan.val.annotations, detections, iou_type, self._plan.recipe.scorer, sigmas)


def scored_types(cfg: CfgNode) -> list[IouType]:
    """What is scored of a model's detections, in this order."""
    types: dict[IouType, bool] = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return [iou_type for iou_type, is_on in types.items() if is_on]


def _joined(middle: str, values: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    """Values by two names as values by one; what is not finite was not measured."""
    return {f"{part}{middle}{name}": measured(value) for part, each in values.items() for name, value in each.items()}
