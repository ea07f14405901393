"""The real command under signals and without its cluster: what it leaves, and that it goes on as if undisturbed."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
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
from tests.builders.waiting import is_alive, wait_for
from trainers.contract.events import CheckpointSaved, Event, LoopFinished, TrialEnded, TrialRestarted
from trainers.faults import VARIABLE, Fault, fired

pytestmark = pytest.mark.train


class Command:
    """The command, started as a user starts it in a terminal of its own, and what it left."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder
        self.output = ""
        """What its terminal has shown."""
        outside, inside = os.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(inside, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it

        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.run", *map(str, arguments)],
            cwd=folder,
            env={**os.environ, VARIABLE: str(folder / "faults.json"), "TERM": "dumb", "COLUMNS": "300"},
            stdin=inside,
            stdout=inside,
            stderr=inside,
            preexec_fn=take_terminal,
        )
        os.close(inside)
        self._closed = threading.Event()
        self._terminal = threading.Thread(target=self._show, args=[outside], daemon=True)
        self._terminal.start()

    def _show(self, terminal: int) -> None:
        with suppress(OSError):  # nobody has it open any more
            while not self._closed.is_set():
                if select.select([terminal], [], [], 0.1)[0]:
                    self.output += os.read(terminal, 1 << 16).decode(errors="replace")
        os.close(terminal)

    def close_terminal(self) -> None:
        """Closes its terminal, as the end of a connection does."""
        self._closed.set()
        self._terminal.join()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Waits until something is true of it while it runs."""
        wait_for(lambda: condition() or self.process.poll() is not None)
        assert self.process.poll() is None, self.output

    def family(self, *names: str) -> list[psutil.Process]:
        """The processes that it has started: all, or those whose command lines name something."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in family if not names or any(name in _command_line(each) for name in names)]

    def end(self, family: list[psutil.Process]) -> int:
        """Its exit code, once it has ended; of its processes, none is left."""
        code = self.process.wait(600)
        wait_for(lambda: not any(map(is_alive, family)), lambda: f"left: {[*filter(is_alive, family)]}", seconds=5)
        self._terminal.join()
        return code

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def events(self) -> list[Event]:
        return [event for event, _ in Outbox(self.run_dir / FILE_NAME).read()]

    @property
    def saved(self) -> list[int]:
        """Iterations of its checkpoints."""
        return [event.iteration for event in self.events if isinstance(event, CheckpointSaved)]

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
def paused_run(folder: Path, values: dict[str, Any], *holds: Fault, options: Sequence[str] = ()) -> Iterator[Command]:
    """The command, held at the first place until it is let go on; nothing of it is alive in the end."""
    config = write_experiment(folder, values)
    (folder / "faults.json").write_text(json.dumps([dataclasses.asdict(hold) for hold in holds]))
    command = Command(folder, config, "--output", folder / "run", *options)
    family: list[psutil.Process] = []
    try:
        command.wait_for(lambda: fired(folder / "faults.json"))
        family = command.family()
        assert command.family("RayTrainWorker")
        yield command
    finally:
        for member in [*family, *([psutil.Process(command.process.pid)] if command.process.poll() is None else [])]:
            with suppress(psutil.NoSuchProcess):
                member.kill()


def let_go(command: Command) -> int:
    """Lets a held worker go on once it knows of a stop; returns the command's exit code."""
    family = command.family()
    command.wait_for(lambda: "The driver's command: stop" in command.log)
    (command.folder / "faults.json").unlink()
    return command.end(family)


def _command_line(process: psutil.Process) -> str:
    """Its program and arguments; nothing of one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def resume(command: Command, *arguments: object) -> subprocess.CompletedProcess[str]:
    what = arguments or ("--resume", command.run_dir)
    return run_command(*what, "--quiet", cwd=command.folder, **{VARIABLE: ""})


def assert_resumed_as_undisturbed(command: Command, undisturbed: Outcome, *arguments: object) -> None:
    again = resume(command, *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    (trial,) = command.result.trials
    assert trial.status == "FINISHED" and trial.state_sha256 == undisturbed.state
    assert {e.iteration: e.figures for e in trial.evaluations} == undisturbed.scores
    assert trial.mlflow_run_id and metric_rows(command.uri, trial.mlflow_run_id) == undisturbed.rows
    assert command.mlflow_status() == "FINISHED"


@pytest.mark.soak
def test_a_closed_terminal_keeps_a_last_checkpoint_and_what_is_resumed_is_as_if_nothing_had_been(
    tmp_path: Path, undisturbed: Outcome
) -> None:
    # A checkpoint is due every 6 iterations, a window ends every 3: the last one is taken because of the stop.
    values = experiment(storage={"checkpoint_period_iterations": 6})
    with paused_run(tmp_path, values, Fault("hold", rank=0, iteration=8)) as command:
        command.close_terminal()
        assert let_go(command) == 130
    assert command.saved == [6, 9]
    assert [e.reason for e in command.events if isinstance(e, LoopFinished)] == ["interrupted"]
    assert command.result.status == "KILLED" and command.mlflow_status() == "KILLED"

    again = Command(tmp_path, "--resume", command.run_dir)
    again.wait_for(lambda: again.family("RayTrainWorker"))  # they have started, or begin to import
    family = again.family()
    os.killpg(again.process.pid, signal.SIGINT)  # as Ctrl-C does
    assert again.end(family) == 130 and "Stopped." in again.output
    assert "Traceback" not in again.output and "ERROR" not in again.output and "WARNING" not in again.output
    assert command.result.status == "KILLED" and command.mlflow_status() == "KILLED"

    assert_resumed_as_undisturbed(command, undisturbed)
    assert {(r.cause, r.lost_iterations) for r in command.result.trials[0].restarts} == {("resumed", 0)}


@pytest.mark.soak
def test_a_stop_where_an_evaluation_is_due_does_not_lose_the_evaluation(tmp_path: Path, undisturbed: Outcome) -> None:
    with paused_run(tmp_path, experiment(), Fault("hold", rank=0, iteration=5)) as command:
        command.process.send_signal(signal.SIGTERM)
        assert let_go(command) == 130
    assert max(command.saved) == 6
    assert_resumed_as_undisturbed(command, undisturbed)
    assert resume(command).returncode == 0 and command.result.trials[0].num_restarts == 1, "what is finished is kept"


@pytest.mark.soak
def test_a_lost_driver_is_replaced_by_resume_and_two_never_drive_one_run(tmp_path: Path, undisturbed: Outcome) -> None:
    with paused_run(tmp_path, experiment(), Fault("hold", rank=0, iteration=8)) as command:
        second = run_command("--resume", command.run_dir, cwd=tmp_path)
        assert second.returncode == 2 and f"process {command.process.pid} on" in second.stderr
        new = run_command(tmp_path / "tiny.yaml", "--output", command.run_dir, cwd=tmp_path)
        assert new.returncode == 2 and "holds another run" in new.stderr
        family = command.family()
        command.process.kill()
        assert command.end(family) == -signal.SIGKILL
    assert not (command.run_dir / "results.json").exists()
    shutil.rmtree(command.run_dir / "ray")  # Ray Train's own bookkeeping may be torn or gone: nothing is read from it
    same_job = (tmp_path / "tiny.yaml", "--output", command.run_dir, "--resume", "auto")
    assert_resumed_as_undisturbed(command, undisturbed, *same_job)
    assert resume(command, *same_job).returncode == 0, "what is done is done"
    (event,) = (event for event in command.events if isinstance(event, TrialRestarted))
    assert (event.failure, event.message) == ("resumed", "resumed after its driver was lost")


@pytest.mark.soak
def test_a_lost_cluster_is_started_again_and_a_stop_while_the_report_is_written_loses_nothing(
    tmp_path: Path, undisturbed: Outcome
) -> None:
    holds = [Fault("hold", rank=0, iteration=7, attempt=0), Fault("hold", rank=0, iteration=10, attempt=1)]
    # May be lost once without a new checkpoint: between the two losses, that of 9 is saved.
    with paused_run(tmp_path, experiment(), *holds, options=["--auto-resume", "1"]) as command:
        for name, saved in (("gcs_server", 0), ("raylet", 9)):
            command.wait_for(lambda saved=saved: saved in {0, *command.saved})
            (daemon,) = command.family(f"/{name.split('_')[0]}/{name} ")
            daemon.kill()
            command.wait_for(lambda name=name: f"its {name} has ended; going on by itself" in command.output)
        (tmp_path / "faults.json").unlink()
        command.wait_for(lambda: any(isinstance(event, TrialEnded) for event in command.events))
        family = command.family()
        command.process.terminate()
        code = command.end(family)
    # Whether the signal came before the run's status was written, or before its end, depends on the machine.
    assert code == 130 or (code, command.result.status) == (0, "FINISHED"), command.output
    assert command.output.count("(start 1 of 1 without a new checkpoint)") == 2
    (trial,) = command.result.trials
    assert command.result.status in ("KILLED", "FINISHED")
    assert (trial.status, trial.state_sha256) == ("FINISHED", undisturbed.state)
    assert {e.iteration: e.figures for e in trial.evaluations} == undisturbed.scores
    assert trial.mlflow_run_id and metric_rows(command.uri, trial.mlflow_run_id) == undisturbed.rows
    assert [restart.cause for restart in trial.restarts] == ["resumed", "resumed"]
