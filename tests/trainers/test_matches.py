"""Detections are matched with objects by hand-made cases, and right ones are those of COCO's own matching."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.builders.scoring import SCORERS, detections_near, make_truth
from trainers.contract.evaluation_details import ImageErrors
from trainers.matches import match, read_objects
from trainers.scoring import score_classes

BOX = [10.0, 10.0, 20.0, 20.0]
FAR = [100.0, 100.0, 20.0, 20.0]
CAT, DOG, NOTHING = 0, 1, 2


def entry(category: int, box: list[float], **fields: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "bbox": box, **fields}


def write(path: Path, annotations: list[dict[str, Any]], num_images: int = 1) -> Path:
    images = [{"id": n, "height": 200, "width": 200, "file_name": f"val/{n}.png"} for n in range(1, num_images + 1)]
    for number, annotation in enumerate(annotations, start=1):
        annotation |= {"id": number, "area": 400.0, "iscrowd": annotation.get("iscrowd", 0)}
    categories = [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.mark.parametrize(
    ("annotations", "detections", "expected"),
    [
        ([], [], {}),
        ([entry(5, BOX)], [], {(CAT, NOTHING): 1}),
        ([], [entry(5, BOX, score=0.9)], {(NOTHING, CAT): 1}),
        ([entry(5, BOX)], [entry(5, BOX, score=0.49)], {(CAT, NOTHING): 1}),
        ([entry(5, BOX)], [entry(5, BOX, score=0.5)], {(CAT, CAT): 1}),
        ([entry(5, BOX)], [entry(9, BOX, score=0.9)], {(CAT, DOG): 1}),
        ([entry(5, BOX)], [entry(5, FAR, score=0.9)], {(CAT, NOTHING): 1, (NOTHING, CAT): 1}),
        # A second detection of an object is a false one.
        ([entry(5, BOX)], [entry(5, BOX, score=0.9), entry(5, BOX, score=0.8)], {(CAT, CAT): 1, (NOTHING, CAT): 1}),
        # The right class comes first, however sure the wrong one is.
        ([entry(5, BOX)], [entry(9, BOX, score=0.9), entry(5, BOX, score=0.6)], {(CAT, CAT): 1, (NOTHING, DOG): 1}),
        # A detection in a crowd of its class counts for nothing, one of another class is false.
        (
            [entry(5, [0.0, 0.0, 90.0, 90.0], iscrowd=1)],
            [entry(5, BOX, score=0.9), entry(5, BOX, score=0.9), entry(9, BOX, score=0.9)],
            {(NOTHING, DOG): 1},
        ),
        # A category that the file does not list counts for nothing, as in the scores.
        ([entry(5, BOX)], [entry(7, BOX, score=0.9)], {(CAT, NOTHING): 1}),
    ],
)
def test_what_was_taken_for_what(
    tmp_path: Path,
    annotations: list[dict[str, Any]],
    detections: list[dict[str, Any]],
    expected: dict[tuple[int, int], int],
) -> None:
    objects = read_objects(write(tmp_path / "truth.json", annotations))
    assert objects.class_names == ("cat", "dog")
    confusion = match(objects, detections).confusion
    assert {(true, detected): number for true, detected, number in confusion.counts} == expected
    assert (confusion.iou, confusion.score) == (0.5, 0.5)


def test_the_worst_images_come_first_and_good_ones_not_at_all(tmp_path: Path) -> None:
    truth = [entry(5, BOX) | {"image_id": n} for n in (1, 2, 3, 3)]
    found = [
        entry(5, BOX, score=0.9),
        entry(9, FAR, score=0.9) | {"image_id": 2},
        entry(9, BOX, score=0.9) | {"image_id": 3},
        *(entry(9, FAR, score=0.9) | {"image_id": 4} for _ in range(4)),
    ]
    worst = match(read_objects(write(tmp_path / "truth.json", truth, num_images=5)), found).worst_images
    assert worst == (
        ImageErrors(4, "val/4.png", missed=0, false=4),
        ImageErrors(2, "val/2.png", missed=1, false=1),
        ImageErrors(3, "val/3.png", missed=1, false=1),
    )


def test_right_detections_are_as_many_as_in_cocos_own_matching(tmp_path: Path) -> None:
    truth = make_truth(num_images=40)
    found = detections_near(truth["annotations"])
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    for least in (0.0, 0.5, 0.9):
        counts = Counter({(t, d): n for t, d, n in match(read_objects(path), found, min_score=least).confusion.counts})
        curves = score_classes(path, [each for each in found if each["score"] >= least], "bbox", SCORERS[0]).curves
        for number, curve in enumerate(curves):
            right = counts[number, number]
            # The curve ends at the last hundredth of recall that is reached.
            if curve.num_objects:
                assert len(curve.precision) - 1 == int(100 * right / curve.num_objects + 1e-9)
            assert sum(n for (true, _), n in counts.items() if true == number) == curve.num_objects
        detected = sum(n for (_, detected), n in counts.items() if detected != len(curves))
        assert 0 < detected <= len([each for each in found if each["score"] >= least])


def test_rewritten_annotations_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    assert len(read_objects(write(path, [entry(5, BOX)])).by_image[1].boxes) == 1
    assert read_objects(path) is read_objects(path)
    assert len(read_objects(write(path, [entry(5, BOX), entry(9, FAR)])).by_image[1].boxes) == 2
