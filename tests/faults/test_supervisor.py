"""Signals and lost processes in every phase of a command whose work is a stand-in: no Ray is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.execution.stop import STOP_SIGNALS
from orchestrator.figures.records import ExperimentResult
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.commands import ROOT
from tests.builders.experiments import tiny_experiment, write_experiment
from tests.builders.waiting import is_alive, wait_for
from trainers.contract.events import RunEnded, TrialEnded

COMMAND = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from orchestrator import drive, publish, run
from orchestrator.execution import stop, supervisor
publish.TRACKING_TIMEOUT_SECONDS = 500.0  # a busy machine takes its time

def leave_orphan():
    "As Ray's agents are: in a session of its own, with a parent that has ended."
    subprocess.run(["sh", "-c", "setsid sleep 987 > /dev/null 2>&1 & echo $! >> orphans"])

def begin(request, working, iteration):
    from orchestrator.publish import Publication
    from orchestrator.runlog.outbox import FILE_NAME, Outbox
    from orchestrator.tracking.driver import Tracker, tracking_uri
    from tests.builders.trials import TrialBuilder
    request.run_dir.mkdir(exist_ok=True)
    outbox = Outbox(request.run_dir / FILE_NAME)
    tracker = Tracker(request.run_dir, "unused")
    publication = Publication(request.experiment, request.run_dir, tracker, request.earlier, outbox)
    (plan,) = drive.plan_trials(request, drive.Hardware(num_cpus=1))
    trial = TrialBuilder(plan, epoch=time.time())
    outbox.append(publication.run_started({{}}))
    trial.attempt = request.earlier.num_starts if request.earlier else 0
    if not request.earlier:
        trial.started()
    trial.workers(1.0)
    trial.loop(2.0)
    trial.steps(3.0, 0, 0.5, 0.5)
    if iteration:
        trial.checkpoint(4.0, iteration, 0.1)
    outbox.append(*trial.events)
    signal.signal(signal.SIGTERM, lambda *_: open("asked", "w").close())
    signal.signal(stop.AT_ONCE, lambda *_: open("at_once", "w").close())
    working()
    return trial

def hold():
    open("ready", "w").close()
    while True:
        time.sleep(0.05)

def starting(request, working):
    leave_orphan()
    hold()

def training(request, working):
    begin(request, working, 2)
    leave_orphan()
    hold()

def blocked(request, working):
    supervisor.LOST_CLUSTER_SECONDS = 0.1
    leave_orphan()
    begin(request, lambda: working(lambda: "gcs_server"), 2)
    hold()

def lost(request, working):
    begin(request, working, 0)
    leave_orphan()
    os.abort()

def lost_once(request, working):
    print("model and weights were tried:", request.rehearsed)
    if request.earlier:
        return drive.DONE
    lost(request, working)

def lost_with_its_folder(request, working):
    begin(request, working, 2)
    os.rename(request.run_dir, "elsewhere")
    lost_at_once()

def lost_with_its_events(request, working):
    begin(request, working, 2)
    (request.run_dir / "events.jsonl").unlink()
    (request.run_dir / "events.jsonl").mkdir()
    lost_at_once()

def lost_at_once():
    leave_orphan()
    os.abort()

drive.run = globals()[sys.argv.pop(1)]
run.app()
"""


class Started:
    """A command whose work is one of the stand-ins above."""

    def __init__(self, folder: Path, work: str, *options: str, hangup: signal.Handlers = signal.SIG_DFL) -> None:
        self.folder = folder
        config = write_experiment(folder, tiny_experiment())
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, work, str(config), "--output", str(folder / "run"), *options],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "COLUMNS": "400"},
            preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),
        )

    def has(self, name: str) -> Callable[[], bool]:
        return lambda: (self.folder / name).exists() or self.process.poll() is not None

    @property
    def child(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def end(self) -> tuple[int, str]:
        """Exit code and output, once it has ended; nothing that it started is left."""
        output, _ = self.process.communicate(timeout=600)
        orphans = [int(line) for line in (self.folder / "orphans").read_text().split()]
        wait_for(lambda: orphans and not any(map(psutil.pid_exists, orphans)), lambda: f"left: {orphans}", seconds=60)
        return self.process.returncode, output

    def mlflow_statuses(self) -> set[str]:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        (experiment,) = (each for each in client.search_experiments() if each.name == "tiny")
        runs = client.search_runs([experiment.experiment_id])
        assert len(runs) == 2
        return {run.info.status for run in runs}

    @property
    def result(self) -> ExperimentResult:
        return ExperimentResult.model_validate_json((self.folder / "run" / "results.json").read_bytes())


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("to", ["command", "child"])
def test_a_signal_while_ray_starts_ends_at_once_with_one_line(to: str, number: signal.Signals, tmp_path: Path) -> None:
    command = Started(tmp_path, "starting")
    wait_for(command.has("ready"))
    os.kill(command.process.pid if to == "command" else command.child.pid, number)
    assert command.end() == (130, "stopped before training began\n")
    assert not (tmp_path / "run").exists()


def test_nohup_keeps_its_meaning_for_both_processes(tmp_path: Path) -> None:
    command = Started(tmp_path, "training", hangup=signal.SIG_IGN)
    wait_for(command.has("ready"))
    for pid in (command.process.pid, command.child.pid):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["SigIgn"], 16) >> (signal.SIGHUP - 1) & 1
    command.child.kill()
    command.end()


def test_a_stop_that_is_not_obeyed_is_enforced_by_the_third_signal_and_recorded(tmp_path: Path) -> None:
    command = Started(tmp_path, "training")
    wait_for(command.has("ready"))
    for number, answer in ((signal.SIGHUP, "asked"), (signal.SIGTERM, "at_once")):
        command.process.send_signal(number)
        wait_for(command.has(answer))
        command.process.send_signal(signal.SIGHUP)  # a terminal may send it again
    command.process.send_signal(signal.SIGINT)
    code, output = command.end()
    assert code == 130 and "Traceback" not in output
    assert output.rstrip().endswith(f"go on with: python -m orchestrator.run --resume {tmp_path / 'run'}")
    assert command.result.status == "KILLED" and command.mlflow_statuses() == {"KILLED"}


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2])
def test_the_quit_key_and_a_batch_systems_notice_ask_for_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    command = Started(tmp_path, "training")
    wait_for(command.has("ready"))
    command.process.send_signal(number)
    wait_for(command.has("asked"))
    assert command.process.poll() is None and not (tmp_path / "at_once").exists()
    command.child.kill()
    code, output = command.end()
    assert code == 130 and "--resume" in output and command.result.status == "KILLED"


STOPPED_BETWEEN = """
import os, psutil, signal
from orchestrator.execution.supervisor import Supervisor

supervisor = Supervisor()
first = supervisor.run(lambda: 7)
look = psutil.Process.children

def look_while_a_stop_comes(*values, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    psutil.Process.children = look
    return look(*values, **options)

psutil.Process.children = look_while_a_stop_comes
second = supervisor.run(lambda: open("started", "w").close() or 0)
print(first.code, second.code, second.worked, supervisor.stopped)
"""


def test_a_stop_that_comes_just_before_another_start_is_not_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED_BETWEEN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "7 None False True\n", done.stderr
    assert not (tmp_path / "started").exists()


KILLED_FOR_MEMORY = """
import os, signal
from orchestrator.execution import supervisor

counts = iter([3, 4])
supervisor.oom_kills = lambda: next(counts)
print(supervisor.Supervisor().run(lambda: os.kill(os.getpid(), signal.SIGKILL)).reason)
"""


def test_a_lost_process_names_the_kernels_kill_for_lack_of_memory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED_FOR_MEMORY], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "was lost (signal SIGKILL; since it started, the kernel has killed a process on its node" in done.stdout


@pytest.mark.parametrize("work", ["lost_with_its_folder", "lost_with_its_events"])
def test_a_run_that_is_lost_with_its_folder_ends_with_one_line(work: str, tmp_path: Path) -> None:
    lost = "the process that drives the run was lost (signal SIGABRT)"
    assert Started(tmp_path, work).end() == (1, f"{lost}; {tmp_path / 'run'} is gone or cannot be read\n")


RUN_IN_CHILD = """
import subprocess
from orchestrator.execution.supervisor import Supervisor

print(Supervisor().run(lambda: subprocess.run(["false"]).returncode + 6))
"""


def test_a_launcher_that_ignores_the_ends_of_children_changes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_IN_CHILD], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "Ending(code=7, reason='', worked=True)\n", done.stderr


def test_a_run_whose_process_is_lost_is_closed_by_its_parent(tmp_path: Path) -> None:
    command = Started(tmp_path, "training")
    wait_for(command.has("ready"))
    command.child.kill()
    code, output = command.end()
    assert code == 1 and "Traceback" not in output
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("The process that drives the run was lost (signal SIGKILL). ")
    assert last.endswith(f"go on with: python -m orchestrator.run --resume {tmp_path / 'run'}")
    events = [event for event, _ in Outbox(tmp_path / "run" / FILE_NAME).read()]
    assert [e.status for e in events if isinstance(e, TrialEnded | RunEnded)] == ["FAILED", "FAILED"]
    (trial,) = command.result.trials
    assert command.result.status == trial.status == "FAILED" and trial.reason.startswith("the process that drives")
    assert command.result.tracked and command.mlflow_statuses() == {"FAILED"}


def test_a_run_that_waits_for_a_cluster_that_is_gone_is_ended(tmp_path: Path) -> None:
    code, output = Started(tmp_path, "blocked").end()
    assert code == 1 and "The Ray cluster was lost: its gcs_server has ended. " in output


def test_a_command_that_is_killed_takes_what_it_started_with_it(tmp_path: Path) -> None:
    command = Started(tmp_path, "training")
    wait_for(command.has("ready"))
    child = command.child
    helper = psutil.Process(int((tmp_path / "orphans").read_text()))
    command.process.kill()
    wait_for(lambda: not is_alive(child), seconds=60)
    helper.kill()  # an orphan whose parent ended before the command did is nobody's


def test_a_lost_run_is_gone_on_with_as_often_as_allowed(tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    code, output = Started(tmp_path / "once", "lost_once", "--auto-resume", "1").end()
    assert code == 0 and "going on by itself (start 1 of 1" in output
    assert [line.split()[-1] for line in output.splitlines() if "were tried" in line] == ["False", "True"]

    (tmp_path / "always").mkdir()
    command = Started(tmp_path / "always", "lost", "--auto-resume", "2")
    code, output = command.end()
    assert code == 1 and output.count("going on by itself") == 2
    assert "exit code" not in output and "(signal SIGABRT)" in output
    assert command.result.status == "FAILED"
