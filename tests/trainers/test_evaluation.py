"""Detections on a batch are detectron2's, byte for byte, and wait for the device no more often than on one image."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from torch import nn

from tests.builders.training import plan_of
from tests.builders.waits import NoWaits, WaitError
from trainers import loading, mask_rcnn
from trainers.contract.plan import TrialPlan
from trainers.detections import IMAGE_FIELD, Detections, detect, to_host
from trainers.evaluation import Evaluator
from trainers.speedups import rle

CATEGORY_IDS = {0: 1, 1: 17, 2: 90}


class CountedWaits(NoWaits):
    """Counts what `NoWaits` refuses."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except WaitError:
            self.count += 1
            return func(*args, **(kwargs or {}))


def found(number: int, with_masks: bool = True) -> Instances:
    torch.manual_seed(number)
    instances = Instances((40, 57))
    corners = torch.rand(number, 2) * 20
    instances.pred_boxes = Boxes(torch.cat([corners, corners + torch.rand(number, 2) * 20], dim=1))
    instances.scores = torch.rand(number)
    instances.pred_classes = torch.randint(0, 3, (number,))
    instances.set(IMAGE_FIELD, torch.zeros(number, dtype=torch.int64))
    if with_masks:
        coarse = torch.rand(number, 1, 5, 7)
        instances.pred_masks = nn.functional.interpolate(coarse, (40, 57), mode="bilinear")[:, 0] > 0.5
        instances.pred_masks[: number // 4] = False
        instances.pred_masks[-1:] = True
        instances.pred_masks[1::5] = torch.rand(40, 57) > 0.5
    return instances


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[CfgNode, TrialPlan, nn.Module]:
    """A small model with random weights that finds as many objects in every image as it may."""
    plan = plan_of(tmp_path_factory.mktemp("evaluated"), "mask_rcnn")
    plan = dataclasses.replace(plan, overrides={**plan.overrides, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0})
    Path(plan.trial_dir).mkdir(parents=True)
    torch.set_num_threads(plan.cpus_per_worker)
    cfg = mask_rcnn.build_config(plan)
    mask_rcnn.register(cfg, plan.val)
    torch.manual_seed(0)
    return cfg, plan, mask_rcnn.build_detector(cfg, plan).eval()


def evaluation_images(cfg: CfgNode, plan: TrialPlan) -> list[dict[str, Any]]:
    mapper = loading.build_mapper(cfg, plan, is_train=False)
    return [image for record in loading.evaluation_records(cfg, plan) if (image := mapper(record))]


@pytest.mark.parametrize("number", [0, 1, 7, 300])
@pytest.mark.parametrize("with_masks", [True, False])
def test_detections_are_detectron2s_byte_for_byte(number: int, with_masks: bool) -> None:
    expected = instances_to_coco_json(found(number, with_masks), 42)
    for detection in expected:
        detection["category_id"] = CATEGORY_IDS[detection["category_id"]]
    assert json.dumps(to_host(found(number, with_masks), [42]).results(CATEGORY_IDS)) == json.dumps(expected)


@pytest.mark.parametrize("max_pixels", [1, 40 * 57 * 3])
def test_masks_can_be_encoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, max_pixels: int) -> None:
    masks = found(10).pred_masks
    whole = rle.changes(masks)
    monkeypatch.setattr(rle, "MAX_PIXELS", max_pixels)
    assert rle.changes(masks).equal(whole)


def test_runs_of_every_length_are_written_as_pycocotools_writes_them() -> None:
    masks = torch.zeros(3, 1, 2**20, dtype=torch.bool)
    masks[0, 0, 2 ** torch.arange(20)] = True
    masks[1, 0, 2**19 :] = True
    masks[2, 0, ::2] = True
    instances = Instances((1, 2**20), **{**found(3).get_fields(), "pred_masks": masks})
    expected = [detection["segmentation"] for detection in instances_to_coco_json(instances, 1)]
    assert rle.encode(rle.changes(masks), 3, 1, 2**20) == expected


def test_an_evaluation_writes_what_detectron2s_evaluator_writes(
    evaluated: tuple[CfgNode, TrialPlan, nn.Module], tmp_path: Path
) -> None:
    cfg, plan, model = evaluated
    Evaluator(cfg, plan).run(model, 0)
    ours = json.loads((Path(plan.trial_dir) / "coco_instances_results.json").read_bytes())
    theirs = COCOEvaluator(plan.val.name, output_dir=str(tmp_path), use_fast_impl=False)
    inference_on_dataset(model, build_detection_test_loader(cfg, plan.val.name), theirs)
    assert len(ours) == 4 * cfg.TEST.DETECTIONS_PER_IMAGE
    assert ours == json.loads((tmp_path / "coco_instances_results.json").read_bytes())


class Copied:
    """A stand-in for a GPU's event."""

    def synchronize(self) -> None:
        pass


def test_what_is_encoded_in_the_background_stays_in_order(
    evaluated: tuple[CfgNode, TrialPlan, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, plan, model = evaluated
    plan = dataclasses.replace(plan, val=plan.train)  # 16 images
    mask_rcnn.register(cfg, plan.val)
    written = []

    def on_gpu(model: nn.Module, batch: list[dict[str, Any]]) -> Detections:
        return dataclasses.replace(detect(model, batch), copied=cast(torch.cuda.Event, Copied()))

    for stand_in in (detect, on_gpu):
        monkeypatch.setattr("trainers.evaluation.detect", stand_in)
        Evaluator(cfg, plan).run(model, 0)
        written.append((Path(plan.trial_dir) / "coco_instances_results.json").read_bytes())
    assert written[0] == written[1] and len(json.loads(written[0])) == 16 * cfg.TEST.DETECTIONS_PER_IMAGE


def test_a_batch_is_detected_on_as_by_the_model_itself(evaluated: tuple[CfgNode, TrialPlan, nn.Module]) -> None:
    cfg, plan, model = evaluated
    images = evaluation_images(cfg, plan)
    with torch.no_grad():
        ours = detect(model, images).results(CATEGORY_IDS)
        theirs = zip(images, model(images), strict=True)
    expected = [found for image, out in theirs for found in instances_to_coco_json(out["instances"], image["image_id"])]
    for detection in expected:
        detection["category_id"] = CATEGORY_IDS[detection["category_id"]]
    assert len({each["image_id"] for each in ours}) == 4
    assert json.dumps(ours) == json.dumps(expected)


def test_a_batch_waits_for_the_device_as_often_as_an_image(
    evaluated: tuple[CfgNode, TrialPlan, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, plan, model = evaluated

    def paste(masks: torch.Tensor, boxes: torch.Tensor, shape: tuple[int, int], threshold: float) -> torch.Tensor:
        return torch.zeros(len(masks), *shape, dtype=torch.bool)  # on a CPU detectron2 waits for each mask

    monkeypatch.setattr("detectron2.layers.mask_ops.paste_masks_in_image", paste)
    images = evaluation_images(cfg, plan)
    waits = []
    for batch in (images[:1], images):
        with torch.no_grad(), CountedWaits() as inference:
            model.inference(batch, do_postprocess=False)  # type: ignore[operator]
        with torch.no_grad(), CountedWaits() as whole:
            assert isinstance(detect(model, batch), Detections)
        waits.append(whole.count - inference.count)
    assert waits[0] == waits[1] <= 7
