"""The seed's own model and data path on real COCO images: crowd RLE, a grey JPEG, category ids with gaps."""

import json
from pathlib import Path

import pytest

from orchestrator.experiment.spec import CONFIGS
from tests.builders.commands import run_command

pytestmark = [pytest.mark.shared, pytest.mark.train]


def test_the_seeds_experiment_trains_and_evaluates_on_the_excerpt_with_one_and_two_workers(
    tmp_path: Path, shared_data: Path
) -> None:
    changes = {
        "trials.world_sizes": "[1, 2]",
        "trials.scaling": "strong",
        "resources.device": "cpu",
        "protocol.iterations": 2,
        "protocol.warmup_iterations": 0,
        "protocol.evaluate_at_end": "true",
        "model.weights": '""',
        "model.overrides.INPUT.MIN_SIZE_TRAIN": "[128]",
        "model.overrides.INPUT.MAX_SIZE_TRAIN": 160,
        "model.overrides.INPUT.MIN_SIZE_TEST": 96,
        "model.overrides.INPUT.MAX_SIZE_TEST": 128,
        "log_period_iterations": 1,
    }
    done = run_command(
        CONFIGS / "seed_1gpu_throughput.yaml",
        *(part for key, value in changes.items() for part in ("--set", f"{key}={value}")),
        "--output",
        tmp_path / "run",
        "--json",
        cwd=tmp_path,
        DETECTRON2_DATASETS=str(shared_data),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [trial["world_size"] for trial in result["trials"]] == [1, 2]
    for trial in result["trials"]:
        assert (trial["status"], trial["iterations"]) == ("FINISHED", 2)
        assert trial["images_per_second"] > 0
        (evaluation,) = trial["evaluations"]
        assert evaluation["box_ap"] is not None and evaluation["mask_ap"] is not None
        detections = json.loads((tmp_path / "run" / trial["name"] / "coco_instances_results.json").read_text())
        annotations = json.loads((shared_data / "coco/annotations/instances_val2017.json").read_text())
        assert {found["category_id"] for found in detections} <= {entry["id"] for entry in annotations["categories"]}
        config = (tmp_path / "run" / trial["name"] / "log.txt").read_text(encoding="utf-8")
        assert "DEPTH: 50" in config and "coco_2017_train" in config
