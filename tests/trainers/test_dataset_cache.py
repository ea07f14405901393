"""Cached records are those of detectron2's loader, and never those of another file."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json, register_coco_instances

from trainers import dataset_cache
from trainers.contract.plan import DatasetPlan
from trainers.dataset_cache import CachedRecords, cached_records, image_sizes


def truth() -> dict[str, Any]:
    """Every kind of annotation: polygons, both kinds of RLE, keypoints, ids with gaps, images without any object."""
    polygon = [[1.5, 2.25, 30.0, 2.0, 30.1, 40.7, 1.0, 40.0]]
    runs = {"size": [48, 64], "counts": [100, 50, 48 * 64 - 150]}
    text = {"size": [48, 64], "counts": "d1R1n0"}
    base = {"iscrowd": 0, "area": 10.0, "bbox": [1.5, 2, 28.6, 38]}
    annotations = [
        {**base, "image_id": 9, "category_id": 17, "segmentation": polygon},
        {**base, "image_id": 9, "category_id": 90, "segmentation": text, "iscrowd": 1},
        {**base, "image_id": 4, "category_id": 1, "segmentation": runs, "iscrowd": 1},  # crowds only: filtered
        {**base, "image_id": 2, "category_id": 1, "segmentation": runs},
        {**base, "image_id": 2, "category_id": 1, "segmentation": [[1.0, 2.0]]},  # no polygon: left out
        {**base, "image_id": 2, "category_id": 1, "keypoints": [3, 4, 2]},
    ]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1
    return {
        "images": [{"id": i, "height": 48, "width": 64 - i, "file_name": f"größe/{i}.jpg"} for i in (9, 4, 2, 11)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"kind {i}"} for i in (90, 1, 17)],
    }


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetPlan:
    (tmp_path / "truth.json").write_text(json.dumps(truth()))
    return DatasetPlan("cache_test", str(tmp_path / "truth.json"), str(tmp_path / "images"))


def by_detectron2(dataset: DatasetPlan, filter_empty: bool) -> list[dict[str, Any]]:
    if dataset.name in DatasetCatalog:
        DatasetCatalog.remove(dataset.name)
        MetadataCatalog.remove(dataset.name)
    register_coco_instances(dataset.name, {}, dataset.annotations, dataset.images)
    records: list[dict[str, Any]] = get_detection_dataset_dicts([dataset.name], filter_empty=filter_empty)
    return records


@pytest.mark.parametrize("filter_empty", [False, True])
def test_records_are_detectron2s_at_the_first_and_the_second_start(
    tmp_path: Path, dataset: DatasetPlan, filter_empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_detectron2(dataset, filter_empty)
    classes = MetadataCatalog.get(dataset.name).thing_classes
    ids = MetadataCatalog.get(dataset.name).thing_dataset_id_to_contiguous_id
    assert len(expected) == (2 if filter_empty else 4)
    for start in range(2):
        MetadataCatalog.remove(dataset.name)
        records = cached_records(dataset, filter_empty, tmp_path / "cache")
        assert isinstance(records, CachedRecords)
        assert list(records) == expected
        assert [type(a["bbox_mode"]) for r in records for a in r["annotations"]] == [
            type(a["bbox_mode"]) for r in expected for a in r["annotations"]
        ]
        assert MetadataCatalog.get(dataset.name).thing_classes == classes
        assert MetadataCatalog.get(dataset.name).thing_dataset_id_to_contiguous_id == ids
        assert image_sizes(records).tolist() == image_sizes(expected).tolist()
        if start == 0:
            monkeypatch.setattr(dataset_cache, "load_coco_json", None)  # the second start must not parse


def test_records_are_a_sequence_that_nobody_can_spoil(tmp_path: Path, dataset: DatasetPlan) -> None:
    records = cached_records(dataset, False, tmp_path / "cache")
    assert records[-1] == records[len(records) - 1] == records[1:][-1]
    with pytest.raises(IndexError):
        records[len(records)]
    records[0]["annotations"].clear()
    records[0]["height"] = 0
    assert records[0]["annotations"] and records[0]["height"] == 48
    assert list(pickle.loads(pickle.dumps(records))) == list(records)  # noqa: S301 - our own bytes


def test_changed_annotations_are_parsed_again(tmp_path: Path, dataset: DatasetPlan) -> None:
    cached_records(dataset, False, tmp_path / "cache")
    changed = truth()
    changed["annotations"][0]["bbox"][0] = 1.6  # the same number of bytes
    Path(dataset.annotations).write_text(json.dumps(changed))
    os.utime(dataset.annotations, ns=(1, 1))
    records = cached_records(dataset, False, tmp_path / "cache")
    assert list(records) == load_coco_json(dataset.annotations, dataset.images, dataset.name)
    assert records[2]["annotations"][0]["bbox"][0] == 1.6


def test_a_touched_file_is_known_by_its_content(
    tmp_path: Path, dataset: DatasetPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(cached_records(dataset, False, tmp_path / "cache"))
    os.utime(dataset.annotations, ns=(1, 1))
    monkeypatch.setattr(dataset_cache, "load_coco_json", None)
    assert list(cached_records(dataset, False, tmp_path / "cache")) == expected
    monkeypatch.setattr(dataset_cache, "file_sha256", None)  # and the third start need not even hash it
    assert list(cached_records(dataset, False, tmp_path / "cache")) == expected


def test_a_full_disk_takes_nothing_from_a_cache_that_is_valid(
    tmp_path: Path, dataset: DatasetPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(cached_records(dataset, False, tmp_path / "cache"))
    os.utime(dataset.annotations, ns=(1, 1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(dataset_cache, "load_coco_json", None)
    records = cached_records(dataset, False, tmp_path / "cache")
    assert isinstance(records, CachedRecords) and list(records) == expected


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path: Path, dataset: DatasetPlan) -> None:
    records = cached_records(dataset, False, tmp_path / "cache")
    assert isinstance(records, CachedRecords)
    left, others = (tmp_path / "cache" / f"{stem}abc.part" for stem in (records.path.stem, "0" * 32))
    for part in (left, others):
        part.write_bytes(b"half")
    os.utime(dataset.annotations, ns=(1, 1))
    cached_records(dataset, False, tmp_path / "cache")
    assert not left.exists() and others.exists(), "the others' may still be written, under its own lock"


@pytest.mark.parametrize("damage", [b"", b"records1", b"something else altogether", None], ids=str)
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, dataset: DatasetPlan, damage: bytes | None) -> None:
    records = cached_records(dataset, False, tmp_path / "cache")
    assert isinstance(records, CachedRecords)
    expected, path = list(records), records.path
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    assert list(cached_records(dataset, False, tmp_path / "cache")) == expected


def test_filtered_and_unfiltered_records_have_separate_caches(tmp_path: Path, dataset: DatasetPlan) -> None:
    assert len(cached_records(dataset, False, tmp_path / "cache")) == 4
    assert len(cached_records(dataset, True, tmp_path / "cache")) == 2
    assert len(cached_records(dataset, False, tmp_path / "cache")) == 4


def test_what_cannot_be_cached_is_parsed_every_time(
    tmp_path: Path, dataset: DatasetPlan, caplog: pytest.LogCaptureFixture
) -> None:
    changed = truth()
    changed["annotations"][0]["bbox"][0] = float("nan")
    Path(dataset.annotations).write_text(json.dumps(changed))
    records = cached_records(dataset, False, tmp_path / "cache")
    assert isinstance(records, list) and len(records) == 4
    assert "cannot be cached" in caplog.text


def test_a_folder_that_cannot_be_written_costs_the_cache_and_nothing_else(
    tmp_path: Path, dataset: DatasetPlan, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    records = cached_records(dataset, False, tmp_path / "file" / "cache")
    assert isinstance(records, list) and len(records) == 4
    assert "parsed at every start" in caplog.text


@pytest.mark.shared
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco_records_are_detectron2s(tmp_path: Path, shared_data: Path, split: str) -> None:
    coco = shared_data / "coco"
    dataset = DatasetPlan(f"cache_{split}", str(coco / f"annotations/instances_{split}.json"), str(coco / split))
    assert list(cached_records(dataset, True, tmp_path)) == by_detectron2(dataset, True)
