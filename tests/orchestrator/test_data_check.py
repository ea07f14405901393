"""`data check` finds what is wrong with a data set, all of it, quickly, and caches the result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from orchestrator.data import checks as coco_checks
from orchestrator.data.__main__ import app
from orchestrator.data.checks import check_split
from orchestrator.data.generate import generate
from orchestrator.data.layout import Split, coco_layout
from orchestrator.files import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generate(tmp_path / "set", num_train=6, num_val=4, size=48, crowd_fraction=0.5, seed=5)
    return tmp_path / "set"


def check(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["check", str(path), "--json", *options])
    return done.exit_code, json.loads(done.stdout)


def codes(report: dict[str, Any]) -> list[str]:
    return [finding["code"] for finding in report["findings"]]


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def spoil_four(root: Path) -> None:
    """One image truncated, one annotation of an unknown class, one flat polygon, one absolute path."""
    paths = coco_layout(root)

    def change(document: dict[str, Any]) -> None:
        document["images"][1]["file_name"] = "/etc/passwd"
        whole = [entry for entry in document["annotations"] if not entry["iscrowd"]]
        whole[0]["category_id"] = 10**9
        whole[1]["segmentation"] = [1, 1, 5, 5]

    image = sorted(paths.train.images.iterdir())[0]
    edit(paths.train.annotations, change)
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])


FOUR = ["category_unknown", "image_truncated", "path_absolute", "polygon_entry"]


def test_a_good_set_passes_and_is_counted(root: Path) -> None:
    code, report = check(root)
    assert (code, report["findings"], report["ok"]) == (0, [], True)
    assert [split["num_images"] for split in report["splits"]] == [6, 4]
    assert all(split["num_crowd"] for split in report["splits"])


def test_the_folder_above_a_set_named_coco_will_do(root: Path) -> None:
    shutil.move(root, root.parent / "above" / "coco")
    assert check(root.parent / "above")[0] == 0


def test_one_annotation_file_can_be_checked_by_itself(root: Path) -> None:
    paths = coco_layout(root)
    assert check(paths.val.annotations, "--images", str(paths.val.images))[0] == 0
    code, report = check(paths.val.annotations)
    assert code == 2 and codes(report) == ["image_missing"] and "none of the 4 images" in report["findings"][0]["what"]


def test_the_four_faults_and_nothing_else_are_listed(root: Path) -> None:
    spoil_four(root)
    code, report = check(root)
    errors = [finding["code"] for finding in report["findings"] if finding["level"] == "error"]
    assert code == 2 and sorted(errors) == FOUR


@pytest.mark.shared
def test_the_real_excerpt_passes_and_with_four_faults_exactly_those_are_listed(
    tmp_path: Path, shared_data: Path
) -> None:
    excerpt = shared_data / "coco"
    command = [sys.executable, "-m", "orchestrator.data", "check", "--json"]
    done = subprocess.run([*command, str(excerpt)], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert set(codes(json.loads(done.stdout))) <= {"counts_differ", "category_empty"}
    shutil.copytree(excerpt, tmp_path / "coco", copy_function=shutil.copyfile)
    for folder, _, names in os.walk(tmp_path / "coco"):
        for path in (Path(folder), *(Path(folder) / name for name in names)):
            path.chmod(0o755)
    spoil_four(tmp_path / "coco")
    done = subprocess.run(
        [*command, str(tmp_path / "coco")], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    errors = [finding for finding in json.loads(done.stdout)["findings"] if finding["level"] == "error"]
    assert sorted(finding["code"] for finding in errors) == FOUR


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", "json_invalid", "empty"),
        (b'{"images": [{"id": 1, "file', "json_truncated", "at byte "),
        (b'{"images": ]', "json_invalid", "at byte 11 of 12"),
        ('{"images": "ä", ]'.encode(), "json_invalid", "at byte 17 of 18"),
        (b"[1, 2]", "json_structure", "holds a list"),
        (b"\xff\xfe\x00", "json_invalid", "UTF-16"),
        (b'{"images": 3, "annotations": [], "categories": null}', "json_structure", "'images' is a int"),
        (b'{"images": [7], "annotations": ["x"], "categories": [{}]}', "json_structure", "entry 0 of 'images'"),
        (b"[" * 200_000, "json_invalid", "nested too deeply"),
    ],
)
def test_a_file_that_is_not_an_annotation_file_is_reported_with_the_place(
    root: Path, content: bytes, code: str, words: str
) -> None:
    paths = coco_layout(root)
    paths.val.annotations.write_bytes(content)
    report = check_split(Split(paths.val.annotations, paths.val.images, for_scoring=True))
    assert code in [finding.code for finding in report.findings]
    assert any(words in finding.what for finding in report.findings), report.findings


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"id": None}, "annotation_entry"),
        ({"image_id": True}, "annotation_entry"),
        ({"image_id": [1]}, "annotation_entry"),
        ({"image_id": None}, "annotation_entry"),
        ({"image_id": "other"}, "annotation_orphan"),
        ({"bbox": None}, "box_entry"),
        ({"bbox": [1, 2, 3]}, "box_entry"),
        ({"bbox": ["1", 2, 3, 4]}, "box_entry"),
        ({"bbox": [float("inf"), 2, 3, 4]}, "box_not_finite"),
        ({"segmentation": "x"}, "mask_entry"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "polygon_entry"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "polygon_entry"),
        ({"segmentation": [[]]}, "polygon_short"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "polygon_not_finite"),
        ({"keypoints": [1, 2, [3]]}, "keypoints_entry"),
        ({"segmentation": {"size": [48, 48], "counts": "zzz"}}, "rle_invalid"),
        ({"segmentation": {"size": [48, 48], "counts": [1, 2]}}, "rle_invalid"),
        ({"segmentation": {"size": [48, 48], "counts": [-5, 48 * 48 + 5]}}, "rle_invalid"),
        ({"segmentation": {"counts": [48 * 48]}}, "rle_invalid"),
        ({"iscrowd": 5}, "annotation_entry"),
        ({"iscrowd": None}, "iscrowd_missing"),
        ({"area": None}, "area_missing"),
        ({"area": float("nan")}, "area_missing"),
        ({"area": 10**400}, "area_missing"),
        ({"id": 0}, "annotation_id_zero"),
    ],
)
def test_an_annotation_of_the_wrong_kind_is_named(root: Path, change: dict[str, Any], code: str) -> None:
    paths = coco_layout(root)
    edit(paths.val.annotations, lambda document: document["annotations"][1].update(change))
    found = check_split(Split(paths.val.annotations, paths.val.images, for_scoring=True)).findings
    assert [finding.code for finding in found] == [code]
    assert found[0].id in ("annotation 2", "annotation 0", "annotations[1]")


def test_a_linked_folder_is_followed_with_a_warning(root: Path, tmp_path: Path) -> None:
    paths = coco_layout(root)
    (tmp_path / "outside").mkdir()
    shutil.copy(next(paths.train.images.iterdir()), tmp_path / "outside" / "x.jpg")
    (paths.train.images / "more").symlink_to(tmp_path / "outside")
    edit(paths.train.annotations, lambda document: document["images"][0].update(file_name="more/x.jpg"))
    code, report = check(root)
    assert code == 0 and [(each["code"], each["level"]) for each in report["findings"]] == [("path_link", "warning")]


def test_strictness_makes_errors_of_warnings(root: Path) -> None:
    edit(coco_layout(root).train.annotations, lambda document: document["annotations"][0].update(bbox=[-9, 1, 20, 20]))
    assert check(root)[0] == 0
    code, report = check(root, "--strict")
    assert code == 2 and codes(report) == ["box_over_edge"] and report["errors"] == 1


def test_images_in_subfolders_and_of_other_formats_are_read(root: Path) -> None:
    paths = coco_layout(root)
    (paths.train.images / "sub").mkdir()
    Image.new("L", (48, 48)).save(paths.train.images / "sub" / "grey.png")
    edit(paths.train.annotations, lambda document: document["images"][0].update(file_name="sub/grey.png"))
    assert check(root, "--verify-images")[0] == 0


def test_a_jpeg_with_bytes_after_its_end_is_whole(root: Path) -> None:
    image = next(coco_layout(root).train.images.iterdir())
    image.write_bytes(image.read_bytes() + b"\0" * 100)
    assert check(root)[0] == 0


def test_a_name_that_differs_in_case_is_suggested(root: Path) -> None:
    paths = coco_layout(root)
    image = sorted(paths.train.images.iterdir())[0]
    image.rename(image.with_suffix(".JPG"))
    (finding,) = check(root)[1]["findings"]
    assert finding["code"] == "image_missing" and "by upper and lower case" in finding["what"]


def test_a_mistake_in_the_datasets_folder_is_recognised(root: Path) -> None:
    shutil.move(root, root.parent / "datasets" / "coco")
    (root.parent / "datasets" / "coco" / "coco").mkdir()
    code, report = check(root.parent / "datasets" / "coco" / "coco")
    assert code == 2 and codes(report) == ["layout"]
    assert f"DETECTRON2_DATASETS={root.parent / 'datasets'}" in report["findings"][0]["hint"]


def test_half_a_layout_is_an_error_and_a_lone_part_a_warning(root: Path) -> None:
    paths = coco_layout(root)
    shutil.rmtree(paths.val.images)
    code, report = check(root)
    assert code == 2 and "no folder in" in report["findings"][0]["what"]
    paths.val.annotations.unlink()
    code, report = check(root)
    assert code == 0 and [finding["level"] for finding in report["findings"]] == ["warning"]


def test_the_names_of_lvis_are_pointed_out(root: Path) -> None:
    url = {"file_name": None, "coco_url": "http://images.cocodataset.org/train2017/1.jpg"}
    edit(coco_layout(root).val.annotations, lambda document: document["images"][0].update(url))
    (hint,) = [each["hint"] for each in check(root)[1]["findings"] if each["code"] == "image_entry"]
    assert "coco_url" in hint


def test_counts_that_differ_from_the_published_coco_are_noted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = coco_layout(root)
    num_annotations = len(json.loads(paths.train.annotations.read_text())["annotations"])
    monkeypatch.setattr(coco_checks, "OFFICIAL_CATEGORIES", frozenset({1, 2, 3}))
    split = Split(paths.train.annotations, paths.train.images)
    assert [finding.code for finding in check_split(split).findings] == ["counts_differ"]
    monkeypatch.setattr(coco_checks, "OFFICIAL_COUNTS", {"instances_train2017.json": (6, num_annotations)})
    assert check_split(split).findings == []


def test_one_finding_on_many_files_or_objects_is_one_line(root: Path) -> None:
    generate(root.parent / "many", num_train=40, num_val=1, size=32)
    paths = coco_layout(root.parent / "many")
    for image in paths.train.images.iterdir():
        image.write_bytes(b"")
    (found,) = check_split(Split(paths.train.annotations, paths.train.images)).findings
    assert (found.code, found.count) == ("image_corrupt", 40) and "39 more like this: image 2, image 3 …" in found.what
    edit(paths.train.annotations, lambda document: [entry.update(category_id=9) for entry in document["annotations"]])
    num_annotations = len(json.loads(paths.train.annotations.read_text())["annotations"])
    findings = check_split(Split(paths.train.annotations, paths.train.images)).findings
    assert [f.count for f in findings if f.code == "category_unknown"] == [num_annotations]


def test_a_large_set_is_checked_by_several_processes_and_its_result_cached(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = root.parent / "large"
    generate(large, num_train=2500, num_val=1, size=16, distinct_images=50, shapes_per_image=(1, 2))
    paths = coco_layout(large)
    split, seen = Split(paths.train.annotations, paths.train.images), []
    bar = nullcontext(lambda done, total: seen.append((done, total)))
    monkeypatch.setattr(coco_checks, "show_bar", lambda title: bar)
    first = check_split(split)
    assert (first.findings, first.from_cache, seen[-1]) == ([], False, (2500, 2500))
    again = check_split(split)
    assert again.from_cache and again.summary == first.summary
    assert not check_split(split, verify_images=True).from_cache  # more was asked than is known
    assert check_split(split, verify_images=True).from_cache
    # A changed image, of the same size even, is looked at again; so is a changed annotation file.
    victim = sorted(paths.train.images.iterdir())[7]
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content[:-2] + b"xx")
    assert [finding.code for finding in check_split(split).findings] == ["image_truncated"]
    victim.write_bytes(content)
    edit(paths.train.annotations, lambda document: document["annotations"][0].update(category_id=77))
    assert [finding.code for finding in check_split(split).findings] == ["category_unknown"]
    assert [finding.code for finding in check_split(split).findings] == ["category_unknown"]
    # A damaged cache is no obstacle.
    for entry in (cache_folder() / "checks").iterdir():
        entry.write_text("{")
    assert not check_split(split).from_cache


def test_the_command_and_preflight_import_nothing_heavy() -> None:
    heavy = {"torch", "ray", "cv2", "PIL", "numpy", "mlflow"}
    modules = "sys, orchestrator.data.__main__, orchestrator.preflight.local"
    code = f"import {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
