"""`data excerpt` takes a part of a data set that is a good data set itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from orchestrator.data.__main__ import app
from orchestrator.data.checks import check_split
from orchestrator.data.excerpt import excerpt
from orchestrator.data.exports import find_splits
from orchestrator.data.generate import generate
from orchestrator.data.layout import coco_layout
from orchestrator.findings import has_errors

if TYPE_CHECKING:
    from orchestrator.data.layout import Dataset


@pytest.fixture
def source(tmp_path: Path) -> Dataset:
    return generate(tmp_path / "source", num_train=9, num_val=5, size=32, num_classes=5)


@pytest.mark.usefixtures("source")
def test_an_excerpt_is_consistent_and_keeps_all_categories(tmp_path: Path) -> None:
    taken = excerpt(tmp_path / "source", tmp_path / "part", num_images=4)
    assert {part: images for part, (images, _) in taken.items()} == {"train": 4, "val": 4}
    splits, findings = find_splits(tmp_path / "part")
    reports = [check_split(split) for split in splits.values()]
    assert findings == []
    assert not any(has_errors(report.findings) for report in reports)
    assert [len(report.summary.categories) for report in reports if report.summary] == [5, 5]


@pytest.mark.usefixtures("source")
def test_the_same_seed_takes_the_same_images(tmp_path: Path) -> None:
    def names(to: str, seed: int) -> set[str]:
        excerpt(tmp_path / "source", tmp_path / to, num_images=4, seed=seed)
        return {path.name for path in coco_layout(tmp_path / to).train.images.iterdir()}

    assert names("a", 1) == names("b", 1)
    assert len({frozenset(names(f"c{seed}", seed)) for seed in range(2, 8)}) > 1


def test_images_with_objects_come_first(source: Dataset, tmp_path: Path) -> None:
    document = json.loads(source.train.annotations.read_text())
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] in (2, 5)]
    source.train.annotations.write_text(json.dumps(document))
    excerpt(tmp_path / "source", tmp_path / "part", num_images=2)
    taken = json.loads(coco_layout(tmp_path / "part").train.annotations.read_text())
    assert [image["id"] for image in taken["images"]] == [2, 5]


@pytest.mark.usefixtures("source")
def test_more_than_there_are_takes_all(tmp_path: Path) -> None:
    assert excerpt(tmp_path / "source", tmp_path / "part", num_images=100)["train"][0] == 9


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret"])
def test_a_name_that_leads_out_is_not_copied(source: Dataset, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    document = json.loads(source.train.annotations.read_text())
    document["images"][0]["file_name"] = name
    source.train.annotations.write_text(json.dumps(document))
    done = CliRunner().invoke(app, ["excerpt", "9", "--from", str(tmp_path / "source"), "--to", str(tmp_path / "part")])
    assert done.exit_code == 2 and "file_name" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "source"]


@pytest.mark.usefixtures("source")
def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["excerpt", "2", "--from", str(tmp_path / "source"), "--to", str(tmp_path)])
    assert done.exit_code == 2 and "exists: name a new folder" in done.stderr


def test_a_folder_without_a_data_set_is_reported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, ["excerpt", "2", "--from", str(tmp_path / "empty"), "--to", str(tmp_path / "part")])
    assert done.exit_code == 2 and "no annotation file in COCO's format" in done.stderr


def test_the_generate_command_draws_and_explains_refusals(tmp_path: Path) -> None:
    command = ["generate", str(tmp_path / "set"), "--num-train", "2", "--num-val", "1", "--size", "40x32"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, command).exit_code == 0
    done = CliRunner().invoke(app, [*command, "--seed", "4"])
    assert done.exit_code == 2 and "seed 0 there, 4 asked" in done.stderr
    assert CliRunner().invoke(app, [*command, "--seed", "4", "--replace"]).exit_code == 0
    done = CliRunner().invoke(app, ["generate", str(tmp_path / "other"), "--size", "big"])
    assert done.exit_code == 2 and "--size is 'big'" in done.stderr
