"""Every key of the installed detectron2 is honoured, mapped to a field of ours, or refused; and only some values."""

from __future__ import annotations

import functools
from itertools import chain
from typing import Any, get_args

import pytest

from orchestrator.experiment.config_keys import (
    CHOICES,
    CONDITIONS,
    HONOURED,
    LIMITS,
    MAPPED,
    NONEMPTY,
    NULLABLE,
    REASONS,
    REFUSED,
    REPLACED,
    class_of,
    value_hint,
    value_problem,
)
from orchestrator.experiment.detectron_config import default_values
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import Experiment
from tests.builders.commands import ROOT
from tests.builders.experiments import tiny_experiment


@pytest.mark.parametrize("key", sorted(default_values()))
def test_every_key_of_detectron2_is_in_one_table(key: str) -> None:
    def holds(table: object) -> int:
        assert isinstance(table, dict | tuple)
        return sum(name == key or (name.endswith(".") and key.startswith(name)) for name in table)

    # A key that is refused or mapped may lie under a group that is honoured, never be in the same table twice.
    assert holds(HONOURED) + holds(MAPPED) + holds(REFUSED) >= 1, "a new key: find out what it does, and classify it"
    assert max(holds(HONOURED), holds(MAPPED), holds(REFUSED)) == 1 and not (holds(MAPPED) and holds(REFUSED))
    assert class_of(key)[0] in ("honoured", "mapped", "refused")
    assert value_problem(key, default_values()[key]) is None, "detectron2's own default can be used"


@pytest.mark.parametrize(
    "table",
    [HONOURED, MAPPED, REFUSED, REPLACED, CHOICES, LIMITS, NONEMPTY, NULLABLE],
    ids=lambda t: t.__class__,
)
def test_no_table_names_a_key_that_detectron2_does_not_have(table: dict[str, object]) -> None:
    keys = default_values()
    assert [name for name in table if not any(key == name or key.startswith(f"{name}") for key in keys)] == []
    assert [name for name in table if not name.endswith(".") and name not in keys] == []
    for start, (key, wanted) in CONDITIONS.items():
        assert key in keys and all(value_problem(key, value) is None for value in wanted)
        assert any(name.startswith(start) for name in keys)
    for key, value in REASONS:
        assert value not in CHOICES[key]


@pytest.mark.parametrize("field", sorted({*MAPPED.values(), *chain(*REPLACED.values())}))
def test_a_key_is_mapped_to_a_field_that_exists(field: str) -> None:
    model: Any = Experiment
    for name in field.removesuffix(".precision").split("."):
        annotation = model.model_fields[name].annotation
        model = next((each for each in (annotation, *get_args(annotation)) if hasattr(each, "model_fields")), None)


def test_the_page_on_settings_names_every_mapped_and_every_refused_key() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    for key, field in MAPPED.items():
        assert f"`{key}`" in page and f"`{field}`" in page, key
    for key in REFUSED:
        assert f"`{key.rstrip('.')}" in page, key


def test_the_parts_that_can_be_named_are_those_that_detectron2_registers() -> None:
    from detectron2.modeling import (
        BACKBONE_REGISTRY,
        META_ARCH_REGISTRY,
        PROPOSAL_GENERATOR_REGISTRY,
        ROI_HEADS_REGISTRY,
    )
    from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
    from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
    from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY
    from detectron2.modeling.roi_heads.keypoint_head import ROI_KEYPOINT_HEAD_REGISTRY
    from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY

    registries = {
        "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
        "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
        "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
        "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
        "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
        "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
        "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
        "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
        "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    }
    for key, registry in registries.items():
        known = {name for name, part in registry if part.__module__.startswith("detectron2.")}
        ours = {*CHOICES[key], *(value for name, value in REASONS if name == key)}
        assert known <= ours, key
        assert ours - known <= {"", "PrecomputedProposals"}, key  # "" and a name that is handled without a registry


@pytest.mark.parametrize(
    ("key", "value", "problem", "hint"),
    [
        ("SOLVER.MAX_ITER", 1e3, "its value 1000.0 is not of the type", "Write a value like 1000"),
        ("SOLVER.MAX_ITER", 10**400, "is out of range", "Write a value like 40000"),
        ("SOLVER.BASE_LR", 1, "its value 1 is not of the type", "Write a value like 1.0"),
        ("SOLVER.STEPS", 3, "its value 3 is not of the type", "Write a value like [3]"),
        ("SOLVER.STEPS", ["a"], "its value ['a'] is not of the type", "Write a value like [30000]"),
        ("MODEL.PIXEL_STD", [1.0, float("nan"), 1.0], "is out of range", "Write a value like [1.0, 1.0, 1.0]"),
        ("INPUT.MIN_SIZE_TRAIN", [], "is empty", "Write a value like [800]"),
        ("MODEL.WEIGHTS", None, "its value None is not of the type", "Write a value like ''"),
        ("MODEL.MASK_ON", 1, "its value 1 is not of the type", "Write a value like False"),
        ("INPUT.RANDOM_FLIP", "both", "both is not one of detectron2's", "Take 'horizontal' or 'vertical' or 'none'"),
        ("SOLVER.GAMMA", -0.1, "is out of range: at least 0", "Write a value like 0.1"),
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", -1, "is out of range: at least 1", "Write a value like 512"),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", 10**30, "at least 0 and at most 1,000,000,000", "Write a value like 1000"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [-16]], "at least 0", "Write a value like [[32, 64, 128, 256, 512]]"),
        ("MODEL.RPN.CONV_DIMS", [-1, 64], None, None),
        ("MODEL.BACKBONE.FREEZE_AT", -1, None, None),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", float("inf"), None, None),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", 0.0, "is out of range: at least 0.1", "Write a value like 2.0"),
        ("SOLVER.BASE_LR", 1e308, "is out of range", "Write a value like 0.001"),
        ("SOLVER.WEIGHT_DECAY_BIAS", True, "its value True is not of the type", "Write a value like None"),
        ("SOLVER.WEIGHT_DECAY_BIAS", None, None, None),
        ("SOLVER.WEIGHT_DECAY_BIAS", 0.0, None, None),
        ("SOLVER.STEPS", [], None, None),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]], None, None),
        ("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [512], None, None),
    ],
    ids=str,
)
def test_a_value_is_one_that_detectron2_takes(key: str, value: object, problem: str | None, hint: str | None) -> None:
    found = value_problem(key, value)
    if problem is None:
        assert found is None
    else:
        assert found is not None and problem in found and value_hint(key, value) == hint


def test_the_workers_config_has_every_key_that_the_driver_knows() -> None:
    from pathlib import Path

    from orchestrator.experiment.plan import Hardware, expand
    from trainers.mask_rcnn import build_config

    (plan,) = expand(parse_experiment(tiny_experiment(), "test"), Hardware(), "/runs/x", Path("/data"))
    cfg = build_config(plan)
    for key in default_values():
        functools.reduce(getattr, key.split("."), cfg)
