"""`data split` makes a training and a validation set of one file, with every class in both where that is possible."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from orchestrator.data.__main__ import app
from orchestrator.data.split import split, stratify

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def write(path: Path, classes_of: Sequence[Sequence[int]], names: Sequence[str] = ()) -> dict[str, Any]:
    """Images 1, 2, … with an object of each class listed."""
    pairs = [(image, kind) for image, kinds in enumerate(classes_of, 1) for kind in kinds]
    document = {
        "info": {"description": "made up", "version": 1.0},
        "licenses": [{"id": 1, "name": "CC BY"}],
        "images": [
            {"id": image, "file_name": names[image - 1] if names else f"{image}.jpg", "width": 8, "height": 8}
            for image in range(1, len(classes_of) + 1)
        ],
        "annotations": [
            {"id": number, "image_id": image, "category_id": kind, "bbox": [0.10, 1e-3, 3, 4], "area": 12, "iscrowd": 0}
            for number, (image, kind) in enumerate(pairs, 1)
        ],
        "categories": [{"id": kind, "name": f"class {kind}", "supercategory": 7} for kind in range(1, 6)],
    }
    path.write_text(json.dumps(document), encoding="utf-8")
    return document


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def names(path: Path) -> set[str]:
    return {image["file_name"] for image in read(path)["images"]}


def test_every_entry_is_in_exactly_one_set_as_it_was(tmp_path: Path) -> None:
    document = write(tmp_path / "all.json", [[1, 2], [1], [2], [], [1, 1], [3], [3], [2]])
    split(tmp_path / "all.json", tmp_path / "out", val_share=0.25)
    train, val = read(tmp_path / "out/train.json"), read(tmp_path / "out/val.json")
    for key in ("images", "annotations"):
        assert sorted(train[key] + val[key], key=lambda entry: entry["id"]) == document[key]
    for part in (train, val):
        assert {key: part[key] for key in ("info", "licenses", "categories")} == {
            key: document[key] for key in ("info", "licenses", "categories")
        }
        assert {entry["image_id"] for entry in part["annotations"]} <= {image["id"] for image in part["images"]}


def test_a_seed_draws_the_same_images_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    document = write(tmp_path / "a.json", [[number % 3 + 1] for number in range(40)])
    for key in ("images", "annotations"):
        document[key] = document[key][25:] + document[key][:25][::-1]
    (tmp_path / "b.json").write_text(json.dumps(document))
    for file in ("a", "b"):
        split(tmp_path / f"{file}.json", tmp_path / file, val_share=0.2, seed=3)
    assert names(tmp_path / "a/val.json") == names(tmp_path / "b/val.json")
    split(tmp_path / "a.json", tmp_path / "c", val_share=0.2, seed=4)
    assert names(tmp_path / "a/val.json") != names(tmp_path / "c/val.json")


@pytest.mark.parametrize("seed", range(20))
def test_every_class_of_two_images_is_in_both_sets_and_a_common_one_in_its_share(seed: int) -> None:
    draw = random.Random(seed)  # noqa: S311 - a draw that repeats, no secret
    groups = {
        f"{index}.jpg": (1, {kind for kind in range(12) if draw.random() < 0.5 / (kind + 1)}) for index in range(300)
    }
    chosen = stratify(groups, 0.2, seed)
    assert 55 <= len(chosen) <= 65
    total = Counter(kind for _, kinds in groups.values() for kind in kinds)
    on_val = Counter(kind for key in chosen for kind in groups[key][1])
    for kind, number in total.items():
        if number > 1:
            assert 0 < on_val[kind] < number
        if number >= 50:
            assert abs(on_val[kind] / number - 0.2) < 0.05


def test_the_only_image_of_a_class_is_trained_on() -> None:
    groups = {"rare.jpg": (1, {1}), **{f"{index}.jpg": (1, {2}) for index in range(9)}}
    for seed in range(10):
        assert "rare.jpg" not in stratify(groups, 0.5, seed)


def test_where_every_image_has_a_class_of_its_own_the_share_is_kept() -> None:
    assert len(stratify({f"{index}.jpg": (1, {index}) for index in range(50)}, 0.2, 0)) == 10


@pytest.mark.parametrize("classes", [(set(), set()), ({1}, {2}), ({1}, {1})])
def test_two_images_make_two_sets(classes: tuple[set[object], set[object]]) -> None:
    assert len(stratify({"a": (1, classes[0]), "b": (1, classes[1])}, 0.01, 0)) == 1


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [(r"(.*)-\d", {"a", "b", "c", "d"}), ("[a-z]", {"a", "b", "c", "d"}), ("nothing", None)],
)
def test_images_whose_names_begin_alike_stay_together(tmp_path: Path, pattern: str, groups: set[str] | None) -> None:
    copies = [f"{letter}-{number}.jpg" for letter in "abcd" for number in range(5)]
    write(tmp_path / "all.json", [[1]] * 20, copies)
    split(tmp_path / "all.json", tmp_path / "out", val_share=0.25, group_by=pattern)
    train, val = ({name[0] for name in names(tmp_path / f"out/{part}.json")} for part in ("train", "val"))
    assert (train | val, train & val) == (groups, set()) if groups else train & val


def command(tmp_path: Path, *options: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["split", str(tmp_path / "all.json"), "--to", str(tmp_path / "out"), *options])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_says_which_classes_are_in_which_set(tmp_path: Path) -> None:
    write(tmp_path / "all.json", [[1], [1], [1], [1], [2], [1, 3, 3], [1, 3]])
    code, stdout, _ = command(tmp_path, "--val", "0.3")
    assert code == 0 and stdout.splitlines()[2:] == [
        "classes in both sets: 2 (class 1, class 3)",
        "classes in the training set only, so never scored: 1 (class 2)",
        "classes in no image: 2 (class 4, class 5)",
    ]


def test_roboflows_copies_of_an_image_stay_together_unasked(tmp_path: Path) -> None:
    write(tmp_path / "all.json", [[1]] * 20, [f"{letter}.rf.{number}.jpg" for letter in "abcd" for number in range(5)])
    assert command(tmp_path, "--val", "0.25")[0] == 0
    assert len({name[0] for name in names(tmp_path / "out/val.json")}) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--val", "0"), "give a share above 0 and below 1"),
        (("--val", "20"), "give a share above 0 and below 1"),
        (("--group-by", "("), "is no regular expression"),
        (("--group-by", ".*jpg"), ""),
        (("--group-by", ""), "8 images in one group"),
    ],
)
def test_what_cannot_be_split_is_refused_with_2(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    write(tmp_path / "all.json", [[1]] * 8)
    code, _, stderr = command(tmp_path, *options)
    assert (code, words in stderr) == (2 if words else 0, True)
    assert (tmp_path / "out").exists() == (not words)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "all.json", [[1]] * 8)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/val.json").write_text("mine")
    code, _, stderr = command(tmp_path)
    assert code == 2 and "val.json exists" in stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["val.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"[]", "is not a COCO file"),
        (b'{"images": [], "annotations": []}', "it has no list 'categories'"),
        (b'{"images": [{"id": 1}], "annotations": [], "categories": []}', "not every image has a file_name"),
        (b'{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": [], "categories": []}',
         "two images have the id 1"),
        (b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "category_id": [1]}],'
         b' "categories": []}', "an id or a name is a list"),
        (b'{"images": [{"id": 1, "x": NaN}], "annotations": [], "categories": [5]}', "is not a COCO file"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_cocos_is_refused_with_2(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "all.json").write_bytes(content)
    code, _, stderr = command(tmp_path)
    assert code == 2 and words in stderr


def test_a_file_with_numbers_that_json_has_not_is_split_and_keeps_them(tmp_path: Path) -> None:
    document = write(tmp_path / "all.json", [[1], [1], [2], [2]])
    document["annotations"][0]["score"] = float("nan")
    (tmp_path / "all.json").write_text(json.dumps(document))
    assert command(tmp_path, "--val", "0.5")[0] == 0
    parts = [read(tmp_path / f"out/{part}.json") for part in ("train", "val")]
    assert sorted(len(part["images"]) for part in parts) == [2, 2]
    (score,) = [entry["score"] for part in parts for entry in part["annotations"] if "score" in entry]
    assert score != score


def test_a_file_in_utf_16_with_ids_as_text_is_split(tmp_path: Path) -> None:
    document = write(tmp_path / "all.json", [[1], [1], [2], [2]])
    for entry in document["annotations"]:
        entry["image_id"] = str(entry["image_id"])
    (tmp_path / "all.json").write_text(json.dumps(document), encoding="utf-16")
    assert command(tmp_path, "--val", "0.5")[0] == 0
    val = read(tmp_path / "out/val.json")
    assert {entry["image_id"] for entry in val["annotations"]} == {str(image["id"]) for image in val["images"]}
