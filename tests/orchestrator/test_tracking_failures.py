"""A store that fails while a run is tracked is one line; what was deleted comes with the command that restores it.

What was renamed, or is not needed, keeps no run from going on.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import mlflow.entities
import pytest
from mlflow.tracking import MlflowClient

from orchestrator.preflight.tracking import check_earlier_tracking, check_store
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from orchestrator.tracking.driver import Tracker, TrackingError
from orchestrator.tracking.schema import revisions
from tests.builders.commands import run_command
from tests.builders.logs import whole_run
from tests.builders.run_folder import made_experiment, make_run
from tests.builders.waiting import wait_for
from trainers.contract.events import LoopStarted, RunStarted, TrialRestarted, event_from_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def run(made: Path, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, next to a store of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path / "run")
    shutil.copy(database, tmp_path / "mlflow.db")
    return tmp_path / "run"


def store(run: Path) -> str:
    return f"sqlite:///{run.parent / 'mlflow.db'}"


def first_lines(run: Path, number: int) -> str:
    """Cuts the run's events off after some; returns the rest."""
    lines = (run / FILE_NAME).read_text().splitlines(keepends=True)
    (run / FILE_NAME).write_text("".join(lines[:number]))
    return "".join(lines[number:])


def go_on(run: Path, rest: str) -> None:
    """Writes the events of another start of a run whose driver was killed."""
    outbox = Outbox(run / FILE_NAME)
    started = next(event for event, _ in outbox.read() if isinstance(event, RunStarted))
    outbox.append(dataclasses.replace(started, attempt=1), *map(event_from_json, rest.splitlines()))


def reference(run: Path) -> mlflow.entities.Run:
    """The run of the published figure."""
    (found,) = MlflowClient(store(run)).search_runs(["1"], "tags.kind = 'reference'")
    return found


def failure(run: Path, tracker: Tracker | None = None) -> str:
    with pytest.raises(TrackingError) as raised:
        (tracker or Tracker(run, store(run))).sync()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700
    return str(raised.value)


def test_an_experiment_that_is_deleted_meanwhile_comes_with_the_command_that_restores_it(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rest = first_lines(run, 20)
    tracker = Tracker(run, store(run))
    tracker.sync()
    client = MlflowClient(store(run))
    client.delete_experiment(str(tracker.experiment_id()))
    with (run / FILE_NAME).open("a") as file:
        file.write(rest)
    with caplog.at_level(logging.WARNING):
        text = failure(run, tracker)
    assert f"the experiment {tracker.experiment_id()} was deleted there" in text
    assert f"MLFLOW_TRACKING_URI={store(run)} mlflow experiments restore -x {tracker.experiment_id()}" in text
    assert not caplog.records, "a library's traceback"
    client.restore_experiment(str(tracker.experiment_id()))
    assert tracker.sync()


@pytest.mark.parametrize("trial", ["", "reference-1xcpu"])
def test_a_run_that_is_deleted_meanwhile_comes_with_the_command_that_restores_it(run: Path, trial: str) -> None:
    rest = first_lines(run, 20)
    tracker = Tracker(run, store(run))
    tracker.sync()
    client, deleted = MlflowClient(store(run)), tracker.run_ids()[trial]
    client.delete_run(deleted)
    client.delete_run(reference(run).info.run_id)  # which is not missed
    with (run / FILE_NAME).open("a") as file:
        file.write(rest)
    assert f"mlflow runs restore --run-id {deleted}" in failure(run, tracker)
    client.restore_run(deleted)
    assert tracker.sync()


def test_an_experiment_that_was_deleted_before_is_named(run: Path) -> None:
    client = MlflowClient(store(run))
    client.delete_experiment(client.create_experiment("demo"))
    assert "mlflow experiments restore -x 1" in failure(run)


def test_a_database_that_is_locked_for_longer_than_mlflow_waits_has_every_event_in_the_end(run: Path) -> None:
    rest = first_lines(run, 20)
    tracker = Tracker(run, store(run))
    tracker.sync()
    with (run / FILE_NAME).open("a") as file:
        file.write(rest)
    with closing(sqlite3.connect(run.parent / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "does not take events: " in (text := failure(run, tracker)) and "database is locked" in text
        other.execute("ROLLBACK")
    assert tracker.sync()
    assert {each.info.status for each in MlflowClient(store(run)).search_runs(["1"])} == {"FINISHED"}


def test_a_store_that_lost_its_run_for_good_says_how_to_track_it_again(run: Path) -> None:
    rest = first_lines(run, 20)
    Tracker(run, store(run)).sync()
    with closing(sqlite3.connect(run.parent / "mlflow.db")) as connection:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            connection.execute(f"DELETE FROM {table}")  # noqa: S608 - the names above
        connection.commit()
    with (run / FILE_NAME).open("a") as file:
        file.write(rest)
    state = run / "tracking.json"
    assert f"remove {state} to track the run again" in failure(run)
    state.unlink()
    assert Tracker(run, store(run)).sync()


def test_a_run_whose_experiment_was_renamed_goes_on_in_it(run: Path) -> None:
    rest = first_lines(run, 20)
    tracker, client = Tracker(run, store(run)), MlflowClient(store(run))
    tracker.sync()
    id, before = str(tracker.experiment_id()), tracker.run_ids()
    client.rename_experiment(id, "a better name")
    other = client.create_experiment("demo")
    client.delete_experiment(other)
    experiment = made_experiment(tracking={"uri": store(run)})
    assert check_earlier_tracking(experiment, run) == [], "another one has its name now"
    client.delete_experiment(id)
    (finding,) = check_earlier_tracking(experiment, run)
    assert f"mlflow experiments restore -x {id}" in finding.hint
    client.restore_experiment(id)
    go_on(run, rest)
    assert Tracker(run, store(run)).sync()
    after = Tracker(run, store(run))
    assert after.experiment_id() == id and before.items() <= after.run_ids().items()
    assert {each.info.status for each in client.search_runs([id])} == {"FINISHED"}


def test_a_store_that_was_made_again_gets_nothing_into_the_experiment_of_somebody_else(
    run: Path, database: Path
) -> None:
    rest = first_lines(run, 20)
    Tracker(run, store(run)).sync()
    shutil.copy(database, run.parent / "mlflow.db")
    client = MlflowClient(store(run))
    assert client.create_experiment("of somebody else") == Tracker(run, store(run)).experiment_id()
    go_on(run, rest)
    assert f"remove {run / 'tracking.json'} to track the run again" in failure(run)
    assert client.search_runs(["1"]) == []


def test_a_reference_that_was_deleted_keeps_no_run_from_going_on_and_is_logged_again(run: Path) -> None:
    rest = first_lines(run, 20)
    Tracker(run, store(run)).sync()
    deleted = reference(run).info.run_id
    MlflowClient(store(run)).delete_run(deleted)
    assert check_earlier_tracking(made_experiment(tracking={"uri": store(run)}), run) == []
    go_on(run, rest)
    assert Tracker(run, store(run)).sync()
    again = reference(run).info
    assert again.run_id != deleted and again.status == "FINISHED"


def test_params_stay_those_of_the_first_start_where_a_later_one_has_other_settings(run: Path) -> None:
    config, events = "SOLVER:\n  CHECKPOINT_PERIOD: {}\n", [event for event, _ in Outbox(run / FILE_NAME).read()]
    first = next(number for number, event in enumerate(events) if isinstance(event, LoopStarted))
    loop = dataclasses.replace(events[first], config_yaml=config.format(20))
    (run / FILE_NAME).unlink()
    Outbox(run / FILE_NAME).append(*events[:first], loop)
    Tracker(run, store(run)).sync()
    later = dataclasses.replace(loop, attempt=1, config_yaml=config.format(5) + "  GAMMA: 0.5\n")
    again = TrialRestarted(trial=loop.trial, attempt=1, rank=-1, time=loop.time, failure="x", message="", iteration=0)
    go_on(run, "\n".join(event.to_json() for event in (again, later, *events[first + 1 :])))
    tracker = Tracker(run, store(run))
    assert tracker.sync()
    tracked = MlflowClient(store(run)).get_run(tracker.run_ids()[loop.trial])
    params = {name: value for name, value in tracked.data.params.items() if name.startswith("d2.")}
    assert params == {"d2.SOLVER.CHECKPOINT_PERIOD": "20", "d2.SOLVER.GAMMA": "0.5"}
    assert tracked.info.status == "FINISHED" and tracked.data.metrics["throughput/images_per_second"] > 0


def test_a_run_that_cannot_go_on_fails_at_the_time_of_its_last_event(run: Path) -> None:
    later = [dataclasses.replace(e, time=e.time + 1e9) for e, _ in Outbox(run / FILE_NAME).read()][:20]
    (run / FILE_NAME).unlink()
    Outbox(run / FILE_NAME).append(*later)  # by a clock that is ahead of this machine's
    tracker, client = Tracker(run, store(run)), MlflowClient(store(run))
    tracker.fail("no room")
    infos = [client.get_run(id).info for id in tracker.run_ids().values()]
    assert len(infos) == 2, "parent and trial"
    assert {info.status for info in infos} == {"FAILED"}
    assert {info.end_time for info in infos} == {int(max(event.time for event in later) * 1000)}


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://user:s3cret@127.0.0.1:9", "Connection refused"),
        ("sqlite:////proc/none/mlflow.db", "/proc/none"),
        ("nonsense://somewhere", "nonsense"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_without_credentials(run: Path, uri: str, words: str) -> None:
    text = failure(run, Tracker(run, uri))
    assert words in text and "s3cret" not in text and "does not take events" in text


def test_the_process_that_tracks_says_why_once_and_the_driver_keeps_it(run: Path) -> None:
    tracker = Tracker(run, "http://127.0.0.1:9")
    assert not tracker.finish(timeout=600)
    assert tracker.failure == "MLflow at http://127.0.0.1:9 does not take events: Connection refused"


def test_a_new_store_is_whole_once_it_has_a_table_whenever_its_making_is_cut_off(run: Path) -> None:
    path = run.parent / "new" / "mlflow.db"
    process = Tracker(run, f"sqlite:///{path}").start()
    wait_for(lambda: (path.exists() and path.stat().st_size) or process.poll() is not None)
    process.kill()
    process.wait()
    with closing(sqlite3.connect(path)) as connection:
        if connection.execute("SELECT 1 FROM sqlite_master").fetchone():  # else it was killed before the commit
            assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (revisions()[0],)
    assert Tracker(run, f"sqlite:///{path}").sync()


def test_a_store_whose_making_was_cut_off_is_left_to_mlflow_and_a_failure_says_what_to_do(run: Path) -> None:
    path = run.parent / "cut.sqlite"

    def checked_after(statement: str) -> list[str]:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(statement)
            connection.commit()
        return [finding.code for finding in check_store(f"sqlite:///{path}", "demo")]

    assert checked_after("CREATE TABLE experiments (experiment_id INTEGER, name TEXT)") == []
    assert checked_after("CREATE TABLE alembic_version (version_num TEXT NOT NULL)") == []
    assert checked_after("CREATE TABLE metrics (step BIGINT)") == [], "the first of many steps is done by half"
    assert "was cut off while it made" in failure(run, Tracker(run, f"sqlite:///{path}"))
    assert checked_after("INSERT INTO alembic_version VALUES ('451aebb31d03')") == []
    assert checked_after("INSERT INTO experiments VALUES (0, 'Default')") == ["tracking_schema"], "it was whole once"


def test_a_replay_that_fails_is_one_line_and_one_that_succeeds_notes_it_in_the_results(
    tmp_path: Path, database: Path
) -> None:
    run = make_run(tmp_path / "run")
    shutil.copy(database, tmp_path / "mlflow.db")
    variables = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "COLUMNS": "80"}
    done = run_command("--replay-outbox", run, cwd=run.parent, **variables)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        "error MLflow at http://127.0.0.1:9: no MLflow server answers within 3 s: Connection refused"
    )
    assert '"tracked": true' not in (run / "results.json").read_text()
    done = run_command("--replay-outbox", run, cwd=run.parent, MLFLOW_TRACKING_URI=store(run))
    assert done.returncode == 0, done.stderr
    assert '"tracked": true' in (run / "results.json").read_text()
    assert Tracker(run, store(run)).run_ids()[""] in (run / "results.json").read_text()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "mlruns", "sqlite://", "the store"])
def test_a_log_that_cannot_be_tracked_ends_its_command_with_one_line(run: Path, uri: str) -> None:
    client = MlflowClient(store(run))
    client.delete_experiment(client.create_experiment("replay"))
    log = whole_run().write(run.parent / "log.txt")
    uri = store(run) if uri == "the store" else uri
    done = run_command(log, "--track", "--tracking-uri", uri, module="orchestrator.replay", cwd=run.parent)
    assert done.returncode == 2, done.stdout
    (finding, count) = done.stderr.strip().splitlines()
    assert finding.startswith("error [tracking_") and count == "1 error, 0 warnings."
    assert ("mlflow experiments restore -x 1" in finding) == uri.startswith("sqlite:///")
