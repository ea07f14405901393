"""Of several annotation files, the one that was named or is named for its part is taken; else none is proposed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from orchestrator.data.__main__ import app
from orchestrator.data.exports import find_splits
from orchestrator.data.generate import generate
from tests.builders import layouts


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("choice") / "set"
    generate(root, num_train=6, num_val=4, size=48, seed=5)
    return root


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """train.json and val.json with the folders of their images."""
    layouts.yolo_like(source, tmp_path / "my data")
    return tmp_path / "my data"


def init(path: Path) -> Result:
    return CliRunner().invoke(app, ["init", str(path)])


def split_command(done: Result) -> list[str]:
    """The arguments of the `data split` that a refusal proposes."""
    return shlex.split(next(part for part in done.stderr.split("`") if ".data split " in part))[3:]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("mydata.zip", b"PK\x03\x04\x14\0\0\0", "Unpack the archive"),
        ("other.json", b'{"labels": []}', "other.json is in a tool's own format"),
        ("broken.json", b'{"images": [', "ends in the middle"),
        ("packed.json", b"PK\x03\x04\x14\0\0\0\xff", "compressed (zip). Unpack it"),
        ("labels.xml", b"<annotation/>", "Pascal VOC"),
    ],
)
def test_a_named_file_that_is_none_is_refused_and_its_neighbours_are_not_taken(
    folder: Path, name: str, content: bytes, words: str
) -> None:
    (folder / name).write_bytes(content)
    done = init(folder / name)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"{folder / name}: " in done.stderr and words in done.stderr
    done = CliRunner().invoke(
        app, ["excerpt", "2", "--from", str(folder / name), "--to", str(folder.with_name("part"))]
    )
    assert done.exit_code == 2 and words in done.stderr


def test_a_named_file_is_the_choice_of_its_part(folder: Path) -> None:
    shutil.copyfile(folder / "train.json", folder / "train_v2.json")
    done = init(folder / "train_v2.json")
    assert (done.exit_code, done.stderr) == (0, "")
    written = yaml.safe_load(done.stdout)
    assert written["name"] == "train_v2"
    assert written["data"]["coco"]["train_annotations"] == f"{folder}/train_v2.json"
    assert written["data"]["coco"]["val_annotations"] == f"{folder}/val.json"


def test_a_named_file_of_no_part_is_split_whatever_lies_next_to_it(folder: Path) -> None:
    shutil.copyfile(folder / "train.json", folder / "fruit.json")
    done = init(folder / "fruit.json")
    assert done.exit_code == 2
    command = split_command(done)
    assert command[1] == f"{folder}/fruit.json" and CliRunner().invoke(app, command).exit_code == 0
    done = init(folder / "fruit.json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout)["data"]["coco"]["train_annotations"] == f"{folder}/split/train.json"


def test_the_split_of_one_of_several_files_is_not_taken_for_another_unseen(folder: Path) -> None:
    (folder / "train.json").rename(folder / "apples.json")
    (folder / "val.json").rename(folder / "pears.json")
    assert CliRunner().invoke(app, split_command(init(folder / "apples.json"))).exit_code == 0
    done = init(folder / "pears.json")
    assert done.exit_code == 0 and "split of one of 2 annotation files is taken" in done.stderr
    assert f"If it was not pears.json, remove {folder}/split" in done.stderr


def test_a_named_test_set_is_refused(source: Path, tmp_path: Path) -> None:
    layouts.yolo_like(source, tmp_path)
    shutil.copyfile(tmp_path / "val.json", tmp_path / "test.json")
    done = init(tmp_path / "test.json")
    assert (done.exit_code, done.stdout) == (2, "") and "named for a test set" in done.stderr


def test_a_named_file_in_the_folder_of_annotations_has_its_images_next_to_that(source: Path, tmp_path: Path) -> None:
    layouts.cvat(source, tmp_path / "my data")
    splits, findings = find_splits(tmp_path / "my data/annotations/instances_train.json")
    assert list(splits) == ["train", "val"] and findings == []


def test_parts_in_one_word_are_recognised(source: Path, tmp_path: Path) -> None:
    document, files = layouts.merged(source)
    for name, part in (("trainset", "train"), ("valset", "val")):
        images = [image for image in document["images"] if image["file_name"].startswith(part)]
        ids = {image["id"] for image in images}
        entries = [entry for entry in document["annotations"] if entry["image_id"] in ids]
        layouts.write(tmp_path / f"{name}.json", {**document, "images": images, "annotations": entries})
    for file, name in files:
        layouts.copy(file, tmp_path / "images" / name)
    done = init(tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout)["data"]["coco"]["train_annotations"] == f"{tmp_path}/trainset.json"


@pytest.mark.parametrize("names", [("vid1", "vid2"), ("old/train", "new/train")])
def test_no_split_of_one_of_several_files_is_proposed(names: tuple[str, str], source: Path, tmp_path: Path) -> None:
    for name in names:
        layouts.cvat_task(source, tmp_path / name)
    done = init(tmp_path)
    assert done.exit_code == 2 and "data split" not in done.stderr
    assert "there is no validation set: none of the 2 annotation files is named for one" in done.stderr
    assert "If one of them is it, name it val.json; else export them as one file, or give the one" in done.stderr
    file = tmp_path / names[0] / "annotations/instances_default.json"
    assert split_command(init(file))[1] == str(file)


@pytest.mark.parametrize("name", ["train", "trainval"])
def test_a_labelled_test_set_is_named_where_there_is_no_validation_set(name: str, source: Path, tmp_path: Path) -> None:
    for part, file in (("train", f"{name}.json"), ("val", "test.json")):
        document, images = layouts.read(source, part)
        document = layouts.rename(document, lambda each, part=part: f"{part}_{each}")  # type: ignore[misc]
        layouts.write(tmp_path / file, document)
        for image in images.iterdir():
            layouts.copy(image, tmp_path / "images" / f"{part}_{image.name}")
    words = (
        f"or give the test set as data.coco.val_annotations ({tmp_path}/test.json) and val_images ({tmp_path}/images)"
    )
    done = init(tmp_path)
    assert done.exit_code == 2 and "there is no validation set" in done.stderr and words in done.stderr
    layouts.write(tmp_path / "test.json", {**document, "annotations": []})
    done = init(tmp_path)
    assert done.exit_code == 2 and "there is no validation set" in done.stderr and words not in done.stderr
