"""MLflow dead, slow, silent, locked and back again: training never waits, and every point arrives exactly once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
from mlflow.tracking import MlflowClient

from orchestrator.drive import NOT_TRACKED, exit_code
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from orchestrator.tracking.driver import Tracker
from tests.builders.commands import run_command
from tests.builders.experiments import write_experiment
from tests.builders.fault_bench import Outcome, experiment, metric_rows
from tests.builders.mlflow_server import MlflowServer
from tests.builders.s3 import free_port
from tests.builders.waiting import wait_for
from trainers.contract.events import Evaluated, RunEnded, StepsDone
from trainers.faults import VARIABLE, Fault, fired

pytestmark = pytest.mark.train


@pytest.fixture
def lines(undisturbed: Outcome) -> list[str]:
    """The outbox of a finished run, line by line."""
    outbox = Path(undisturbed.plan.trial_dir).parent / FILE_NAME
    return outbox.read_text(encoding="utf-8").splitlines(keepends=True)


def test_a_server_that_dies_and_comes_back_gets_every_point_once(
    tmp_path: Path, lines: list[str], undisturbed: Outcome
) -> None:
    run_dir, port = tmp_path / "run", free_port()
    run_dir.mkdir()
    outbox, uri = run_dir / FILE_NAME, f"http://127.0.0.1:{port}"
    outbox.write_text("".join(lines[: len(lines) // 2]))
    tracker = Tracker(run_dir, uri)
    with pytest.raises(Exception, match="refused"):
        tracker.sync()  # dead at first
    with MlflowServer(tmp_path, port):
        tracker.sync()
        half = Tracker(run_dir, uri).run_ids()[undisturbed.plan.name]
        seen = metric_rows(uri, half)
    assert 0 < sum(seen.values()) < sum(undisturbed.rows.values()), "the server did not die in the middle"
    with outbox.open("a") as file:
        file.writelines(lines[len(lines) // 2 :])
    with pytest.raises(Exception, match="refused"):
        tracker.sync()  # dead again
    with MlflowServer(tmp_path, port):
        assert tracker.sync()
        (run_dir / "tracking.json").unlink()  # the driver died before it noted that all is there
        assert Tracker(run_dir, uri).sync()
        assert Tracker(run_dir, uri).run_ids()[undisturbed.plan.name] == half, "another run was made"
        assert metric_rows(uri, half) == undisturbed.rows


def test_a_server_that_accepts_and_never_answers_does_not_hold_up_the_driver(
    tmp_path: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")  # whoever waits for this call waits for an hour
    event = undisturbed.of(Evaluated)[0]
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        silent.settimeout(600)
        shutil.copy(Path(undisturbed.plan.trial_dir).parent / FILE_NAME, tmp_path)
        tracker = Tracker(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker.start()
        first_call, _ = silent.accept()
        with first_call:
            outbox = Outbox(tmp_path / FILE_NAME)
            before = sum(1 for _ in outbox.read())
            for _ in range(50):
                outbox.append(event)
            assert sum(1 for _ in outbox.read()) == before + 50
            assert not tracker.finish(timeout=2)


DRIVER = """
import os, signal, sys
from pathlib import Path
from orchestrator.tracking.driver import Tracker

tracker = Tracker(Path(sys.argv[1]), f"sqlite:///{sys.argv[1]}/mlflow.db")
tracker.start()
print(tracker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_tracking_ends_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=600)
    assert driver.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(driver.stdout)).wait(timeout=600)


def test_tracking_goes_on_in_mid_run_after_its_process_was_killed(
    tmp_path: Path, lines: list[str], undisturbed: Outcome
) -> None:
    (tmp_path / FILE_NAME).write_text("".join(lines))
    tracker, event = Tracker(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}"), undisturbed.of(StepsDone)[0]
    tracker(event)
    first = tracker._process
    assert first is not None
    tracker(event)
    assert tracker._process is first, "it is started once"
    first.kill()
    first.wait()
    tracker(event)
    assert tracker._process is not first
    assert tracker.finish(timeout=600)
    assert (
        metric_rows(f"sqlite:///{tmp_path / 'mlflow.db'}", tracker.run_ids()[undisturbed.plan.name]) == undisturbed.rows
    )


def test_replaying_the_outbox_tracks_a_run_after_the_fact(
    tmp_path: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'later.db'}"
    folder = Path(undisturbed.plan.trial_dir).parent
    for _ in range(2):  # a second time changes nothing
        done = run_command("--replay-outbox", folder, cwd=tmp_path, MLFLOW_TRACKING_URI=uri)
        assert done.returncode == 0, done.stderr
        assert "has all of" in done.stdout
    run = Tracker(folder, uri).run_ids()[undisturbed.plan.name]
    assert metric_rows(uri, run) == undisturbed.rows


def test_nothing_is_replayed_from_a_folder_without_a_run(tmp_path: Path) -> None:
    done = run_command("--replay-outbox", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and "no run was started in this folder" in done.stderr


def test_a_silent_server_at_the_start_is_an_error_within_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config = write_experiment(tmp_path, experiment(tracking={"uri": uri}))
        done = run_command(config, cwd=tmp_path)
    assert done.returncode == 2 and "no MLflow server answers within 3 s" in done.stdout + done.stderr
    assert not (tmp_path / "runs" / "tiny").exists() or not list((tmp_path / "runs" / "tiny").glob("*/events.jsonl"))


class Refusing(BaseHTTPRequestHandler):
    """A server that passes the checks before a run, and then takes nothing."""

    def do_GET(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        self._answer(403, {"error_code": "PERMISSION_DENIED", "message": "you may\nnot write"})

    def _answer(self, status: int, content: dict[str, str]) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.soak
def test_a_run_that_trained_and_is_not_tracked_says_so_last_and_by_its_exit_code(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_address[1]}"
        config = write_experiment(tmp_path, experiment(tracking={"uri": uri}))
        done = run_command(config, "--output", tmp_path / "run", "--json", "--quiet", cwd=tmp_path)
        server.shutdown()
    assert done.returncode == NOT_TRACKED, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("NOT TRACKED.") and "does not have any of it" in last and "you may not write" in last
    assert last.endswith(f"python -m orchestrator.run --replay-outbox {tmp_path}/run")
    result = json.loads(done.stdout)
    assert (result["status"], result["tracked"], result["mlflow_run_id"]) == ("FINISHED", False, None)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["tracked"] is False


def test_only_a_finished_run_that_is_to_be_tracked_now_has_the_exit_code_of_an_untracked_one() -> None:
    assert exit_code("FINISHED", tracked=True) == 0 and exit_code("FINISHED", tracked=False) == NOT_TRACKED == 3
    assert exit_code("FAILED", tracked=False) == 1 and exit_code("KILLED", tracked=False) == 130


def run_while(folder: Path, disturbed: Callable[[Path], AbstractContextManager[None]]) -> tuple[int, str]:
    """Runs the command, whose store is disturbed from mid-run to its last event; returns its exit code and output."""
    faults, run = folder / "faults.json", folder / "run"
    faults.write_text(json.dumps([dataclasses.asdict(Fault("hold", rank=0, iteration=5))]))
    command = [sys.executable, "-m", "orchestrator.run", write_experiment(folder, experiment()), "--output", run]
    process = subprocess.Popen(
        list(map(str, command)), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, VARIABLE: str(faults), "COLUMNS": "200"},
    )  # fmt: skip

    def wait_until(met: Callable[[], bool]) -> None:
        wait_for(lambda: met() or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]

    try:
        wait_until(lambda: bool(fired(faults)) and len(Tracker(run, store(folder)).run_ids()) == 2)
        with disturbed(folder):
            faults.unlink()
            wait_until(lambda: any(isinstance(event, RunEnded) for event, _ in Outbox(run / FILE_NAME).read()))
        output = process.communicate(timeout=600)[0]
    finally:
        process.kill()
    return process.returncode, output


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    with closing(sqlite3.connect(folder / "mlflow.db", timeout=60, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def deleted(folder: Path) -> Iterator[None]:
    MlflowClient(store(folder)).delete_experiment("1")
    yield


@pytest.mark.soak
def test_a_database_that_is_locked_in_mid_run_has_every_point_once_in_the_end(
    tmp_path: Path, undisturbed: Outcome
) -> None:
    code, output = run_while(tmp_path, locked)
    assert code == 0 and "Traceback" not in output, output
    run = Tracker(tmp_path / "run", store(tmp_path)).run_ids()[undisturbed.plan.name]
    assert metric_rows(store(tmp_path), run) == undisturbed.rows
    assert {each.info.status for each in MlflowClient(store(tmp_path)).search_runs(["1"])} == {"FINISHED"}


@pytest.mark.soak
def test_an_experiment_that_is_deleted_in_mid_run_comes_back_by_the_commands_of_the_last_line(
    tmp_path: Path, undisturbed: Outcome
) -> None:
    code, output = run_while(tmp_path, deleted)
    assert code == NOT_TRACKED and "Traceback" not in output, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("NOT TRACKED.") and "the experiment 1 was deleted there" in last
    restore, track = re.findall(r"`(.+?)`", last)[0], last.partition("Track it with: ")[2]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in (restore, track):
        shell = ["/bin/sh", "-c", command]
        done = subprocess.run(shell, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    run = Tracker(tmp_path / "run", store(tmp_path)).run_ids()[undisturbed.plan.name]
    assert metric_rows(store(tmp_path), run) == undisturbed.rows
