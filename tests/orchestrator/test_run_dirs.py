"""The folder of a run that begins: its own, also where several begin at once, and none is left where none was begun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.experiment import run_dir
from orchestrator.experiment.run_dir import begin_run_dir, new_run_dir
from orchestrator.experiment.spec import Experiment
from tests.builders.commands import run_command
from tests.builders.experiments import tiny_experiment, write_experiment

NOBODY = "~nobody-of-this-name"
STAMP = "2026-01-31T12-00-00Z"


@pytest.fixture(autouse=True)
def same_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "time_stamp", lambda: STAMP)


def made(path: Path) -> Experiment:
    return Experiment.model_validate(tiny_experiment(storage={"path": str(path)}))


def test_runs_that_begin_in_the_same_second_get_a_folder_each(tmp_path: Path) -> None:
    experiment, names = made(tmp_path / "runs"), [STAMP, f"{STAMP}-2", f"{STAMP}-3"]
    with begin_run_dir(experiment, None) as first, begin_run_dir(experiment, None) as second:
        assert first.is_dir() and second.is_dir()
        third = new_run_dir(experiment, None)
        assert [first, second, third] == [tmp_path / "runs" / "tiny" / name for name in names]
        assert not third.exists()


def test_a_folder_that_remains_empty_is_removed_with_those_that_were_made_for_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    experiment = made(tmp_path / "there" / "runs")
    with begin_run_dir(experiment, None) as folder:
        pass
    assert list((tmp_path / "there").iterdir()) == []
    with begin_run_dir(experiment, None) as folder:
        (folder / "events.jsonl").touch()
    assert (folder / "events.jsonl").exists() and folder.name == STAMP


@pytest.mark.parametrize("storage", ["file", "file/below", "link", "n" * 300])
def test_a_folder_that_cannot_be_made_is_left_to_preflight(tmp_path: Path, storage: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "below")
    with begin_run_dir(made(tmp_path / storage), None) as folder:
        assert folder == tmp_path / storage / "tiny" / STAMP and not os.path.lexists(folder)


def test_a_folder_that_is_given_is_taken_as_it_is(tmp_path: Path) -> None:
    with begin_run_dir(made(tmp_path), tmp_path / "mine") as folder:
        assert folder == tmp_path / "mine" and not folder.exists()


def test_a_command_that_preflight_refuses_leaves_no_folder(tmp_path: Path) -> None:
    too_much = tiny_experiment(resources={"device": "cuda"}, data={"coco2017": True})
    done = run_command(write_experiment(tmp_path, too_much), cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("option", ["--output", "--resume", "--replay-outbox"])
def test_a_run_below_the_home_of_nobody_ends_the_command_with_2(tmp_path: Path, option: str) -> None:
    tries = [] if option == "--replay-outbox" else ["--dry-run"]
    done = run_command(option, NOBODY, *tries, cwd=tmp_path)
    assert done.returncode == 2 and "~nobody-of-this-name is no user's home folder here" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []
