"""A setting of detectron2 is honoured, or reported with its place, the reason and the field that decides instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.experiment.config_keys import MAPPED, REFUSED
from orchestrator.experiment.detectron_config import default_values, zoo_folder
from orchestrator.experiment.reading import parse_experiment
from orchestrator.findings import Finding
from orchestrator.preflight.settings import check_settings
from tests.builders.commands import run_command
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment, write_experiment

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def check(overrides: dict[str, Any] | None = None, config: str = MASK_RCNN, **changes: Any) -> list[Finding]:
    values = tiny_experiment(**changes)
    values["model"] = {"config": config, "overrides": TINY_OVERRIDES | (overrides or {})}
    return check_settings(parse_experiment(values, "test"))


def problems(overrides: dict[str, Any] | None = None, config: str = MASK_RCNN) -> list[Finding]:
    """What is found but for overrides of the tiny model that a config's model does not use."""
    return [each for each in check(overrides, config) if each.code != "config_unused"]


def own(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(f"_BASE_: {zoo_folder()}/{MASK_RCNN}\n{text}", encoding="utf-8")
    return str(path)


def test_what_the_shipped_experiments_set_is_honoured() -> None:
    from orchestrator.experiment.reading import load_experiment
    from orchestrator.experiment.spec import CONFIGS

    for path in sorted(CONFIGS.glob("*.yaml")):
        assert check_settings(load_experiment(path)) == [], path.name


IGNORED = {
    "TEST.EVAL_PERIOD": (2, "protocol.eval_period_iterations=2"),
    "TEST.EXPECTED_RESULTS": ([["bbox", "AP", 38.5, 0.2]], "protocol.target_box_ap"),
    "SOLVER.AMP.ENABLED": (True, "trials.switches.precision=amp"),
    "SEED": (7, "trials.seeds=[7]"),
    "MODEL.DEVICE": ("cuda", "resources.device=cuda"),
    "OUTPUT_DIR": ("/tmp/elsewhere", "storage.path=/tmp/elsewhere"),
    "DATASETS.TRAIN": (["my_train"], "data"),
    "DATASETS.TEST": (["my_val"], "data"),
}


@pytest.mark.parametrize("key", MAPPED)
def test_an_override_without_effect_is_an_error_that_names_our_field(key: str) -> None:
    value, field = IGNORED[key]
    (finding,) = check({key: value})
    assert (finding.level, finding.code, finding.file, finding.id) == ("error", "config_mapped", "model.overrides", key)
    assert MAPPED[key] in finding.what and finding.hint == f"Leave it out and set {field}"


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("TEST.EVAL_PERIOD", 0, "protocol.eval_period_iterations=null"),
        ("MODEL.DEVICE", "cuda:1", "resources.device=cuda"),
        ("SEED", -1, "trials.seeds"),
    ],
)
def test_the_field_named_takes_the_value_that_is_shown(key: str, value: object, field: str) -> None:
    (finding,) = check({key: value})
    assert finding.hint == f"Leave it out and set {field}"


@pytest.mark.parametrize("key", [key for key in default_values() if any(key.startswith(name) for name in REFUSED)])
def test_an_override_that_is_refused_says_why_unless_it_is_what_is_done_anyway(key: str) -> None:
    default = default_values()[key]
    assert check({key: default}) == []
    if isinstance(default, list | tuple):
        other: Any = ["p2"]
    elif isinstance(default, str | bool):
        other = "BN" if isinstance(default, str) else not default
    else:
        other = type(default)(default + 1)
    (finding,) = check({key: other})
    assert (finding.level, finding.code) == ("error", "config_refused") and "has no effect here: " in finding.what


def test_an_override_that_says_what_our_fields_say_passes() -> None:
    overrides = {
        "TEST.EVAL_PERIOD": 4,
        "SEED": 3,
        "MODEL.DEVICE": "cpu",
        "OUTPUT_DIR": "runs",
        "SOLVER.AMP.ENABLED": True,
        "DATALOADER.NUM_WORKERS": 2,
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    }
    trials = {"scaling": "strong", "seeds": [3], "switches": {"precision": "amp"}}
    resources = {"device": "cpu", "loader_workers": 2}
    assert check(overrides, trials=trials, resources=resources, storage={}) == []


def test_a_key_that_a_field_of_ours_replaces_is_an_error() -> None:
    values = tiny_experiment(resources={"device": "cpu", "loader_workers": 1})
    keys = {
        "MODEL.WEIGHTS": "other.pth",
        "MODEL.ROI_HEADS.NUM_CLASSES": 7,
        "DATALOADER.NUM_WORKERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "SOLVER.REFERENCE_WORLD_SIZE": 4,
    }
    values["model"] = {"weights": "", "overrides": TINY_OVERRIDES | keys}
    values["trials"] = {"scaling": "weak", "reference_world_size": 1}
    findings = check_settings(parse_experiment(values, "test"))
    assert [(each.level, each.code, each.id) for each in findings] == [
        ("error", "config_replaced", key) for key in keys
    ]
    assert "data.generated.num_classes is 3 and replaces it" in findings[1].what


def test_what_a_file_sets_without_effect_is_a_warning_with_its_line(tmp_path: Path) -> None:
    text = "DATASETS: {TRAIN: [my_train]}\nSEED: 1\nTEST:\n  EVAL_PERIOD: 500\nVIS_PERIOD: 10\nOUTPUT_DIR: ./output\n"
    findings = check(config=own(tmp_path, text))
    assert [(each.level, each.id.split(": ")) for each in findings] == [
        ("warning", ["line 2", "DATASETS.TRAIN"]),
        ("warning", ["line 3", "SEED"]),
        ("warning", ["line 5", "TEST.EVAL_PERIOD"]),
        ("warning", ["line 6", "VIS_PERIOD"]),
    ], "OUTPUT_DIR is detectron2's default"


def test_what_a_field_of_ours_replaces_in_a_file_is_a_warning_unless_it_is_the_default(tmp_path: Path) -> None:
    path = own(tmp_path, "MODEL: {RETINANET: {NUM_CLASSES: 7}, ROI_HEADS: {NUM_CLASSES: 80}}\n")
    (finding,) = check(config=path)
    assert (finding.level, finding.code) == ("warning", "config_replaced")
    assert finding.id == "line 2: MODEL.RETINANET.NUM_CLASSES"


def test_a_config_that_detectron2_dumped_is_taken(tmp_path: Path) -> None:
    from detectron2.config import get_cfg

    path = tmp_path / "config.yaml"
    path.write_text(get_cfg().dump(), encoding="utf-8")
    assert problems(config=str(path)) == []


WRONG = """\
MODEL:
  FCOS: {NUM_CLASSES: 2}
  WEIGHT: x.pth
  ROI_HEADS:
    SCORE_THRESH_TEST: 1
  RPN:
  META_ARCHITECTURE: PanopticFPN
SOLVER:
  STEPS: 3
  MAX_ITER: 1e3
  GAMMA:
  BASE_LR: .inf
INPUT: crop
SOLVER.MOMENTUM: 0.5
VERSION: 1
"""


def test_everything_wrong_in_a_file_is_found_at_once_with_key_and_line(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(WRONG, encoding="utf-8")
    findings = problems(config=str(path))
    assert [(each.id, each.code) for each in findings if each.level == "error"] == [
        ("line 2: MODEL.FCOS.NUM_CLASSES", "config_key"),
        ("line 3: MODEL.WEIGHT", "config_key"),
        ("line 5: MODEL.ROI_HEADS.SCORE_THRESH_TEST", "config_value"),
        ("line 6: MODEL.RPN", "config_key"),
        ("line 7: MODEL.META_ARCHITECTURE", "config_value"),
        ("line 9: SOLVER.STEPS", "config_value"),
        ("line 10: SOLVER.MAX_ITER", "config_value"),
        ("line 11: SOLVER.GAMMA", "config_value"),
        ("line 12: SOLVER.BASE_LR", "config_value"),
        ("line 13: INPUT", "config_key"),
        ('line 14: "SOLVER.MOMENTUM"', "config_key"),
        ("line 15: VERSION", "config_value"),
    ]
    hints = {each.id.split(": ")[1]: each.hint for each in findings}
    assert hints["MODEL.WEIGHT"] == "Did you mean MODEL.WEIGHTS?"
    assert hints["MODEL.ROI_HEADS.SCORE_THRESH_TEST"] == "Write a value like 1.0"
    assert hints["SOLVER.STEPS"] == "Write a value like [3]"
    assert hints["SOLVER.MAX_ITER"] == "Write a value like 1000"
    assert hints["MODEL.RPN"].startswith("Give its keys one by one, such as RPN: {HEAD_NAME: …}")


def test_a_value_of_a_base_that_is_changed_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("SOLVER: {MAX_ITER: many}\nFOO: 1\n")
    path = tmp_path / "own.yaml"
    path.write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 9}\n")
    (finding,) = problems(config=str(path))
    assert (finding.file, finding.id) == (str(tmp_path / "base.yaml"), "line 2: FOO")


def test_a_group_in_the_place_of_a_value_is_an_error(tmp_path: Path) -> None:
    (finding,) = check(config=own(tmp_path, "MODEL: {ROI_HEADS: {NUM_CLASSES: {CAT: 1}}}\n"))
    assert finding.what == "MODEL.ROI_HEADS.NUM_CLASSES is a key, not a group of keys"


def test_groups_of_keys_in_overrides_are_to_be_dotted() -> None:
    (finding,) = check({"MODEL": {"ROI_HEADS": {"NUM_CLASSES": 3}}})
    assert finding.id == "MODEL" and finding.hint.startswith("Give its keys one by one, such as MODEL.LOAD_PROPOSALS")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", "PanopticFPN is not supported: boxes, masks and key"),
        ("Misc/semantic_R_50_FPN_1x.yaml", "SemanticSegmentor is not supported"),
        ("COCO-Detection/rpn_R_50_FPN_1x.yaml", "ProposalNetwork is not supported: proposals alone"),
        ("COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml", "True is not supported: precomputed proposals are not read"),
    ],
)
def test_a_model_of_the_zoo_that_is_not_trained_here_is_refused_by_name(config: str, words: str) -> None:
    errors = [each for each in check(config=config) if each.level == "error"]
    assert words in errors[0].what and Path(errors[0].file).is_file()


@pytest.mark.parametrize(
    "config",
    [
        "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
        "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "Cityscapes/mask_rcnn_R_50_FPN.yaml",
        "PascalVOC-Detection/faster_rcnn_R_50_C4.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        "Detectron1-Comparisons/mask_rcnn_R_50_FPN_noaug_1x.yaml",
        "Misc/scratch_mask_rcnn_R_50_FPN_9x_gn.yaml",
    ],
)
def test_other_models_of_the_zoo_can_be_trained(config: str) -> None:
    assert problems(config=config) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler", "it weighs data sets"),
        ("DATALOADER.SAMPLER_TRAIN", "MySampler", "MySampler is not one of detectron2's"),
        ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True, "no class frequencies"),
        ("MODEL.ROI_HEADS.NAME", "RROIHeads", "rotated boxes"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model", "is not one of detectron2's"),
    ],
)
def test_a_value_that_cannot_be_used_says_why(key: str, value: object, words: str) -> None:
    (finding,) = check({key: value})
    assert (finding.level, finding.id) == ("error", key) and words in finding.what
    assert finding.hint.startswith("Take ")


@pytest.mark.parametrize(
    "overrides",
    [
        {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD": 0.9},
        {"DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler", "DATALOADER.RANDOM_SUBSET_RATIO": 0.5},
        {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": [64], "TEST.PRECISE_BN.ENABLED": True},
        {"INPUT.CROP.ENABLED": True, "INPUT.CROP.SIZE": [0.5, 0.5], "INPUT.RANDOM_FLIP": "vertical"},
        {"SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "SOLVER.NUM_DECAYS": 2, "CUDNN_BENCHMARK": True},
    ],
    ids=lambda each: next(iter(each)),
)
def test_what_is_honoured_has_no_finding(overrides: dict[str, object]) -> None:
    assert problems(overrides) == []


def test_what_other_projects_add_is_one_error_for_each_group_of_keys(tmp_path: Path) -> None:
    text = "MODEL:\n  ROI_MASK_HEAD: {NUM_FC: 3}\n  ROI_DENSEPOSE_HEAD: {NAME: a, NUM: 1, LOSS: {NAME: b}}\n"
    assert [(each.id, each.what, each.hint) for each in check(config=own(tmp_path, text))] == [
        ("line 3: MODEL.ROI_MASK_HEAD.NUM_FC", "detectron2 has no such key", "Did you mean MODEL.ROI_BOX_HEAD.NUM_FC?"),
        (
            "line 4: MODEL.ROI_DENSEPOSE_HEAD.NAME",
            "detectron2 has no MODEL.ROI_DENSEPOSE_HEAD and no keys in it",
            "Leave it out; what other projects add is not known here",
        ),
    ]


@pytest.mark.parametrize("option", ["--dry-run", "--preflight"])
def test_the_command_ends_before_anything_starts_and_shows_what_has_no_effect(option: str, tmp_path: Path) -> None:
    values = tiny_experiment()
    values["model"]["overrides"] = TINY_OVERRIDES | {"SEED": 7, "SOLVER.MAX_ITER": "1e3"}
    values["model"]["config"] = own(tmp_path, "TEST: {EVAL_PERIOD: 5}\nMODEL: {FOO: 1}\n")
    done = run_command(str(write_experiment(tmp_path, values)), option, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for words in ("SEED: 7 has no effect here: trials.seeds decides", "SOLVER.MAX_ITER: its value 1000.0 is not of"):
        assert f"error [config_{'mapped' if 'SEED' in words else 'value'}] model.overrides: {words}" in done.stderr
    assert f"error [config_key] {tmp_path}/own.yaml: line 3: MODEL.FOO: detectron2 has no such key" in done.stderr
    assert f"warning [config_mapped] {tmp_path}/own.yaml: line 2: TEST.EVAL_PERIOD: 5 has no effect" in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("tiny/*"))


def test_a_batch_of_two_on_one_worker_is_planned_as_it_is(tmp_path: Path) -> None:
    values = tiny_experiment(trials={"world_sizes": [1], "scaling": "weak"})
    values["model"] = {"weights": "", "overrides": TINY_OVERRIDES | {"SOLVER.IMS_PER_BATCH": 2}}
    done = run_command(str(write_experiment(tmp_path, values)), "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"global_batch_size": 2' in done.stdout and '"max_iter": 8' in done.stdout
