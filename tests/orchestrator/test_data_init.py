"""`data init` writes an experiment that runs as it is, from any folder, for every layout and machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from detectron2 import model_zoo
from typer.testing import CliRunner

from orchestrator.data.__main__ import app
from orchestrator.data.generate import generate
from orchestrator.data.init import WEIGHTS, Machine, schedule, write_experiment
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import load_experiment
from orchestrator.findings import Finding, has_errors
from orchestrator.preflight.local import preflight
from tests.builders import layouts
from tests.builders.commands import run_command

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = Machine(0, 0.0, 4)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("init") / "set"
    generate(root, num_train=6, num_val=4, size=48, seed=5)
    return root


@pytest.fixture
def roboflow(source: Path, tmp_path: Path) -> Path:
    layouts.roboflow(source, tmp_path / "fruit set")
    return tmp_path / "fruit set"


def write(folder: Path, machine: Machine) -> tuple[str, list[Finding]]:
    text, findings = write_experiment(folder, machine)
    assert text is not None, findings
    return text, findings


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    for file in folder.rglob("*.json"):
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document))


def without_masks(document: dict[str, Any]) -> None:
    for entry in document["annotations"]:
        entry["segmentation"] = []


def check(text: str, folder: Path) -> None:
    """The file passes every check that needs no cluster and no network."""
    (folder / "my.yaml").write_text(text, encoding="utf-8")
    experiment = load_experiment(
        folder / "my.yaml", ['model.weights=""', "resources.device=cpu", "trials.world_sizes=[1]"]
    )
    plans = expand(experiment, Hardware(0, 4), str(folder / "runs"), folder)
    findings = preflight(experiment, plans)
    assert not has_errors(findings), findings


@pytest.mark.parametrize("layout", layouts.TWO_PARTS, ids=lambda layout: layout.__name__)
def test_the_experiment_of_a_layout_with_two_parts_passes_the_checks(
    layout: Callable[[Path, Path], None], source: Path, tmp_path: Path
) -> None:
    layout(source, tmp_path / "my data")
    text, _ = write(tmp_path / "my data", CPU)
    check(text, tmp_path)


@pytest.mark.parametrize("layout", layouts.ONE_FILE, ids=lambda layout: layout.__name__)
def test_one_file_is_refused_with_the_command_after_which_it_is_taken(
    layout: Callable[[Path, Path], None], source: Path, tmp_path: Path
) -> None:
    layout(source, tmp_path / "my data")
    done = CliRunner().invoke(app, ["init", str(tmp_path / "my data")])
    assert (done.exit_code, done.stdout) == (2, "")
    command = next(part for part in done.stderr.split("`") if ".data split " in part)
    assert CliRunner().invoke(app, shlex.split(command)[3:]).exit_code == 0
    done = CliRunner().invoke(app, ["init", str(tmp_path / "my data")])
    assert done.exit_code == 0, done.stderr
    assert "split/train.json" in done.stdout
    check(done.stdout, tmp_path)


def test_the_file_runs_from_any_folder_and_its_name_is_the_data_sets(roboflow: Path, tmp_path: Path) -> None:
    done = run_command("init", os.path.relpath(roboflow, tmp_path), cwd=tmp_path, module="orchestrator.data")
    assert done.returncode == 0, done.stderr
    (tmp_path / "my.yaml").write_text(done.stdout)
    (tmp_path / "elsewhere").mkdir()
    planned = run_command(tmp_path / "my.yaml", "--dry-run", "--json", cwd=tmp_path / "elsewhere")
    assert planned.returncode == 0, planned.stderr
    (plan,) = json.loads(planned.stdout)
    assert plan["train"]["annotations"] == f"{roboflow}/train/_annotations.coco.json"
    assert plan["experiment"] == "fruit_set"


def test_masks_decide_the_model(roboflow: Path, tmp_path: Path) -> None:
    text, _ = write(roboflow, CPU)
    assert "mask_rcnn_R_50_FPN_3x" in text and "Every object has a mask" in text
    edit(roboflow, without_masks)
    text, _ = write(roboflow, CPU)
    assert "faster_rcnn_R_50_FPN_3x" in text and "objects have no mask" in text
    check(text, tmp_path)


def test_a_box_model_for_a_few_objects_without_a_mask_is_warned_of(roboflow: Path) -> None:
    edit(roboflow / "train", lambda document: document["annotations"][0].update(segmentation=[]))
    text, findings = write(roboflow, CPU)
    assert "faster_rcnn" in text
    assert [finding.code for finding in findings] == ["masks_missing"] and "1 of " in findings[0].what


def test_run_length_encoded_masks_are_read_as_bitmaps(tmp_path: Path) -> None:
    generate(tmp_path / "set", num_train=4, num_val=2, size=48, mask_format="rle")
    text, _ = write(tmp_path / "set", CPU)
    assert yaml.safe_load(text)["model"]["overrides"]["INPUT.MASK_FORMAT"] == "bitmask"
    check(text, tmp_path)


def test_the_classes_are_counted_and_named(roboflow: Path) -> None:
    edit(roboflow, lambda document: document["categories"].append({"id": 9, "name": "a: b # \n - c"}))
    text, findings = write(roboflow, CPU)
    assert yaml.safe_load(text)["model"]["overrides"]["MODEL.ROI_HEADS.NUM_CLASSES"] == 4
    assert "a: b # \\n - c (0)" in text
    assert "category_empty" in {finding.code for finding in findings}


@pytest.mark.parametrize("name", ["null", "12", "# x", 'it\'s: "so"', "größe", "-", " ", "a\tb", "*x", "é́"])
def test_any_folder_name_is_written_so_that_it_is_read_again(source: Path, tmp_path: Path, name: str) -> None:
    layouts.yolo_like(source, tmp_path / name)
    text, _ = write(tmp_path / name, CPU)
    check(text, tmp_path)
    assert yaml.safe_load(text)["data"]["coco"]["train_annotations"] == str(tmp_path / name / "train.json")


@pytest.mark.parametrize(
    ("num_images", "machine", "batch", "epochs", "max_iter"),
    [
        (57, CPU, 2, 60, 1710),
        (57, Machine(1, 80.0, 16), 4, 60, 855),
        (1000, Machine(1, 80.0, 16), 16, 36, 2250),
        (1000, Machine(1, 16.0, 8), 4, 36, 9000),
        (1000, Machine(1, 4.0, 8), 2, 36, 18000),
        (117_266, Machine(8, 16.0, 64), 32, 12, 43975),
        (3, Machine(8, 80.0, 64), 16, 60, 12),
    ],
)
def test_the_schedule_fits_the_data_and_the_machine(
    num_images: int, machine: Machine, batch: int, epochs: int, max_iter: int
) -> None:
    plan = schedule(num_images, machine)
    assert (plan.batch, plan.epochs, plan.max_iter) == (batch, epochs, max_iter)
    assert plan.base_lr == pytest.approx(0.02 * batch / 16)
    assert 0 < plan.steps[0] < plan.steps[1] < plan.max_iter and plan.warmup <= 1000 and plan.eval_period >= 1


def test_on_gpus_there_is_a_worker_for_each_and_the_batch_is_theirs_together(roboflow: Path, tmp_path: Path) -> None:
    text, _ = write(roboflow, Machine(4, 24.0, 32))
    (tmp_path / "my.yaml").write_text(text)
    (plan,) = expand(load_experiment(tmp_path / "my.yaml"), Hardware(4, 32), "/runs", Path("/unused"))
    assert (plan.device, plan.world_size, plan.solver.global_batch_size) == ("cuda", 4, 8)
    assert plan.solver.base_lr == pytest.approx(0.01) and "INPUT.MIN_SIZE_TRAIN" not in text


def test_errors_in_the_data_are_listed_and_no_file_is_written(roboflow: Path) -> None:
    next((roboflow / "train").glob("*.jpg")).unlink()
    text, findings = write_experiment(roboflow, CPU)
    assert text is None and "image_missing" in {finding.code for finding in findings}
    done = CliRunner().invoke(app, ["init", str(roboflow)])
    assert (done.exit_code, done.stdout) == (2, "") and "image_missing" in done.stderr


def test_wrong_names_are_corrected_before_the_file_is_split(source: Path, tmp_path: Path) -> None:
    layouts.label_studio_on_windows(source, tmp_path / "my data")
    for command in ("fix-names", "split"):
        done = CliRunner().invoke(app, ["init", str(tmp_path / "my data")])
        line = next(part for part in done.stderr.split("`") if f".data {command} " in part)
        assert done.exit_code == 2 and CliRunner().invoke(app, shlex.split(line)[3:]).exit_code == 0
    text, _ = write(tmp_path / "my data", CPU)
    check(text, tmp_path)


def test_a_training_set_alone_is_split_and_then_taken_from_the_split(source: Path, tmp_path: Path) -> None:
    layouts.cvat(source, tmp_path / "my data")
    (tmp_path / "my data/annotations/instances_val.json").unlink()
    done = CliRunner().invoke(app, ["init", str(tmp_path / "my data")])
    command = next(part for part in done.stderr.split("`") if ".data split " in part)
    assert CliRunner().invoke(app, shlex.split(command)[3:]).exit_code == 0
    text, findings = write(tmp_path / "my data", CPU)
    assert "my data/split/train.json" in text and "my data/split/val.json" in text and findings == []


@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_lone_part_is_refused(roboflow: Path, part: str) -> None:
    (roboflow / part / "_annotations.coco.json").unlink()
    done = CliRunner().invoke(app, ["init", str(roboflow)])
    missing = "training" if part == "train" else "validation"
    assert done.exit_code == 2 and f"there is no {missing} set" in done.stderr


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        done = CliRunner().invoke(app, ["init", str(folder)])
        assert (done.exit_code, done.stdout) == (2, "") and "[layout]" in done.stderr


@pytest.mark.shared
@pytest.mark.parametrize("layout", [*layouts.TWO_PARTS, *layouts.ONE_FILE], ids=lambda layout: layout.__name__)
def test_the_real_excerpt_in_every_layout_becomes_an_experiment(
    layout: Callable[[Path, Path], None], tmp_path: Path, shared_data: Path
) -> None:
    layout(shared_data / "coco", tmp_path / "data")
    done = CliRunner().invoke(app, ["init", str(tmp_path / "data")])
    if layout in layouts.ONE_FILE:
        command = next(part for part in done.stderr.split("`") if ".data split " in part)
        assert CliRunner().invoke(app, shlex.split(command)[3:]).exit_code == 0
        done = CliRunner().invoke(app, ["init", str(tmp_path / "data")])
    assert done.exit_code == 0, done.stderr
    check(done.stdout, tmp_path)


def test_the_start_weights_are_those_of_the_model_zoo() -> None:
    for config, weights in WEIGHTS.items():
        address = model_zoo.get_checkpoint_url(config)
        assert address.endswith(weights.removeprefix("detectron2://"))


def test_the_command_helps_without_importing_anything_heavy() -> None:
    script = (
        "import runpy, sys; sys.argv = ['data', 'init', '--help']\n"
        "try: runpy.run_module('orchestrator.data', run_name='__main__')\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "assert not {'torch', 'ray', 'mlflow', 'detectron2', 'cv2', 'numpy', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
