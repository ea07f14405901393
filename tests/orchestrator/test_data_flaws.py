"""Flaws that detectron2 and the scorer put up with are warnings with a count; what ends or misleads them is no such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask

from orchestrator.data.checks import check_split, compare_splits
from orchestrator.data.generate import generate
from orchestrator.data.layout import Split, coco_layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.findings import Finding

    Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generate(tmp_path / "set", num_train=6, num_val=6, size=48, seed=5, num_classes=2)
    return tmp_path / "set"


def check(root: Path, change: Change, *, for_scoring: bool = False, encoding: str = "utf-8") -> list[Finding]:
    train = coco_layout(root).train
    document = json.loads(train.annotations.read_text())
    change(document)
    train.annotations.write_text(json.dumps(document), encoding=encoding)
    return check_split(Split(train.annotations, train.images, for_scoring=for_scoring)).findings


def third(**values: Any) -> Change:
    return lambda document: document["annotations"][2].update(values)


def every(**values: Any) -> Change:
    return lambda document: [entry.update(values) for entry in document["annotations"]]


def remove(part: str, *names: str) -> Change:
    return lambda document: [entry.pop(name, None) for entry in document[part] for name in names]


@pytest.mark.parametrize(
    ("change", "code", "in_training", "in_scoring"),
    [
        (third(segmentation=[[1, 1, 9, 1, 9, 9], [1, 1, 2, 2]]), "polygon_short", "out the polygon", "without it"),
        (third(segmentation=[[1, 1, 2, 2]]), "polygon_short", "out the object", "counts as missed"),
        (third(segmentation=[[1, 1], [9, 1], [9, 9]]), "polygon_short", "points as pairs", "points as pairs"),
        (third(segmentation=[[1, 1, 9, 1, 9, 9, 3]]), "polygon_odd", "out the object", "without its last number"),
        (third(bbox=[-4, 3, 20, 9]), "box_over_edge", "cuts it at the edge", "with the part outside"),
        (third(bbox=[60, 3, 20, 9]), "box_outside", "leaves the object out", "hardly be found"),
        (third(bbox=[3, 3, 0, 9]), "box_empty", "leaves the object out", "never be found"),
        (third(bbox=[float("nan"), 3, 9, 9]), "box_not_finite", "leaves such an object out", "ERROR would match"),
        (third(image_id=99), "annotation_orphan", "detectron2 leaves it out", "leaves it out"),
        (every(iscrowd=0.0), "", "", ""),
        (third(iscrowd=None), "annotation_entry", "ERROR takes the object for a crowd", ""),
        (remove("annotations", "iscrowd"), "iscrowd_missing", "", "scored as a single object"),
        (remove("annotations", "area"), "area_missing", "", "that of its mask or box"),
        (third(area=-1), "area_negative", "", "never counts the object"),
        (third(ignore=1), "annotation_ignore", "ERROR refuses the file", "ERROR refuses the file"),
        (third(category_id=9), "category_unknown", "ERROR not a category", "ERROR not a category"),
        (remove("images", "width"), "image_entry", "ERROR width", "ERROR width"),
        (third(keypoints="x"), "keypoints_entry", "ERROR not a list of numbers", "ERROR not a list of numbers"),
    ],
)
def test_the_level_of_a_flaw_is_what_training_or_scoring_makes_of_it(
    root: Path, change: Change, code: str, in_training: str, in_scoring: str
) -> None:
    for words, for_scoring in ((in_training, False), (in_scoring, True)):
        found = [each for each in check(root, change, for_scoring=for_scoring) if each.code == code]
        assert bool(found) == bool(words), found
        for finding in found:
            level = "error" if words.startswith("ERROR") else "warning"
            assert finding.level == level and words.removeprefix("ERROR ") in finding.what


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "for_scoring", "hint"),
    [
        *(({"ignore": value}, False, "Take the field out, or write 0") for value in (None, "0", "", "false", NAN)),
        *(({"ignore": value}, True, 'Write "iscrowd": 1, or remove the annotation') for value in (1, True, "1")),
        *(({"iscrowd": value}, False, 'Write "iscrowd": 0, or 1 for') for value in (None, "0", 2, NAN)),
        ({"iscrowd": NAN}, True, 'Write "iscrowd": 0, or 1 for'),
    ],
)
def test_a_field_that_says_nothing_makes_no_crowd_of_an_object(
    root: Path, values: dict[str, Any], for_scoring: bool, hint: str
) -> None:
    (finding,) = check(root, every(**values), for_scoring=for_scoring)
    assert finding.level == "error" and hint in finding.hint


def test_an_ignore_that_says_nothing_and_one_that_does_have_a_hint_each(root: Path) -> None:
    found = check(root, lambda document: (every(ignore=None)(document), third(ignore=1)(document)))
    assert [(finding.code, finding.hint[:4]) for finding in found] == [
        ("annotation_ignore", "Take"),
        ("annotation_ignore", "Writ"),
    ]


def test_a_flaw_of_many_objects_is_one_warning_with_their_number(root: Path) -> None:
    (finding,) = check(root, lambda document: every(bbox=[-4, 3, 20, 9])(document))
    num_annotations = len(json.loads(coco_layout(root).train.annotations.read_text())["annotations"])
    assert finding.count == num_annotations > 3 and f"{num_annotations - 1:,} more like this" in finding.what


def test_boxes_in_shares_of_the_image_are_recognised(root: Path) -> None:
    (finding,) = check(root, every(bbox=[0.25, 0.5, 0.25, 0.5]))
    assert finding.code == "box_normalised" and "[0.25, 0.5, 0.25, 0.5] for one" in finding.what


@pytest.mark.parametrize("odd", [[0.25, 0.5, 0.750001, 0.5], [-0.000001, 0.5, 0.5, 0.5], [0, 0, 0, 0], [9, 9, 9, 9]])
def test_boxes_in_shares_are_recognised_whatever_one_of_them_is(root: Path, odd: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        every(bbox=[0.25, 0.5, 0.25, 0.5])(document)
        document["annotations"][0]["bbox"] = odd

    assert "box_normalised" in [finding.code for finding in check(root, change)]


def test_a_file_without_the_list_of_annotations_is_unlabelled(root: Path) -> None:
    (finding,) = check(root, lambda document: document.pop("annotations"))
    assert (finding.code, finding.id) == ("split_empty", "annotations")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_every_encoding_of_annotations_passes(root: Path, encoding: str) -> None:
    assert check(root, lambda document: None, encoding=encoding) == []


def test_ids_as_text_or_decimals_are_counted_and_matched(root: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for image in document["images"]:
            image["id"] = f"img_{image['id']}"
        for entry in document["annotations"]:
            entry["image_id"], entry["category_id"] = f"img_{entry['image_id']}", float(entry["category_id"])

    (finding,) = check(root, change)
    num_annotations = len(json.loads(coco_layout(root).train.annotations.read_text())["annotations"])
    assert (finding.level, finding.code) == ("warning", "ids_converted")
    assert f"{6 + 2 * num_annotations:,} ids or sizes, such as id 'img_1', are text, decimals" in finding.what


def test_areas_far_from_their_masks_are_a_warning_for_scoring_only(root: Path) -> None:
    def spoil(document: dict[str, Any]) -> None:
        document["annotations"] = list({entry["image_id"]: entry for entry in document["annotations"]}.values())
        every(area=1, bbox=[4, 4, 36, 36], segmentation=[[4, 4, 40, 4, 40, 40, 4, 40]])(document)

    assert check(root, spoil) == []
    (finding,) = check(root, lambda document: None, for_scoring=True)
    assert finding.code == "area_differs" and "its area is 1, its mask covers 1,296 pixels" in finding.what
    runs = {"size": [48, 48], "counts": [0, 1000, 48 * 48 - 1000]}
    found = check(root, every(area=1000, bbox=[0, 0, 21, 48], segmentation=runs), for_scoring=True)
    assert found == []
    (finding,) = check(root, every(area=2000, segmentation=runs), for_scoring=True)
    assert "covers 1,000 pixels" in finding.what
    (finding,) = check(root, every(area=2000, segmentation=[], bbox=[0, 0, 10, 10]), for_scoring=True)
    assert "its box covers 100 pixels" in finding.what


def test_a_name_that_two_categories_have_is_reported(root: Path) -> None:
    found = check(root, lambda document: document["categories"][1].update(name=document["categories"][0]["name"] + " "))
    assert [(finding.level, finding.code) for finding in found] == [("warning", "category_name")]


def test_a_class_without_objects_is_reported(root: Path) -> None:
    found = check(root, lambda document: document["categories"].append({"id": 7, "name": "never seen"}))
    (finding,) = [each for each in found if each.code == "category_empty"]
    assert finding.level == "warning" and "7 'never seen'; no model can learn" in finding.what


def test_images_that_detectron2_does_not_train_on_are_counted(root: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] > 2]
        for entry in document["annotations"]:
            entry["iscrowd"] = int(entry["image_id"] == 3)

    (finding,) = [each for each in check(root, change) if each.code == "images_without_objects"]
    assert "3 of 6 images have no object, 1 of them crowds only" in finding.what


@pytest.mark.parametrize("for_scoring", [False, True])
def test_many_crowds_are_a_warning_wherever_they_are(root: Path, for_scoring: bool) -> None:
    def crowds(number: int, total: int) -> list[str]:
        def change(document: dict[str, Any]) -> None:
            entry = document["annotations"][0]
            box = [1, 1, 20, 20]
            masks = [[[1, 1, 21, 1, 21, 21, 1 + n / total, 21]] for n in range(total)]
            document["annotations"] = [
                {**entry, "id": n + 1, "image_id": n % 6 + 1, "bbox": box, "segmentation": masks[n], "area": 400}
                | {"iscrowd": int(n >= total - number)}
                for n in range(total)
            ]

        found = [each for each in check(root, change, for_scoring=for_scoring) if each.code.startswith("crowd")]
        assert all(each.level == ("error" if number == total else "warning") for each in found)
        return [f"{each.code}: {each.what}" for each in found]

    (found,) = crowds(16, 24)
    effect = "not counted when missed" if for_scoring else "not trained on"
    assert found.startswith("crowd_many: 16 of 24 annotations are crowds") and effect in found
    assert crowds(10, 100) == crowds(5, 24) == []  # a tenth; a handful
    assert [each.split(":")[0] for each in crowds(24, 24)] == ["crowd_only"]


def test_objects_that_are_all_dropped_leave_nothing_to_train_on(root: Path) -> None:
    found = check(root, every(segmentation=[[1, 2]]))
    assert [finding.code for finding in found if finding.level == "error"] == ["no_objects"]


def split_reports(root: Path) -> list[Finding]:
    layout = coco_layout(root)
    return compare_splits(check_split(layout.train), check_split(layout.val))


def test_different_images_do_not_overlap(root: Path) -> None:
    assert split_reports(root) == []


def test_images_of_both_splits_are_found_by_name_and_by_content(root: Path) -> None:
    layout = coco_layout(root)
    train, val = sorted(layout.train.images.iterdir()), sorted(layout.val.images.iterdir())
    val[2].write_bytes(train[4].read_bytes())
    (finding,) = split_reports(root)
    assert finding.level == "warning" and "1 of 6 validation images are copies of training images" in finding.what
    assert str(val[2]) in finding.what and str(train[4]) in finding.what
    layout.val.annotations.write_bytes(layout.train.annotations.read_bytes())
    same = compare_splits(check_split(layout.train), check_split(Split(layout.train.annotations, layout.train.images)))
    assert ["6 of 6 validation images are training images" in finding.what for finding in same] == [True]


def test_images_of_equal_size_and_other_content_do_not_overlap(root: Path) -> None:
    layout = coco_layout(root)
    for part, shade in ((layout.train, 10), (layout.val, 20)):
        document = json.loads(part.annotations.read_text())
        for number, image in enumerate(document["images"]):
            image["file_name"] = f"{number}.bmp"
            Image.new("L", (48, 48), shade + number).save(part.images / image["file_name"])
        part.annotations.write_text(json.dumps(document))
    assert split_reports(root) == []


def test_ids_that_come_twice_are_counted(root: Path) -> None:
    num_images = 400

    def change(document: dict[str, Any]) -> None:
        image, entry = document["images"][0], document["annotations"][0]
        document["images"] = [{**image, "id": number // 2} for number in range(num_images)]
        document["annotations"] = [{**entry, "id": number // 2 + 1, "image_id": 1} for number in range(num_images)]

    counts = {finding.code: finding.count for finding in check(root, change)}
    assert counts["duplicate_image_id"] == counts["duplicate_annotation_id"] == num_images // 2


def test_numbers_beyond_floating_point_are_named(root: Path) -> None:
    file = coco_layout(root).train.annotations
    document = json.loads(file.read_text())
    document["annotations"][0]["segmentation"] = [[0, 0, "big", 0, 9, 9]]
    file.write_text(json.dumps(document).replace('"big"', "1e999"))
    (finding,) = check(root, lambda document: None)
    assert (finding.level, finding.code) == ("error", "polygon_not_finite")


def test_ids_of_annotations_may_be_of_any_kind_and_size(root: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for number, entry in enumerate(document["annotations"]):
            entry["id"] = (f"a-{number}", number + 0.5, 10**30 + number)[number % 3]

    (finding,) = check(root, change)
    assert (finding.level, finding.code) == ("warning", "ids_converted")


def test_an_entry_of_an_image_that_is_wrong_makes_no_orphans(root: Path) -> None:
    (finding,) = check(root, lambda document: document["images"][0].update(width=None))
    assert finding.code == "image_entry"


@pytest.mark.parametrize(("name", "code"), [(7, None), (None, "category_entry"), ("\ud800", "category_entry")])
def test_a_category_is_named_by_a_text_or_number(root: Path, name: Any, code: str | None) -> None:
    found = check(root, lambda document: document["categories"][0].update(name=name))
    assert [finding.code for finding in found] == ([code] if code else [])


def test_the_size_of_a_compressed_mask_may_be_decimals(root: Path) -> None:
    counts = mask.encode(np.asfortranarray(np.eye(48, dtype=np.uint8)))["counts"].decode()
    segmentation = {"size": [48.0, 48.0], "counts": counts}
    assert check(root, third(bbox=[0, 0, 48, 48], segmentation=segmentation)) == []


def test_a_link_to_itself_keeps_no_other_file_from_being_read(root: Path) -> None:
    images = coco_layout(root).train.images
    (images / "loop.png").symlink_to("loop.png")
    assert check(root, lambda document: None) == []
    (finding,) = check(root, lambda document: document["images"][0].update(file_name="loop.png"))
    assert finding.code == "image_missing" and "is a link to" in finding.what
