"""Paths of experiment files and options: addresses and variables that nothing replaces are not taken for folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.experiment.detectron_config import zoo_path
from orchestrator.experiment.paths import absolute
from orchestrator.experiment.plan import Hardware, expand, start_weights
from orchestrator.experiment.prediction_file import read_prediction
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.references import with_references
from orchestrator.experiment.run_dir import new_run_dir
from orchestrator.experiment.spec import Experiment, SpecError
from tests.builders.commands import run_command
from tests.builders.experiments import tiny_experiment
from trainers.contract.plan import TrialPlan

NO_PATH = "a path is wanted; addresses, with two slashes (s3://…), are for storage.checkpoints and model.weights only"


def made(**changes: Any) -> Experiment:
    return parse_experiment(tiny_experiment(**changes), "test")


def planned(experiment: Experiment) -> TrialPlan:
    return expand(experiment, Hardware(num_cpus=1), "/run", Path("/data"))[0]


def coco(**paths: str) -> dict[str, Any]:
    names = ("train_annotations", "train_images", "val_annotations", "val_images")
    return {"coco": {name: paths.get(name, "/data/x") for name in names}}


WAYS = {
    "storage.path": lambda path: new_run_dir(made(storage={"path": path}), None),
    "--output": lambda path: new_run_dir(made(), Path(path)),
    "storage.checkpoints": lambda path: planned(made(storage={"checkpoints": path})),
    "model.weights": lambda path: start_weights(made(model={"weights": path})),
    "model.config": zoo_path,
    "data": lambda path: planned(made(data=coco(val_images=path))),
    "reference_files": lambda path: with_references(made(reference_files=[path])),
    "prediction": lambda path: read_prediction(Path(path)),
}
"""What reads a path, by the name that its message begins with."""


@pytest.mark.parametrize("place", WAYS)
def test_an_address_is_not_taken_for_a_folder_of_that_name(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=re.escape(f"{place}: s3:/bucket/runs: {NO_PATH}")):
        WAYS[place]("s3:/bucket/runs")


def test_an_address_of_a_file_of_another_machine_is_none_here() -> None:
    with pytest.raises(SpecError, match=re.escape(f"x: file://server/runs: {NO_PATH}")):
        absolute("file://server/runs", "x")


@pytest.mark.parametrize("place", WAYS)
@pytest.mark.parametrize("path", ["$HOME/runs", "/scratch/${USER}/runs", "runs/job-$SLURM_JOB_ID"])
def test_a_variable_that_nothing_replaces_is_not_taken_for_a_folder(
    place: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SpecError, match=rf"{place}: {re.escape(path)}: \$\S+ is not replaced by .*; write the path out"
    ):
        WAYS[place](path)


def test_a_folder_that_has_such_a_name_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a$b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute("a$b/runs", "x") == tmp_path / "a$b" / "runs"
    assert absolute(tmp_path / "a$b" / "$5", "x") == tmp_path / "a$b" / "$5"


@pytest.mark.parametrize("given", ["file:///mnt/a%20b/x", Path("file:///mnt/a%20b/x")])
def test_an_address_of_a_file_of_this_machine_is_its_path(given: str | Path) -> None:
    assert absolute(given, "x") == Path("/mnt/a b/x")
    assert new_run_dir(made(storage={"path": str(given)}), None).is_relative_to("/mnt/a b/x")


def test_a_run_that_would_vanish_with_its_container_ends_the_command(tmp_path: Path) -> None:
    done = run_command("--dry-run", "--set", "storage.path=s3://bucket/runs", cwd=tmp_path)
    assert done.returncode == 2 and f"storage.path: s3://bucket/runs: {NO_PATH}" in done.stderr
    assert list(tmp_path.iterdir()) == []
