"""The real command under signals: what a stop leaves behind, and that `--resume` ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.figures.records import ExperimentResult
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.commands import run_command
from tests.builders.experiments import write_experiment
from tests.builders.fault_bench import Outcome, experiment, metric_rows
from tests.builders.waiting import wait_for
from trainers.contract.events import CheckpointSaved, Event, LoopFinished, TrialRestarted
from trainers.faults import VARIABLE, Fault, fired

pytestmark = pytest.mark.train


@dataclasses.dataclass
class Command:
    """A run that was started as a user starts one, and what it left."""

    folder: Path
    process: subprocess.Popen[str]

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def events(self) -> list[Event]:
        return [event for event, _ in Outbox(self.run_dir / FILE_NAME).read()]

    @property
    def result(self) -> ExperimentResult:
        return ExperimentResult.model_validate_json((self.run_dir / "results.json").read_text())

    @property
    def log(self) -> str:
        """The log of rank 0."""
        (path,) = self.run_dir.glob("*/log.txt")
        return path.read_text(encoding="utf-8")

    def mlflow_status(self) -> str:
        from mlflow.tracking import MlflowClient

        (trial,) = self.result.trials
        assert trial.mlflow_run_id
        return str(MlflowClient(self.uri).get_run(trial.mlflow_run_id).info.status)

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"


@contextmanager
def paused_run(folder: Path, values: dict[str, Any], iteration: int) -> Iterator[Command]:
    """The command, held at an iteration of rank 0 until the worker knows of a stop; nothing of it is alive in the end.

    Where the driver is killed, the workers end while they are held.
    """
    config = write_experiment(folder, values)
    faults = folder / "faults.json"
    faults.write_text(json.dumps([dataclasses.asdict(Fault("hold", rank=0, iteration=iteration))]))
    arguments = [sys.executable, "-m", "orchestrator.run", str(config), "--output", str(folder / "run")]
    env = {**os.environ, VARIABLE: str(faults)}
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    family: list[psutil.Process] = []
    try:
        wait_for(lambda: fired(faults) or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [member for member in family if "RayTrainWorker" in " ".join(member.cmdline())]
        assert workers
        command = Command(folder, process)
        yield command
        wait_for(lambda: "The driver's command: stop" in command.log or not any(map(_is_alive, workers)))
        faults.unlink()
        process.communicate(timeout=600)
        if process.returncode == -signal.SIGKILL:
            # Ray's agents of a driver that was killed look for their parent at leisure; what trains must be gone.
            family = [member for member in family if not (_is_alive(member) and "Agent" in member.name())]
        wait_for(lambda: not any(map(_is_alive, family)), lambda: f"left behind: {[*filter(_is_alive, family)]}")
    finally:
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()


def _is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended stays in the table where nobody asks for its exit code (in a container)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def resume(command: Command) -> subprocess.CompletedProcess[str]:
    return run_command("--resume", command.run_dir, "--quiet", cwd=command.folder, **{VARIABLE: ""})


def assert_resumed_as_undisturbed(command: Command, undisturbed: Outcome) -> None:
    again = resume(command)
    assert again.returncode == 0, again.stdout + again.stderr
    (trial,) = command.result.trials
    assert trial.status == "FINISHED" and trial.state_sha256 == undisturbed.state
    assert {e.iteration: e.figures for e in trial.evaluations} == undisturbed.scores
    assert trial.mlflow_run_id and metric_rows(command.uri, trial.mlflow_run_id) == undisturbed.rows
    assert command.mlflow_status() == "FINISHED"


def test_ctrl_c_keeps_a_last_checkpoint_and_the_resumed_run_is_as_if_it_had_not_been_stopped(
    tmp_path: Path, undisturbed: Outcome
) -> None:
    # A checkpoint is due every 6 iterations, a window ends every 3: the last one is taken because of the stop.
    values = experiment(storage={"checkpoint_period_iterations": 6})
    with paused_run(tmp_path, values, iteration=8) as command:
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    assert command.process.returncode == 130
    assert [e.iteration for e in command.events if isinstance(e, CheckpointSaved)] == [6, 9]
    assert [e.reason for e in command.events if isinstance(e, LoopFinished)] == ["interrupted"]
    assert command.result.status == "KILLED" and command.mlflow_status() == "KILLED"
    assert_resumed_as_undisturbed(command, undisturbed)
    (restart,) = command.result.trials[0].restarts
    assert (restart.cause, restart.lost_iterations) == ("resumed", 0)


@pytest.mark.soak
def test_a_stop_where_an_evaluation_is_due_does_not_lose_the_evaluation(tmp_path: Path, undisturbed: Outcome) -> None:
    with paused_run(tmp_path, experiment(), iteration=5) as command:
        command.process.send_signal(signal.SIGTERM)
    assert command.process.returncode == 130
    assert max(e.iteration for e in command.events if isinstance(e, CheckpointSaved)) == 6
    assert_resumed_as_undisturbed(command, undisturbed)
    assert resume(command).returncode == 0 and command.result.trials[0].num_restarts == 1, "what is finished is kept"


def test_a_lost_driver_is_replaced_by_resume_and_two_never_drive_one_run(tmp_path: Path, undisturbed: Outcome) -> None:
    with paused_run(tmp_path, experiment(), iteration=8) as command:
        second = run_command("--resume", command.run_dir, cwd=tmp_path)
        assert second.returncode == 2 and f"process {command.process.pid} on" in second.stderr
        new = run_command(tmp_path / "tiny.yaml", "--output", command.run_dir, cwd=tmp_path)
        assert new.returncode == 2 and "holds another run" in new.stderr
        command.process.kill()
    assert not (command.run_dir / "results.json").exists()
    shutil.rmtree(command.run_dir / "ray")  # Ray Train's own bookkeeping may be torn or gone: nothing is read from it
    assert_resumed_as_undisturbed(command, undisturbed)
    (event,) = (event for event in command.events if isinstance(event, TrialRestarted))
    assert (event.failure, event.message) == ("resumed", "resumed after its driver was lost")
