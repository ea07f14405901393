"""Data sets are taken as labelling tools export them, and what is in no layout is described."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from orchestrator.data.__main__ import app
from orchestrator.data.exports import find_splits, layout_finding
from orchestrator.data.generate import generate
from orchestrator.data.layout import coco_layout
from tests.builders import layouts

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts") / "set"
    generate(root, num_train=6, num_val=4, size=48, seed=5)
    return root


def check(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["check", str(path), "--json", *options])
    return done.exit_code, json.loads(done.stdout)


@pytest.mark.parametrize("layout", layouts.TWO_PARTS, ids=lambda layout: layout.__name__)
def test_a_layout_with_two_parts_is_checked_as_it_is(
    layout: Callable[[Path, Path], None], source: Path, tmp_path: Path
) -> None:
    layout(source, tmp_path / "my data")
    splits, findings = find_splits(tmp_path / "my data")
    assert list(splits)[:2] == ["train", "val"] and findings == []
    assert [split.for_scoring for split in splits.values()][:2] == [False, True]
    code, report = check(tmp_path / "my data")
    assert (code, [finding["code"] for finding in report["findings"] if finding["level"] == "error"]) == (0, [])
    assert [split["num_images"] for split in report["splits"]][:2] == [6, 4]


@pytest.mark.parametrize("layout", layouts.ONE_FILE, ids=lambda layout: layout.__name__)
def test_a_layout_with_one_file_is_checked_and_the_command_that_splits_it_named(
    layout: Callable[[Path, Path], None], source: Path, tmp_path: Path
) -> None:
    layout(source, tmp_path / "my data")
    code, report = check(tmp_path / "my data")
    assert code == 0 and [split["num_images"] for split in report["splits"]] == [10]
    (hint,) = [finding["hint"] for finding in report["findings"] if finding["code"] == "part_missing"]
    assert f"python -m orchestrator.data split '{tmp_path / 'my data'}" in hint


def test_the_test_part_of_an_export_is_checked_too(source: Path, tmp_path: Path) -> None:
    layouts.roboflow(source, tmp_path / "my data")
    splits, _ = find_splits(tmp_path / "my data")
    assert {part: split.annotations.parent.name for part, split in splits.items()} == {
        "train": "train", "val": "valid", "test": "test"
    }  # fmt: skip


def test_backslashes_of_an_export_are_reported_with_the_command_that_writes_slashes(
    source: Path, tmp_path: Path
) -> None:
    layouts.label_studio_on_windows(source, tmp_path / "my data")
    code, report = check(tmp_path / "my data")
    (finding,) = [finding for finding in report["findings"] if finding["level"] == "error"]
    assert code == 2 and "differs from the file's by backslashes" in finding["what"] and finding["count"] == 10
    command = finding["hint"].split("`")[1]
    assert CliRunner().invoke(app, shlex.split(command)[3:]).exit_code == 0
    assert check(tmp_path / "my data")[0] == 0  # the corrected file is taken instead of the other


def test_a_folder_with_another_format_is_described_with_the_names_that_would_be_taken(tmp_path: Path) -> None:
    for name in ("images/a.jpg", "images/b.jpg", "labels/a.txt", "labels/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0 0.5 0.5 1 1")
    code, report = check(tmp_path)
    (finding,) = report["findings"]
    assert code == 2 and "2 images" in finding["what"] and "_annotations.coco.json (Roboflow)" in finding["what"]
    assert "look like YOLO's" in finding["hint"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xml", "<annotation/>", "Pascal VOC"),
        ("a.json", '{"version": "5.0.1", "flags": {}, "shapes": [], "imagePath": "a.jpg"}', "labelme2coco"),
        ("export.zip", "PK", "Unpack"),
        ("readme", "", "Name the folder"),
    ],
)
def test_the_format_of_other_labels_is_recognised(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert words in find_splits(tmp_path)[1][0].hint


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "no such folder" in find_splits(tmp_path / "nowhere")[1][0].what


def test_an_annotation_file_without_its_images_says_which_were_looked_for(source: Path, tmp_path: Path) -> None:
    layouts.cvat(source, tmp_path / "my data")
    shutil.rmtree(tmp_path / "my data/images")
    code, report = check(tmp_path / "my data")
    assert code == 2 and "no folder in" in report["findings"][0]["what"]


@pytest.mark.parametrize("layout", [layouts.coco, layouts.cvat], ids=lambda layout: layout.__name__)
def test_the_folder_of_the_annotations_alone_will_do(
    layout: Callable[[Path, Path], None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout(source, tmp_path / "my data")
    monkeypatch.chdir(tmp_path / "my data/annotations")
    code, report = check(Path())
    assert code == 0 and [split["num_images"] for split in report["splits"]] == [6, 4]


def test_the_images_of_another_part_are_not_taken_for_those_that_are_missing(source: Path, tmp_path: Path) -> None:
    layouts.fiftyone(source, tmp_path)
    shutil.rmtree(tmp_path / "val/data")  # its names are those of training images, too
    splits, (finding,) = find_splits(tmp_path)
    assert list(splits) == ["train"] and finding.level == "error" and "val/labels.json" in finding.file


def test_parts_are_recognised_whatever_their_case_and_depth(source: Path, tmp_path: Path) -> None:
    for part, name in (("train", "Train"), ("val", "Validation")):
        document, images = layouts.read(source, part)
        layouts.write(tmp_path / f"export/project/annotations/instances_{name}.json", document)
        shutil.copytree(images, tmp_path / f"export/project/images/{name}", copy_function=shutil.copyfile)
    splits, findings = find_splits(tmp_path / "export")
    assert findings == [] and [split.images.name for split in splits.values()] == ["Train", "Validation"]


def test_of_two_files_of_one_part_the_nearer_is_taken_and_the_other_named(source: Path, tmp_path: Path) -> None:
    layouts.roboflow(source, tmp_path / "my data")
    shutil.copytree(tmp_path / "my data/train", tmp_path / "my data/old/train")
    splits, findings = find_splits(tmp_path / "my data")
    assert splits["train"].annotations == tmp_path / "my data/train/_annotations.coco.json"
    assert [finding.level for finding in findings] == ["warning"] and "not old/train" in findings[0].what


def test_a_run_on_coco_2017_is_referred_to_what_is_there_instead(source: Path, tmp_path: Path) -> None:
    layouts.roboflow(source, tmp_path / "coco")
    finding = layout_finding(tmp_path / "coco", coco_layout(tmp_path / "coco"))
    assert "Found test/_annotations.coco.json" in finding.hint and "use data.coco" in finding.hint


def test_an_annotation_file_in_utf_16_is_recognised(source: Path, tmp_path: Path) -> None:
    layouts.cvat(source, tmp_path / "my data")
    for file in (tmp_path / "my data/annotations").iterdir():
        file.write_text(file.read_text(encoding="utf-8"), encoding="utf-16")
    assert list(find_splits(tmp_path / "my data")[0]) == ["train", "val"]


def test_an_annotation_file_with_a_mark_or_without_annotations_is_recognised(source: Path, tmp_path: Path) -> None:
    layouts.cvat(source, tmp_path / "my data")
    train, val = sorted((tmp_path / "my data/annotations").iterdir())
    train.write_text(train.read_text(encoding="utf-8"), encoding="utf-8-sig")
    layouts.write(val, {**json.loads(val.read_text(encoding="utf-8")), "annotations": None})
    assert list(find_splits(tmp_path / "my data")[0]) == ["train", "val"]


def test_a_name_that_cannot_be_one_is_no_folder(tmp_path: Path) -> None:
    (finding,) = find_splits(tmp_path / ("n" * 300))[1]
    assert finding.what == "there is no such folder"
    assert not coco_layout(tmp_path / ("n" * 300)).train.is_present()


def test_the_images_of_a_neighbouring_data_set_are_not_taken(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        layouts.label_studio(source, tmp_path / name)
    shutil.rmtree(tmp_path / "one/images")
    splits, (finding,) = find_splits(tmp_path / "one")
    assert not splits and finding.level == "error" and "no folder in" in finding.what


def test_of_copies_in_one_folder_the_shortest_name_is_taken_and_instances_before_other_tasks(
    source: Path, tmp_path: Path
) -> None:
    layouts.roboflow(source, tmp_path / "a")
    shutil.copyfile(tmp_path / "a/train/_annotations.coco.json", tmp_path / "a/train/_annotations.coco.backup.json")
    assert find_splits(tmp_path / "a")[0]["train"].annotations.name == "_annotations.coco.json"
    for name in ("train.fixed.v2.json", "train.fixed.json"):
        shutil.copyfile(tmp_path / "a/train/_annotations.coco.json", tmp_path / "a/train" / name)
        for other in (tmp_path / "a/train").glob("_annotations*"):
            other.unlink()
        assert find_splits(tmp_path / "a")[0]["train"].annotations.name == name
        shutil.copyfile(tmp_path / "a/train" / name, tmp_path / "a/train/_annotations.coco.json")
        (tmp_path / "a/train" / name).unlink()
    for part in layouts.PARTS:  # Supervisely's export
        document, images = layouts.read(source, part)
        for name in ("instances", "captions"):
            layouts.write(tmp_path / f"b/{part}/annotations/{name}.json", document)
        shutil.copytree(images, tmp_path / f"b/{part}/images", copy_function=shutil.copyfile)
    splits, findings = find_splits(tmp_path / "b")
    assert [split.annotations.name for split in splits.values()] == ["instances.json"] * 2 and findings == []


def test_a_test_set_without_annotations_is_a_warning(source: Path, tmp_path: Path) -> None:
    layouts.roboflow(source, tmp_path / "my data")
    file = tmp_path / "my data/test/_annotations.coco.json"
    layouts.write(file, {**json.loads(file.read_text()), "annotations": []})
    code, report = check(tmp_path / "my data")
    assert code == 0 and [finding["code"] for finding in report["findings"]] == ["split_empty"]


def test_names_that_are_no_json_text_are_left_to_the_checks(source: Path, tmp_path: Path) -> None:
    layouts.roboflow(source, tmp_path / "my data")
    file = tmp_path / "my data/valid/_annotations.coco.json"
    file.write_text(file.read_text().replace("valid_", "a\\Users_"))
    code, report = check(tmp_path / "my data")
    assert code == 2 and "json" in report["findings"][0]["code"]


def test_the_annotation_file_in_the_place_of_its_folder_will_do(source: Path, tmp_path: Path) -> None:
    layouts.label_studio(source, tmp_path / "my data")
    assert find_splits(tmp_path / "my data/result.json") == find_splits(tmp_path / "my data")


def test_absolute_names_lead_to_their_folder(source: Path, tmp_path: Path) -> None:
    document, images = layouts.read(source, "train")
    layouts.write(tmp_path / "x/all.json", layouts.rename(document, lambda name: f"{images}/{name}"))
    assert find_splits(tmp_path / "x")[0]["all"].images == images


def test_a_file_of_no_part_next_to_a_training_set_is_named(source: Path, tmp_path: Path) -> None:
    layouts.yolo_like(source, tmp_path)
    (tmp_path / "val.json").rename(tmp_path / "Validierung.json")
    (finding,) = find_splits(tmp_path)[1]
    assert finding.code == "part_missing" and "if Validierung.json is one, name it val.json" in finding.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entry: entry.update(iscrowd=1), "CVAT and Datumaro write 1"),
        (lambda entry: entry.update(segmentation=[1, 1, 9, 1, 9, 9]), "VIA 2 leaves the outer one out"),
    ],
)
def test_what_a_tool_writes_that_cannot_be_trained_on_is_explained(
    change: Callable[[dict[str, Any]], None], words: str, source: Path, tmp_path: Path
) -> None:
    layouts.via(source, tmp_path)
    (file,) = tmp_path.glob("*.json")
    document = json.loads(file.read_text())
    for entry in document["annotations"]:
        change(entry)
    layouts.write(file, document)
    code, report = check(tmp_path)
    (hint,) = [finding["hint"] for finding in report["findings"] if finding["level"] == "error"]
    assert code == 2 and words in hint
