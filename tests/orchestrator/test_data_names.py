"""File names that lead to no file are reported once, with where the files are and how to get there."""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from orchestrator.data.__main__ import app
from orchestrator.data.entries import ImageEntry
from orchestrator.data.fix_names import fix_names
from orchestrator.data.image_names import list_files, locate_images
from orchestrator.data.name_matching import match_names, part_of
from orchestrator.findings import Finding, FindingList

if TYPE_CHECKING:
    from collections.abc import Sequence

FILES = (
    "images/train_1.png",
    "images/sub/a b.jpg",
    "images/0a1b2c3d-cat.jpg",
    "images/scan.tiff",
    "JPEGImages/0001.JPG",
    unicodedata.normalize("NFD", "images/é x.jpg"),
    "labels/train_1.txt",
    os.fsdecode("images/größe.png".encode("cp1252")),
    os.fsdecode("images/über.png".encode("cp437")),
    "images/caf\u00c3\u00a9.png",
)


NOT_UTF_8 = "the encoding (the file's name is not UTF-8)"
MISREAD = "the encoding (UTF-8 was read as another, which made Ã© of é)"


@pytest.mark.parametrize(
    ("name", "path", "difference"),
    [
        ("train_1.png", FILES[0], None),
        ("images\\train_1.png", FILES[0], "backslashes (write /)"),
        ("sub/a%20b.jpg", FILES[1], "%-encoding"),
        ("http://host:8080/data/upload/1/0a1b2c3d-cat.jpg", FILES[2], "the path in front"),
        ("/data/local-files/?d=images/0a1b2c3d-cat.jpg", FILES[2], "the path in front"),
        ("../../data/upload/1/0a1b2c3d-cat.jpg", FILES[2], "the path in front"),
        ("s3://bucket/deep/scan.tiff", FILES[3], "the path in front"),
        ("scan.tif", FILES[3], "the extension"),
        ("train_1.jpg", FILES[0], "the extension"),
        ("..\\media\\upload\\4\\0a1b2c3d-cat.jpg", FILES[2], "the path in front"),
        ("C:\\Users\\me\\JPEGImages\\0001.JPG", FILES[4], "backslashes (write /) and the path in front"),
        ("/home/me/JPEGImages/0001.JPG", FILES[4], "the path in front"),
        ("jpegimages/0001.jpg", FILES[4], "upper and lower case"),
        ("0001.jpeg", FILES[4], "upper and lower case and the extension"),
        ("SCAN.TIF", FILES[3], "upper and lower case and the extension"),
        ("é x.jpg", FILES[5], "the Unicode form of the same letters (NFD, from macOS, or NFC)"),
        ("train_1.png88123", FILES[0], "what a tool added to the name"),
        ("train_1.png-1", FILES[0], "what a tool added to the name"),
        ("0a1b2c3d-train_1.png", FILES[0], "what a tool added to the name"),
        ("train_1.png ", FILES[0], "white space around the name"),
        (" images/train_1.PNG\n", FILES[0], "white space around the name and upper and lower case"),
        ("größe.png", FILES[7], NOT_UTF_8),
        ("images/GRÖSSE.png", FILES[7], f"{NOT_UTF_8} and upper and lower case"),
        ("über.png", FILES[8], NOT_UTF_8),
        ("café.png", FILES[9], MISREAD),
        ("a/b/größe.png", FILES[7], f"{NOT_UTF_8} and the path in front"),
        ("tr\u00c3\u00a4in_2.png", None, None),
        ("train_2.png", None, None),
    ],
)
def test_the_file_that_a_name_means_is_found(name: str, path: str | None, difference: str | None) -> None:
    match = match_names([name], "/base", FILES, whole_paths=False).get(name)
    assert (match and match.path) == path
    assert " and ".join(match.differences if match else ()) == (difference or "")


def test_of_equal_files_the_one_in_the_folder_of_most_others_is_meant() -> None:
    files = ["a/1.jpg", "b/1.jpg", "b/2.jpg", "c/2.jpg", "b/3.jpg"]
    matches = match_names(["1.jpg", "2.jpg", "3.jpg"], "/base", files, whole_paths=False)
    assert {match.folder for match in matches.values()} == {"b/"}


def test_of_equal_files_the_one_in_the_folder_of_the_same_part_is_meant() -> None:
    files = [f"{part}/{number}.jpg" for part in ("train", "val2017") for number in (1, 2)]
    matches = match_names(["1.jpg", "2.jpg"], "/base", files, whole_paths=False, part="val")
    assert {match.folder for match in matches.values()} == {"val2017/"}


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("annotations/instances_train2017.json", "train"),
        ("valid/_annotations.coco.json", "val"),
        ("train/old/dev.json", "val"),
        ("Test/labels.json", "test"),
        ("trainval.json", ""),
        ("train_val.json", ""),
        ("annotations/instances_default.json", ""),
        ("trains.json", ""),
        ("labelsTrain.json", "train"),
        ("VAL/eval.json", "val"),
        ("trainset.json", "train"),
        ("TrainingSet/labels.json", "train"),
        ("VALSET/a.json", "val"),
        ("testsets.json", "test"),
        ("trainvalset.json", ""),
        ("train_set/x.json", "train"),
        ("set.json", ""),
    ],
)
def test_a_part_is_told_by_whole_words(path: str, part: str) -> None:
    assert part_of(path) == part


def locate(root: Path, names: Sequence[str], annotations: Path | None = None) -> tuple[int, list[Finding]]:
    findings = FindingList()
    images = [ImageEntry(number, name, 8, 8) for number, name in enumerate(names, 1)]
    file = annotations or root / "x.json"
    located = locate_images(images, str(file), root, list_files(root), findings)
    return len(located), findings.to_list()


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_images_in_a_folder_below_are_one_finding_with_that_folder(tmp_path: Path) -> None:
    touch(*(tmp_path / f"valid/images/{number}.jpg" for number in range(5)))
    located, (finding,) = locate(tmp_path / "valid", [f"{number}.jpg" for number in range(5)])
    assert located == 0 and finding.count == 5
    assert f"they are in {tmp_path}/valid/images" in finding.what
    assert finding.hint.startswith(f"Set the image folder to {tmp_path}/valid/images (data.coco.")


def test_images_next_to_the_folder_are_found_in_the_parent(tmp_path: Path) -> None:
    touch(*(tmp_path / f"train2017/{number}.jpg" for number in range(3)), tmp_path / "annotations/train.json")
    _, (finding,) = locate(tmp_path / "annotations", ["0.jpg", "1.jpg", "2.jpg"], tmp_path / "annotations/train.json")
    assert f"they are in {tmp_path}/train2017" in finding.what


def test_names_that_lead_out_by_dots_are_one_finding_with_the_command_that_corrects_them(tmp_path: Path) -> None:
    touch(tmp_path / "images/a.jpg", tmp_path / "images/b.jpg", tmp_path / "annotations/x.json")
    names = ["../images/a.jpg", "../images/b.jpg"]
    _, (finding,) = locate(tmp_path / "annotations", names, tmp_path / "annotations/x.json")
    assert finding.count == 2 and f"fix-names {tmp_path}/annotations/x.json --images {tmp_path}/images" in finding.hint


def test_a_kind_of_difference_is_one_finding_and_each_kind_has_its_own(tmp_path: Path) -> None:
    touch(*(tmp_path / f"a/{number}.jpg" for number in range(30)))
    names = [f"a\\{number}.jpg" for number in range(20)] + [f"A/{number}.JPG" for number in range(20, 30)]
    _, findings = locate(tmp_path, names)
    assert [(finding.code, finding.count) for finding in findings] == [("image_missing", 20), ("image_missing", 10)]
    assert (
        "by backslashes (write /); there is 'a/0.jpg'" in findings[0].what
        and "upper and lower case" in findings[1].what
    )


def test_images_in_many_folders_are_one_finding(tmp_path: Path) -> None:
    touch(*(tmp_path / f"root/{number}/{number}.jpg" for number in range(50)))
    _, (finding,) = locate(tmp_path / "root", [f"{number}.jpg" for number in range(50)])
    assert finding.count == 50 and "its file_name '0.jpg' is another folder's; there is '0/0.jpg'" in finding.what


def test_a_single_missing_image_is_not_mistaken_for_one_of_the_same_name_elsewhere(tmp_path: Path) -> None:
    touch(
        *(tmp_path / f"train/a/{number}.jpg" for number in range(5)), tmp_path / "train/b/7.jpg", tmp_path / "val/7.jpg"
    )
    located, (finding,) = locate(tmp_path / "train", [f"a/{number}.jpg" for number in range(5)] + ["a/7.jpg"])
    assert located == 5 and finding.what == "the file does not exist" and finding.file.endswith("train/a/7.jpg")


def test_links_are_followed_with_one_warning_and_broken_ones_say_where_they_lead(tmp_path: Path) -> None:
    touch(*(tmp_path / f"store/{number}.jpg" for number in range(4)))
    (tmp_path / "root").mkdir()
    for number in range(6):
        (tmp_path / f"root/{number}.jpg").symlink_to(tmp_path / f"store/{number}.jpg")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root")
    (tmp_path / "root/folder").symlink_to(tmp_path / "store")
    names = [*(f"{number}.jpg" for number in range(6)), "folder/1.jpg"]
    located, findings = locate(tmp_path / "root", names)
    assert located == 5
    assert [(finding.level, finding.code, finding.count) for finding in findings] == [
        ("error", "image_missing", 2), ("warning", "path_link", 5)
    ]  # fmt: skip
    assert f"a link to {tmp_path}/store/4.jpg, where nothing is" in findings[0].what and "dvc pull" in findings[0].hint


def test_an_absolute_name_inside_the_folder_is_a_warning_and_one_outside_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "root/a.jpg", tmp_path / "other.jpg")
    located, findings = locate(tmp_path / "root", [str(tmp_path / "root/a.jpg"), "/etc/passwd"])
    assert located == 1
    assert [(finding.level, finding.code) for finding in findings] == [
        ("error", "path_absolute"), ("warning", "path_absolute")
    ]  # fmt: skip


def test_addresses_of_images_that_are_not_here_say_to_download_them(tmp_path: Path) -> None:
    (tmp_path / "data/images").mkdir(parents=True)
    _, (finding,) = locate(tmp_path / "data/images", ["https://host/a.jpg", "https://host/b.jpg"])
    assert finding.count == 2 and "is an address" in finding.what and "Download the images" in finding.hint


@pytest.mark.parametrize(
    "name",
    ["x" * 300, "a/" * 500 + "x.jpg", "..", ".", "/", "//", "\\", "?d=", "://", "%", "a\0b", "\ud800.jpg", "C:", " "],
)
def test_no_name_ends_in_a_traceback(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "root/images/a.jpg", tmp_path / "root/b.jpg")
    located, findings = locate(tmp_path / "root", [name, "b.jpg", name])
    assert located == 1 and {finding.level for finding in findings} == {"error"}
    write_file(tmp_path / "x.json", [name, "b.jpg"])
    if "\ud800" not in name:
        fixed = fix_names(tmp_path / "x.json", tmp_path / "root", tmp_path / "y.json")
        assert fixed.missing == [name]


def test_the_work_of_matching_is_linear_in_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    # The worst case: one name in every folder.
    files = [f"sequence_{index}/image.png" for index in range(500)]
    names = [f"sequence_{index}\\image.PNG" for index in range(500)]
    compared = []
    monkeypatch.setattr(Counter, "__getitem__", lambda self, key: compared.append(key) or self.get(key, 0))
    assert len(match_names(names, "/base", files, whole_paths=False)) == 500
    assert len(compared) < 10 * 500


def write_file(path: Path, names: Sequence[str]) -> dict[str, Any]:
    document = {
        "info": {"year": 2026},
        "images": [{"id": number, "file_name": name, "extra": 1.50} for number, name in enumerate(names)],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "segmentation": [[1.0, 2, 3]]}],
        "categories": [{"id": 1, "name": "a"}],
    }
    path.write_text(json.dumps(document))
    return document


def test_fix_names_changes_the_names_and_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path / "img/a/1.jpg", tmp_path / "img/a/2.JPG", tmp_path / "img/3.png")
    document = write_file(tmp_path / "x.json", ["a\\1.jpg", "a/2.jpg", "3.png"])
    fixed = fix_names(tmp_path / "x.json", tmp_path / "img", tmp_path / "y.json")
    assert len(fixed.changed) == 2 and fixed.missing == []
    for image, name in zip(document["images"], ["a/1.jpg", "a/2.JPG", "3.png"], strict=True):
        image["file_name"] = name
    assert json.loads((tmp_path / "y.json").read_text()) == document


def test_fix_names_that_does_not_find_all_writes_the_rest_and_exits_with_2(tmp_path: Path) -> None:
    touch(tmp_path / "img/1.jpg")
    write_file(tmp_path / "x.json", ["1.JPG", "2.jpg"])
    command = [
        "fix-names",
        str(tmp_path / "x.json"),
        "--images",
        str(tmp_path / "img"),
        "--to",
        str(tmp_path / "y.json"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "1 images have no file" in done.stderr and "1 names changed" in done.stdout
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "exists: name another file" in done.stderr


@pytest.mark.parametrize("is_alone", [True, False])
def test_white_space_at_the_end_of_names_is_reported_and_removed(is_alone: bool, tmp_path: Path) -> None:
    names = [f"{number}.png" + "\n" * (is_alone or number < 2) for number in range(8)]
    touch(*(tmp_path / f"img/{number}.png" for number in range(8)))
    located, (finding,) = locate(tmp_path / "img", names, tmp_path / "x.json")
    assert located == (0 if is_alone else 6) and finding.count == len(names) - located
    assert "differs from the file's by white space around the name" in finding.what and "fix-names" in finding.hint
    write_file(tmp_path / "x.json", names)
    fixed = fix_names(tmp_path / "x.json", tmp_path / "img", tmp_path / "y.json")
    assert len(fixed.changed) == finding.count and fixed.missing == []


def test_a_file_whose_name_is_not_utf_8_has_to_be_renamed(tmp_path: Path) -> None:
    touch(*(tmp_path / os.fsdecode(f"img/größe_{number}.png".encode("latin-1")) for number in range(3)))
    names = [f"größe_{number}.png" for number in range(3)]
    _, (finding,) = locate(tmp_path / "img", names, tmp_path / "x.json")
    assert finding.count == 3 and f"differs from the file's by {NOT_UTF_8}" in finding.what
    assert "Rename the files, or unpack the archive again" in finding.hint and "fix-names" not in finding.hint
    write_file(tmp_path / "x.json", names)
    done = CliRunner().invoke(
        app, ["fix-names", f"{tmp_path}/x.json", f"--images={tmp_path}/img", f"--to={tmp_path}/y.json"]
    )
    assert done.exit_code == 2 and "0 names changed" in done.stdout
    assert r"3 files have names that are not UTF-8, such as 'gr\udcf6\udcdfe_0.png'" in done.stderr


def test_names_whose_utf_8_was_misread_are_corrected(tmp_path: Path) -> None:
    touch(tmp_path / "img/gr\u00c3\u00b6n.png", tmp_path / "img/blå.png", tmp_path / "img/d\u251c\u2310.png")
    write_file(tmp_path / "x.json", ["grön.png", "bl\u00c3\u00a5.png", "dé.png"])
    fixed = fix_names(tmp_path / "x.json", tmp_path / "img", tmp_path / "y.json")
    assert fixed.changed == {"grön.png": "grÃ¶n.png", "blÃ¥.png": "blå.png", "dé.png": "d├⌐.png"}


def test_fix_names_refuses_to_give_two_images_one_file(tmp_path: Path) -> None:
    touch(tmp_path / "img/1.jpg")
    write_file(tmp_path / "x.json", ["train\\1.jpg", "val\\1.jpg"])
    with pytest.raises(ValueError, match="would both become"):
        fix_names(tmp_path / "x.json", tmp_path / "img", tmp_path / "y.json")
