"""MLflow gets figures by class under names of their own, and every photo once per evaluation, whatever is repeated."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from orchestrator.process import session_niceness
from orchestrator.runlog.outbox import FILE_NAME
from orchestrator.tracking.driver import Tracker
from orchestrator.tracking.evaluations import MAX_CLASSES, evaluation_metrics
from orchestrator.tracking.text import fit
from tests.builders.metric_rows import repeated_points
from tests.builders.run_folder import made_experiment, make_run
from tests.builders.trials import trained
from tests.builders.waiting import wait_for
from trainers.contract.events import Evaluated

CLASSES = ["a@b", "a_b", "a/b", "", "..", "x" * 300, "x" * 301]
"""Names that MLflow does not take as they are, and which must not become one."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, next to a store without runs."""
    place = tmp_path_factory.mktemp("made")
    MlflowClient(f"sqlite:///{place}/mlflow.db").search_experiments()
    experiment = made_experiment(trials={"world_sizes": [1, 2], "scaling": "strong"})
    return make_run(place / "run", experiment, classes=CLASSES)


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run with a store of its own; its details stay where they were written."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(made.parent / "mlflow.db", tmp_path)
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def store(run: Path) -> str:
    return f"sqlite:///{run.parent / 'mlflow.db'}"


def trials(tracker: Tracker) -> list[str]:
    return [name for name in tracker.run_ids() if name]


def images(run: Path) -> Counter[str]:
    """How often each image was logged, by trial, name and step, small and large."""
    tracker = Tracker(run, store(run))
    client = MlflowClient(store(run))
    return Counter(
        f"{trial} {file.path.split('+timestamp+')[0]} {'compressed' in file.path}"
        for trial in trials(tracker)
        for file in client.list_artifacts(tracker.run_ids()[trial], "images")
    )


def test_photos_are_logged_once_per_evaluation_however_often_the_run_is_tracked(run: Path) -> None:
    lines = (run / FILE_NAME).read_text().splitlines(keepends=True)
    (run / FILE_NAME).write_text("".join(lines[: len(lines) // 2]))
    Tracker(run, store(run)).sync()  # and is killed there
    (run / FILE_NAME).write_text("".join(lines))
    Tracker(run, store(run)).sync()
    once = images(run)
    # Two trials, three photos, at four evaluations and once annotated, as a large and a small file.
    assert set(once.values()) == {1} and len(once) == 2 * 3 * 5 * 2
    (run / "tracking.json").unlink()
    Tracker(run, store(run)).sync()
    assert images(run) == once
    assert repeated_points(run.parent / "mlflow.db") == []


def test_a_photo_of_which_only_the_large_file_arrived_is_completed(run: Path) -> None:
    Tracker(run, store(run)).sync()
    before = images(run)
    for number, small in enumerate(sorted(run.parent.rglob("images/*+compressed.webp"))):
        if number % 2:
            small.unlink()
    (run / "tracking.json").unlink()
    Tracker(run, store(run)).sync()
    assert images(run) == before


def test_pictures_that_a_killed_process_was_writing_are_removed_with_the_run(run: Path) -> None:
    temporary = run / "tracking.tmp"
    temporary.mkdir()
    (temporary / "half.webp").touch()
    tracker = Tracker(run, store(run))
    process = psutil.Process(tracker.start().pid)
    assert process.environ()["TMPDIR"] == str(temporary) and not (temporary / "half.webp").exists()
    assert tracker.finish(600) and images(run) and not temporary.exists()


def test_what_tracks_goes_behind_all_that_trains_until_the_run_waits_for_it(run: Path) -> None:
    tracker = Tracker(run, store(run))
    process = psutil.Process(tracker.start().pid)
    process.suspend()

    def niceness(pid: int) -> tuple[int, int]:
        return psutil.Process(pid).nice(), session_niceness(pid)

    shares_by_session = Path(f"/proc/{process.pid}/autogroup").exists()
    assert niceness(process.pid) == (19, 19 if shares_by_session else 0)
    waiting = threading.Thread(target=tracker.finish, args=[600])
    waiting.start()
    if os.geteuid() == 0:  # others may not raise a process's priority again
        wait_for(lambda: niceness(process.pid) == niceness(os.getpid()))
    process.resume()
    waiting.join()


def test_curves_confusions_and_details_are_artifacts_of_a_trial(run: Path) -> None:
    tracker = Tracker(run, store(run))
    tracker.sync()
    client = MlflowClient(store(run))
    run_id = tracker.run_ids()[trials(tracker)[0]]
    files = {file.path for file in client.list_artifacts(run_id, "evaluation")}
    names = ("precision_recall.png", "f1.png", "confusion_matrix.png", "details.json")
    assert files == {f"evaluation/{name}" for name in names}
    logged = client.get_run(run_id).data.metrics
    assert len([name for name in logged if name.startswith("validation_class/box_ap")]) == len(CLASSES)
    assert {"validation_loss/total_loss", "validation_loss/loss_cls"} <= set(logged)
    assert len(client.get_metric_history(run_id, "validation_loss/total_loss")) == 4


def test_photos_that_are_gone_are_said_and_all_else_is_tracked(run: Path, made: Path) -> None:
    data = made.parent / "data"
    data.rename(made.parent / "elsewhere")
    try:
        tracker = Tracker(run, store(run))
        assert tracker.sync()
    finally:
        (made.parent / "elsewhere").rename(data)
    client = MlflowClient(store(run))
    tags = [client.get_run(tracker.run_ids()[trial]).data.tags for trial in trials(tracker)]
    assert len(tags) == 2 and all(each["photos"].startswith("none: FileNotFoundError") for each in tags)
    assert not images(run)


def test_a_damaged_file_of_details_keeps_nothing_else_from_mlflow(run: Path, made: Path) -> None:
    files = {path: path.read_text() for path in made.rglob("evaluation/*.json")}
    try:
        for path, text in files.items():
            path.write_text(text.replace('"precision":[1', '"precision":["x",1'))
        tracker = Tracker(run, store(run))
        assert tracker.sync()
    finally:
        for path, text in files.items():
            path.write_text(text)
    client = MlflowClient(store(run))
    assert images(run) and not client.list_artifacts(tracker.run_ids()[trials(tracker)[0]], "evaluation")


def test_an_older_run_is_tracked_without_photos(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(made.parent / "mlflow.db", tmp_path)
    assert Tracker(make_run(tmp_path / "run", old=True), store(tmp_path / "run")).sync()
    assert not images(tmp_path / "run")


def evaluated(*names: str) -> Evaluated:
    event = next(event for event in trained().events if isinstance(event, Evaluated))
    return replace(event, class_ap={f"{part}/{name}": 1.0 for part in ("box_ap", "mask_ap") for name in names})


def test_classes_keep_names_of_their_own() -> None:
    sent = evaluation_metrics(evaluated("person", "traffic light", *CLASSES))
    of_classes = [name for name in sent if name.startswith("validation_class/")]
    assert len(of_classes) == 2 * (2 + len(CLASSES)) and {fit(name, "key") for name in of_classes} == set(of_classes)
    assert {"validation_class/box_ap/person", "validation_class/mask_ap/traffic light", "coco/box_ap"} <= set(sent)


def test_more_classes_than_charts_can_be_looked_at_have_no_metrics_of_their_own() -> None:
    names = [f"class {n}" for n in range(MAX_CLASSES + 1)]
    assert len(evaluation_metrics(evaluated(*names[:-1]))) > 2 * MAX_CLASSES
    sent = evaluation_metrics(evaluated(*names))
    assert "coco/box_ap" in sent and not any(name.startswith("validation_class/") for name in sent)
