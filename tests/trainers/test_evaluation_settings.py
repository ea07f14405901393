"""What detectron2's config says about evaluations is done: precise batch norm before them, test-time augmentation."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from tests.builders.training import last, plan_of, train
from trainers import loading, mask_rcnn
from trainers.contract.events import Evaluated, LoopFinished
from trainers.contract.plan import TrialPlan
from trainers.contract.problems import ConfigurationError
from trainers.evaluation import Evaluator
from trainers.precise_bn import precise_batch_norm
from trainers.recipes import PLAIN
from trainers.training_order import training_epoch

PRECISE = {"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 3}
AUGMENTED = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": [48, 64, 80], "TEST.AUG.FLIP": True}
REPEATED = {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD": 0.9}


def with_overrides(plan: TrialPlan, overrides: dict[str, Any]) -> TrialPlan:
    return dataclasses.replace(plan, overrides={**plan.overrides, **overrides})


def built(plan: TrialPlan) -> tuple[CfgNode, nn.Module]:
    cfg = mask_rcnn.build_config(plan)
    mask_rcnn.register(cfg, plan.train)
    mask_rcnn.register(cfg, plan.val)
    torch.manual_seed(0)
    return cfg, mask_rcnn.build_detector(cfg, plan)


def update_of(plan: TrialPlan, cfg: CfgNode, model: nn.Module) -> Any:
    records = loading.training_records(cfg, plan)
    images = loading.training_images(cfg, plan, records, model)
    return precise_batch_norm(cfg, plan, model, images, training_epoch(cfg, records, plan.seed), rank=0)


@pytest.mark.train
@pytest.mark.parametrize("model_name", ["mask_rcnn", "retinanet"])
def test_precise_statistics_are_a_function_of_weights_seed_and_iteration_alone(tmp_path: Path, model_name: str) -> None:
    plan = with_overrides(plan_of(tmp_path, model_name), PRECISE)
    cfg, model = built(plan)
    for module in model.modules():
        if isinstance(module, DenseDetector):
            module.loss_normalizer = 123.0
    before = copy.deepcopy(model.state_dict())
    places = [buffer.data_ptr() for buffer in model.buffers()]
    update = update_of(plan, cfg, model)
    update(4)
    assert [buffer.data_ptr() for buffer in model.buffers()] == places, "a CUDA graph goes on with these"
    first = copy.deepcopy(model.state_dict())
    changed = {name.rpartition(".")[2] for name, value in first.items() if not value.equal(before[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    for other in (8, 4):  # what was shown in between leaves no trace
        update(other)
        found = {name: value for name, value in model.state_dict().items() if "running" in name}
        assert all(value.equal(first[name]) for name, value in found.items()) == (other == 4)
    assert all(m.momentum == 0.1 and m.training for m in get_bn_modules(model))
    assert {m.loss_normalizer for m in model.modules() if isinstance(m, DenseDetector)} <= {123.0}


@pytest.mark.train
def test_precise_statistics_are_the_means_over_all_batches(tmp_path: Path) -> None:
    plan = with_overrides(plan_of(tmp_path, "mask_rcnn"), PRECISE)
    cfg, model = built(plan)
    stem: Any = model.get_submodule("backbone.bottom_up.stem.conv1.norm")
    seen: list[torch.Tensor] = []
    hook = stem.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].transpose(0, 1).flatten(1)))
    update_of(plan, cfg, model)(4)
    hook.remove()
    pixels = torch.cat(seen, dim=1).double()
    assert len(seen) == 3
    torch.testing.assert_close(stem.running_mean.double(), pixels.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stem.running_var.double(), pixels.var(1, correction=0), rtol=1e-3, atol=1e-4)


def test_without_batch_norm_precise_statistics_have_no_effect_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = with_overrides(plan_of(tmp_path, "mask_rcnn"), {**PRECISE, "MODEL.RESNETS.NORM": "FrozenBN"})
    cfg, model = built(plan)
    assert update_of(plan, cfg, model) is None
    assert "TEST.PRECISE_BN: has no effect" in caplog.text


@pytest.mark.train
@pytest.mark.parametrize("model_name", ["mask_rcnn", "retinanet"])
@pytest.mark.parametrize("recipe", [{}, {"overlapped_evaluation": True}], ids=str)
def test_a_rank_that_died_goes_on_exactly_with_repeats_and_precise_statistics(
    tmp_path: Path, model_name: str, recipe: dict[str, bool]
) -> None:
    plan = with_overrides(plan_of(tmp_path, model_name), {**PRECISE, **REPEATED})
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, **recipe))
    healthy = train(plan)
    broken = dataclasses.replace(plan, checkpoint_dir=str(tmp_path / "broken"))
    train(broken, stop_at=6)  # an evaluation, which the next start makes first
    resumed = train(broken, attempt=1)
    assert last(resumed, LoopFinished).state_sha256 == last(healthy, LoopFinished).state_sha256
    assert [e.iteration for e in resumed if isinstance(e, Evaluated)] == [6, 12]
    assert last(resumed, Evaluated).figures == last(healthy, Evaluated).figures
    assert last(healthy, Evaluated).part_seconds["precise_bn"] > 0
    without = with_overrides(plan, {"TEST.PRECISE_BN.ENABLED": False})
    other = train(dataclasses.replace(without, checkpoint_dir=str(tmp_path / "without")))
    assert last(other, LoopFinished).state_sha256 != last(healthy, LoopFinished).state_sha256
    assert "precise_bn" not in last(other, Evaluated).part_seconds


@pytest.mark.train
def test_with_test_time_augmentation_every_evaluation_detects_on_all_versions_of_an_image(tmp_path: Path) -> None:
    plan = dataclasses.replace(with_overrides(plan_of(tmp_path, "mask_rcnn"), AUGMENTED), recipe=PLAIN)
    cfg, model = built(plan)
    Path(plan.trial_dir).mkdir(parents=True)
    Evaluator(cfg, plan).run(model, 0)
    found = json.loads((Path(plan.trial_dir) / "coco_instances_results.json").read_text())
    assert model.training, "it is left as it was"

    model.eval()
    expected = []
    for batch in loading.evaluation_loader(cfg, plan, loading.evaluation_records(cfg, plan)):
        with torch.no_grad():
            outputs = GeneralizedRCNNWithTTA(cfg, model)(batch.inputs)
        for record, output in zip(batch.inputs, outputs, strict=True):
            expected += instances_to_coco_json(output["instances"], record["image_id"])
    assert expected and [(f["bbox"], f["score"]) for f in found] == [(e["bbox"], e["score"]) for e in expected]
    assert [f["segmentation"] for f in found] == [e["segmentation"] for e in expected]


@pytest.mark.parametrize("model_name", ["mask_rcnn", "retinanet"])
def test_test_time_augmentation_is_refused_where_detectron2_has_none(tmp_path: Path, model_name: str) -> None:
    plan = with_overrides(plan_of(tmp_path, model_name), AUGMENTED)
    plan = with_overrides(plan, {"MODEL.KEYPOINT_ON": True} if model_name == "mask_rcnn" else {})
    with pytest.raises(ConfigurationError, match=r"TEST\.AUG\.ENABLED: .*R-CNN models without keypoints"):
        mask_rcnn.build_config(plan)
