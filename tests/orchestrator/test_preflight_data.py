"""Preflight judges a data set by what the run does with it, and by how strict it was asked to be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from orchestrator.data.generate import generate
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import load_experiment
from orchestrator.preflight.local import check_data
from tests.builders.bad_input import Project, base_experiment

if TYPE_CHECKING:
    from orchestrator.findings import Finding


@pytest.fixture
def project(tmp_path: Path) -> Project:
    generate(tmp_path / "data", num_train=4, num_val=3, size=64, seed=7)
    return Project(tmp_path, base_experiment(tmp_path / "data"))


def check(project: Project, *, strict: bool = False) -> list[Finding]:
    experiment = load_experiment(project.write())
    (plan,) = expand(experiment, Hardware(0, 2), str(project.root / "runs"), project.root)
    return check_data(experiment, plan, verify_images=False, strict=strict)


def without_labels(project: Project) -> None:
    project.edit(lambda document: document.update(annotations=[]), "val")


def test_a_validation_set_without_labels_stops_only_what_is_evaluated(project: Project) -> None:
    without_labels(project)
    (finding,) = check(project)
    assert (finding.level, finding.code) == ("warning", "split_empty") and "no evaluation" in finding.hint
    project.experiment["protocol"] = {"kind": "time_to_train"}
    assert [(finding.level, finding.code) for finding in check(project)] == [("error", "split_empty")]


def test_training_needs_labels_whatever_is_evaluated(project: Project) -> None:
    project.edit(lambda document: document.update(annotations=[]))
    assert ("error", "split_empty") in [(finding.level, finding.code) for finding in check(project)]


def test_strictness_stops_a_run_at_a_flaw_that_training_would_pass(project: Project) -> None:
    project.edit(lambda document: document["annotations"][2].update(bbox=[3, 3, 0, 9]))
    assert [(finding.level, finding.code) for finding in check(project)] == [("warning", "box_empty")]
    assert [(finding.level, finding.code) for finding in check(project, strict=True)] == [("error", "box_empty")]


def test_validation_images_that_are_trained_on_are_a_warning(project: Project) -> None:
    project.image(0, "val").write_bytes(project.image(1).read_bytes())
    assert [(finding.level, finding.code) for finding in check(project)] == [("warning", "split_overlap")]


def test_masks_that_only_a_validation_loss_reads_as_training_does_are_judged_with_it(project: Project) -> None:
    rle = {"size": [64, 64], "counts": [0, 64 * 64]}
    project.edit(lambda document: document["annotations"][0].update(segmentation=rle), "val")
    project.experiment["protocol"] = {"kind": "time_to_train"}
    assert "rle_with_polygon_format" not in [finding.code for finding in check(project)]
    project.experiment["protocol"]["validation_loss"] = True
    (finding,) = [finding for finding in check(project) if finding.code == "rle_with_polygon_format"]
    assert finding.level == "error" and "val" in finding.file
