"""What scoring reads of annotations: a field that does not count cannot change a figure, nor can the ids."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.builders.scoring import FOUND, IOU_TYPES, TRUTH, Document, Figures, both, changed, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from trainers.scoring_input import IouType

EVERYWHERE = {"image_id", "category_id", "iscrowd", "area"}
NEEDED: dict[IouType, dict[str, set[str]]] = {
    "bbox": {"images": {"id"}, "annotations": EVERYWHERE | {"bbox"}, "categories": {"id"}},
    "segm": {
        "images": {"id", "height", "width"},
        "annotations": EVERYWHERE | {"segmentation"},
        "categories": {"id"},
    },
    "keypoints": {
        "images": {"id"},
        "annotations": EVERYWHERE | {"bbox", "keypoints", "num_keypoints"},
        "categories": {"id"},
    },
}
"""What COCOeval and detectron2's evaluator look at, by list of the file."""
WRITTEN_BY_TOOLS = {
    "images": ["height", "width", "file_name", "license", "date_captured", "coco_url", "flickr_url", "extra"],
    "annotations": ["id", "bbox", "segmentation", "keypoints", "num_keypoints", "attributes", "ignore", "caption",
                    "score", "isbbox", "metadata", "obb", "neg_category_ids"],
    "categories": ["name", "supercategory", "color", "keypoints", "skeleton", "frequency", "isthing"],
}  # fmt: skip
PLAIN_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON_VALUES = st.recursive(
    PLAIN_VALUES | st.sampled_from(["", "None", 0, -1, 2**80]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DELETED = object()


@st.composite
def odd_documents(draw: st.DrawFn, iou_type: IouType) -> Document:
    document = copy.deepcopy(TRUTH)
    for key in draw(
        st.lists(st.sampled_from(["info", "licenses", "type", "videos"]) | st.text(max_size=5), max_size=3)
    ):
        if key not in TRUTH:
            document[key] = draw(JSON_VALUES)
    for part, names in WRITTEN_BY_TOOLS.items():
        for name in draw(st.lists(st.sampled_from(names) | st.text(max_size=5), max_size=4)):
            if name in NEEDED[iou_type][part]:
                continue
            value = draw(JSON_VALUES | st.just(DELETED))
            for entry in draw(st.sampled_from([document[part], document[part][:1], document[part][1::2]])):
                if value is DELETED:
                    entry.pop(name, None)
                else:
                    entry[name] = value
    return document


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[IouType, Figures]:
    folder = tmp_path_factory.mktemp("expected")
    return {iou_type: both(folder / f"{iou_type}.json", TRUTH, iou_type) for iou_type in IOU_TYPES}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("odd")
    return (folder / f"{number}.json" for number in range(10**6))


@pytest.mark.parametrize("iou_type", IOU_TYPES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_value_of_a_field_that_scoring_does_not_need_changes_a_figure(
    paths: Iterator[Path], expected: dict[IouType, Figures], iou_type: IouType, data: st.DataObject
) -> None:
    document = data.draw(odd_documents(iou_type))
    assert both(next(paths), document, iou_type) == expected[iou_type]


@pytest.mark.parametrize(
    "metadata",
    [
        {"info": {"version": "", "year": "", "date_created": 0}, "licenses": [{"id": 0, "name": "", "url": ""}]},
        {"info": {"year": "2024", "version": 1.0}, "licenses": None},
        {"info": "my data", "licenses": {}},
    ],
)
def test_what_export_tools_write_beside_the_annotations_is_not_read(
    tmp_path: Path, expected: dict[IouType, Figures], metadata: Document
) -> None:
    document = changed(
        images=lambda image: image.update(license="None", date_captured=0, coco_url=None, flickr_url=3),
        categories=lambda category: category.update(supercategory=1),
    )
    assert both(tmp_path / "truth.json", document | metadata, "segm") == expected["segm"]


@pytest.mark.parametrize("iou_type", IOU_TYPES)
@pytest.mark.parametrize(
    "new_id",
    [lambda n: n - 1, lambda n: 0, lambda n: 1 + n // 2, lambda n: -n, lambda n: 10**18 + 7 * n, lambda n: f"a{n}"],
    ids=["from_0", "all_0", "twice", "negative", "huge", "text"],
)
def test_annotation_ids_do_not_matter(
    tmp_path: Path, expected: dict[IouType, Figures], iou_type: IouType, new_id: Callable[[int], Any]
) -> None:
    document = changed(annotations=lambda annotation: annotation.update(id=new_id(annotation["id"])))
    assert both(tmp_path / "truth.json", document, iou_type) == expected[iou_type]


@pytest.mark.parametrize("iou_type", IOU_TYPES)
@pytest.mark.parametrize(
    "moved", [lambda n: n - 2, lambda n: n - 50, lambda n: n - 10**6, lambda n: 2**60 + n, lambda n: 997 * n]
)
def test_image_and_category_ids_may_be_negative_sparse_and_huge(
    tmp_path: Path, expected: dict[IouType, Figures], iou_type: IouType, moved: Callable[[int], int]
) -> None:
    def move(entry: dict[str, Any]) -> None:
        entry |= {key: moved(entry[key]) for key in ("image_id", "category_id") if key in entry}
        if "image_id" not in entry:
            entry["id"] = moved(entry["id"])

    document = changed(images=move, annotations=move, categories=move)
    found = copy.deepcopy(FOUND)
    for detection in found:
        move(detection)
    assert both(tmp_path / "truth.json", document, iou_type, found) == expected[iou_type]


def test_pycocotools_alone_never_finds_the_object_of_id_0(tmp_path: Path) -> None:
    """The example of docs/measurement.md: four objects found exactly, the first of them with the highest score."""
    box = [10.0, 10.0, 50.0, 50.0]
    entry = {"category_id": 1, "bbox": box, "area": 2500.0, "iscrowd": 0}
    document = {
        "images": [{"id": number} for number in range(4)],
        "annotations": [entry | {"id": number, "image_id": number} for number in range(4)],
        "categories": [{"id": 1, "name": "square"}],
    }
    found = [{"image_id": n, "category_id": 1, "bbox": box, "score": 0.9 - n / 10} for n in range(4)]
    assert both(tmp_path / "truth.json", document, "bbox", found)["ap"] == pytest.approx(100)
    # A false positive first: precision 3/4 at the 76 recalls up to 3/4, of COCO's 101.
    assert raw(document, "bbox", found)[0] == pytest.approx(100 * 0.75 * 76 / 101)


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_two_objects_with_one_id_are_two(tmp_path: Path, expected: dict[IouType, Figures], iou_type: IouType) -> None:
    document = changed(annotations=lambda annotation: annotation.update(id=1 + annotation["id"] // 2))
    assert both(tmp_path / "truth.json", document, iou_type) == expected[iou_type]
    assert raw(document, iou_type)[0] < 0.9 * (expected[iou_type]["ap"] or 0)
