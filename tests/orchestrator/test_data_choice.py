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
