"""A run's folder that is filled, cut or taken away in mid-run: one sentence, an exit code, and a way to go on."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from orchestrator import drive, publish
from orchestrator.drive import Request
from orchestrator.figures.records import ExperimentResult
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from orchestrator.tracking.driver import Tracker
from tests.builders.commands import run_command
from tests.builders.experiments import write_experiment
from tests.builders.fault_bench import experiment
from tests.builders.run_folder import made_experiment, make_run
from tests.builders.waiting import wait_for
from trainers.faults import VARIABLE, Fault, fired

pytestmark = pytest.mark.train


def run_until(folder: Path, run: Path, fault: Callable[[], None]) -> tuple[int, str]:
    """Runs the command, does something to it while a worker is held after a checkpoint; returns code and output."""
    values = experiment(trials={"world_sizes": [1], "scaling": "strong"})
    faults = folder / "faults.json"
    faults.write_text(json.dumps([dataclasses.asdict(Fault("hold", rank=0, iteration=5))]))
    command = [sys.executable, "-m", "orchestrator.run", write_experiment(folder, values), "--output", run]
    process = subprocess.Popen(
        list(map(str, command)), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, VARIABLE: str(faults), "COLUMNS": "200"},
    )  # fmt: skip
    try:
        # The driver has the checkpoint, and MLflow the trial.
        wait_for(lambda: process.poll() is not None or (fired(faults) and saved(run) and tracked(run)))
        assert process.poll() is None, process.communicate()[0]
        driver = psutil.Process(process.pid).children()[0]
        driver.suspend()  # it writes nothing in the middle of what is done
        try:
            fault()
        finally:
            driver.resume()
        faults.unlink()
        output = process.communicate(timeout=600)[0]
    finally:
        process.kill()
    return process.returncode, output


def saved(run: Path) -> bool:
    return any(event.kind == "checkpoint_saved" for event, _ in Outbox(run / FILE_NAME).read())


def tracked(run: Path) -> bool:
    return (run / "tracking.json").exists() and len(json.loads((run / "tracking.json").read_text())["runs"]) == 2


def statuses(folder: Path) -> Counter[str]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (found,) = [each for each in client.search_experiments() if each.name == "tiny"]
    return Counter(run.info.status for run in client.search_runs([found.experiment_id]))


def rows(folder: Path) -> Counter[tuple[str, str, int]]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (found,) = [each for each in client.search_experiments() if each.name == "tiny"]
    return Counter(
        (run.info.run_id, name, point.step)
        for run in client.search_runs([found.experiment_id])
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here (root is needed)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.soak
def test_a_full_disk_ends_the_run_with_a_sentence_and_what_a_cut_log_lacks_is_named(
    tmp_path: Path, small_disk: Path
) -> None:
    run, filler = small_disk / "run", small_disk / "filler"

    code, output = run_until(tmp_path, run, lambda: fill(filler))
    assert code == 1 and "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert f"{run} cannot be written: No space left on device" in line
    assert f"python -m orchestrator.run --resume {run}" in line and "shows it as failed" in line
    assert statuses(tmp_path) == {"FAILED": 2}

    filler.unlink()
    log = (run / FILE_NAME).read_bytes()
    start = log.index(b'{"kind":"steps_done"')
    assert b"checkpoint_saved" in log[start:], "the checkpoint is newer than what is left of the log"
    (run / FILE_NAME).write_bytes(log[: start + 40])
    refused = run_command("--resume", run, "--set", "trials.seeds=[1]", cwd=tmp_path)
    assert refused.returncode == 2 and "trials.seeds" in refused.stderr and "storage" in refused.stderr
    again = run_command("--resume", run, "--set", "storage.keep_checkpoints=1", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    result = ExperimentResult.model_validate_json((run / "results.json").read_bytes())
    (trial,) = result.trials
    assert result.status == trial.status == "FINISHED" and result.tracked
    (note,) = [note for note in trial.notes if "events.jsonl" in note]
    assert note.startswith("the events of iterations 1 to 3 are not in events.jsonl")
    assert note in again.stdout and note in (run / "report.md").read_text()
    assert "storage.keep_checkpoints=1" in trial.restarts[0].message
    assert statuses(tmp_path) == {"FINISHED": 2}
    assert set(rows(tmp_path).values()) == {1}
    assert len(list(run.glob("*/checkpoints/iter_*"))) <= 2, "the newest and the best"


@pytest.mark.parametrize(
    ("disk", "what"),
    [("full", "cannot be written: No space left on device"), ("read-only", r": it cannot be locked: .*Read-only file")],
)
def test_a_run_whose_process_is_lost_while_its_disk_cannot_be_written_is_marked_as_failed(
    tmp_path: Path, small_disk: Path, disk: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "TRACKING_TIMEOUT_SECONDS", 600.0)  # a busy machine takes its time
    run, printed, stdout = small_disk / "run", io.StringIO(), io.StringIO()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = made_experiment("tiny", trials={"world_sizes": [1]}, tracking={"uri": uri})
    lines = (make_run(run, made) / FILE_NAME).read_text().splitlines(keepends=True)
    (run / FILE_NAME).write_text("".join(lines[:-2]))  # without the ends of the trial and of the run
    Tracker(run, uri).sync()
    assert statuses(tmp_path) == {"RUNNING": 2, "FINISHED": 1}, "the published figure is over"
    if disk == "full":
        fill(small_disk / "filler")
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    request = Request(made, run, None, Console(file=printed, width=200), True, stdout, False, False)
    assert drive.close(request, "FAILED", "the Ray cluster was lost") == 1
    (line,) = printed.getvalue().split("\n")[:-1]
    assert re.match(f"FAILED: the Ray cluster was lost; {run} ?{what}", line)
    assert "shows it as failed" in line and line.endswith(f"python -m orchestrator.run --resume {run}")
    assert statuses(tmp_path) == {"FAILED": 2, "FINISHED": 1}
    assert json.loads(stdout.getvalue())["status"] == "FAILED"


def fill(file: Path) -> None:
    """Fills the disk that a new file is on."""
    with file.open("wb", buffering=0) as filler:
        for size in (1 << 20, 4096, 1):
            while filler.write(bytes(size)) == size if free(file.parent) >= size else False:
                pass
    assert free(file.parent) == 0, "the fault did not fire"


def free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_a_folder_that_is_taken_away_is_not_written_again_and_what_is_lost_is_named(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def replace() -> None:
        run.rename(elsewhere)
        run.mkdir()
        (run / FILE_NAME).write_text("of somebody else\n")

    code, output = run_until(tmp_path, run, replace)
    assert code == 1 and "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert f"{run / FILE_NAME} was replaced" in line and "are lost" in line
    assert [path.name for path in run.iterdir()] == [FILE_NAME]
    assert (run / FILE_NAME).read_text() == "of somebody else\n"
    assert statuses(tmp_path) == {"FAILED": 2}
