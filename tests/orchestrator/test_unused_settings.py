"""What a setting asks for in vain is a warning: parts that the model does not have, iterations that are not reached."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.experiment.reading import parse_experiment
from orchestrator.findings import Finding
from orchestrator.preflight.settings import check_settings
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment


def check(overrides: dict[str, Any], **changes: Any) -> list[Finding]:
    values = tiny_experiment(**changes)
    values["model"] = {"overrides": TINY_OVERRIDES | overrides}
    return check_settings(parse_experiment(values, "test"))


def test_an_override_that_detectron2_would_not_use_either_is_a_warning() -> None:
    findings = check({"DATALOADER.REPEAT_THRESHOLD": 0.9, "TEST.AUG.FLIP": False, "TEST.AUG.MAX_SIZE": 100})
    assert [(each.level, each.code, each.id) for each in findings] == [
        ("warning", "config_unused", "DATALOADER.REPEAT_THRESHOLD"),
        ("warning", "config_unused", "TEST.AUG.FLIP, TEST.AUG.MAX_SIZE"),
    ]
    assert "only where DATALOADER.SAMPLER_TRAIN is 'RepeatFactorTrainingSampler'" in findings[0].what


def test_a_batch_of_ones_with_the_learning_rate_of_the_zoos_is_a_warning() -> None:
    values = tiny_experiment(model={"overrides": {"SOLVER.IMS_PER_BATCH": 2}})
    (finding,) = check_settings(parse_experiment(values, "test"))
    assert (finding.level, finding.code) == ("warning", "config_learning_rate")
    assert "learning rate 0.02" in finding.what and finding.what.endswith("for 16") and "0.0025" in finding.hint
    values["protocol"] = {"kind": "throughput", "iterations": 5, "warmup_iterations": 2}
    assert check_settings(parse_experiment(values, "test")) == [], "a throughput does not depend on it"


@pytest.mark.parametrize(
    ("overrides", "key", "needed"),
    [
        ({"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 5}, None, "MODEL.KEYPOINT_ON is True"),
        ({"MODEL.ROI_BOX_CASCADE_HEAD.IOUS": [0.4, 0.5, 0.6]}, None, "MODEL.ROI_HEADS.NAME is 'CascadeROIHeads'"),
        ({"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value", "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 1.0},
         "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE is 'norm'"),
        ({"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.STEPS": []}, "SOLVER.STEPS", "is 'WarmupMultiStepLR'"),
    ],
    ids=str,
)  # fmt: skip
def test_an_override_of_a_part_that_the_model_does_not_have_is_a_warning(
    overrides: dict[str, Any], key: str | None, needed: str
) -> None:
    (finding,) = check(overrides)
    assert (finding.code, finding.id) == ("config_unused", key or next(iter(overrides))) and needed in finding.what


@pytest.mark.parametrize(
    ("changes", "overrides", "place", "words"),
    [
        ({}, {"SOLVER.STEPS": [6, 100]}, "SOLVER.STEPS", "iteration 100 is not reached: the run has 8"),
        ({}, {"SOLVER.WARMUP_ITERS": 9}, "SOLVER.WARMUP_ITERS", "iteration 9 is not reached: the run has 8"),
        ({"protocol": {"eval_period_iterations": 9}}, {}, "protocol.eval_period_iterations", "iteration 9 is not"),
        (
            {"protocol": {"kind": "throughput", "iterations": 20}}, {},
            "protocol.warmup_iterations", "no throughput is measured: it is that of the iterations after these",
        ),
        ({"trials": {"scaling": "strong", "reference_world_size": 2}}, {}, "trials.reference_world_size", "no effect"),
        ({}, {"SOLVER.REFERENCE_WORLD_SIZE": 2}, "trials.reference_world_size", "no effect: strong scaling"),
    ],
)  # fmt: skip
def test_what_is_never_reached_is_a_warning(
    changes: dict[str, Any], overrides: dict[str, Any], place: str, words: str
) -> None:
    (finding,) = check(overrides, **changes)
    assert finding.level == "warning" and place in (finding.file, finding.id) and words in finding.what
