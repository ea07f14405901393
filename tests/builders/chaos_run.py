"""The whole command under faults: started and started again as a user would, seen and reached from outside only."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.commands import ROOT
from tests.builders.experiments import tiny_experiment, write_experiment
from tests.builders.mlflow_server import MlflowServer
from tests.builders.waiting import wait_for
from trainers.contract.events import (
    Event,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialRestarted,
    TrialStarted,
    WorkerFailed,
    WorkerStarted,
)
from trainers.faults import VARIABLE, Fault, fired

E = TypeVar("E", bound=Event)

PERIOD = 10
"""Iterations of a window of steps."""

CHECKPOINT_PERIOD = 20
"""Iterations between checkpoints: some three seconds, as `checkpoint_period: auto` advises at a fault a minute."""

MARK = "CHAOS_RUN"
"""Variable of the environment by which all processes of a run are found."""

END_SECONDS = 10.0
"""Longest time that a process of a command may outlive it, on a machine that other work uses too."""

OTHER_CLOCK = """
# Every Python process of a run imports this file at its start. The target of the link `clock` is what is added.
import os, pathlib, time
_real, _link = time.time, str(pathlib.Path(__file__).parent / "clock")
def _time():
    try:
        return _real() + float(os.readlink(_link))
    except OSError:
        return _real()
time.time = _time
"""


def soak_experiment(name: str, uri: str, iterations: int, workers: int, patience: float = 1.0) -> dict[str, Any]:
    """Checkpoints every three seconds, and what a run needs to survive everything that may be retried."""
    timeouts = {"step": 8, "heartbeat": 8, "evaluation": 30, "checkpoint": 20, "report": 20, "setup": 120}
    values = tiny_experiment(
        name=name,
        data={"generated": {"num_train": 32, "num_val": 8, "size": 160}},
        trials={"world_sizes": [workers], "scaling": "strong"},
        protocol={"iterations": iterations, "eval_period_iterations": iterations // 2, "warmup_iterations": PERIOD},
        storage={"checkpoint_period_iterations": CHECKPOINT_PERIOD},
        log_period_iterations=PERIOD,
        tracking={"uri": uri},
        faults={
            "max_failures": 20,
            "restart_on": ["worker_lost", "communication", "stuck", "out_of_memory", "unknown", "storage"],
            "on_storage_failure": "continue",
            "standby": True,
            "timeouts": {name: seconds * patience for name, seconds in timeouts.items()},
        },
    )
    values["model"] = {**values["model"], "overrides": {**values["model"]["overrides"], "INPUT.MIN_SIZE_TRAIN": [160]}}
    return values


class ChaosRun:
    """One run: what it is doing, and ways to disturb it.

    Args:
        folder: For the experiment file and everything that is not the run's.
        disk: Where the run's folder is made; may be small.
        server: Where it is tracked.
        values: The experiment.
        busy: Whether other work keeps the machine from answering a check in seconds, so that a start may be refused.
    """

    def __init__(
        self, folder: Path, disk: Path, server: MlflowServer, values: dict[str, Any], *, busy: bool = False
    ) -> None:
        self.folder, self.disk, self.server, self.values = folder, disk, server, values
        self.run_dir = disk / values["name"]
        self.iterations: int = values["protocol"]["iterations"]
        self.world_size: int = values["trials"]["world_sizes"][0]
        self.events: list[Event] = []
        """What its `events.jsonl` holds."""
        self.codes: list[int] = []
        """Exit codes of its starts."""
        self.always_fine = {0, 2} if busy else {0}
        self.fine = self.always_fine
        """Those that the running start may have."""
        self.undo: list[tuple[float, Callable[[], object]]] = []
        """What ends a disturbance that lasts, and when (monotonic seconds)."""
        self.disturbed = -1
        """The newest attempt that a fault is about to end, or has ended."""
        self.problems: list[str] = []
        """What did not hold."""
        self._offset = 0
        self._faults = folder / "faults.json"
        (folder / "tmp").mkdir(parents=True)
        self._faults.write_text("[]")
        (folder / "sitecustomize.py").write_text(OTHER_CLOCK)
        self._config = write_experiment(folder, values)

    def start(self) -> None:
        """Starts the command, or starts it again: the same one, as a job would."""
        self.fine = set(self.always_fine)
        options = ["--output", self.run_dir, "--resume", "auto", "--auto-resume", "20"]
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.run", self._config, *map(str, options)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    MARK: str(self.folder),
                    VARIABLE: str(self._faults),
                    "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]),
                    "TMPDIR": str(self.folder / "tmp"),
                    "COLUMNS": "300",
                },
                preexec_fn=_take_default_signals,
            )

    def look(self) -> bool:
        """Reads what is new; returns whether the command has ended. Its exit code and what it left are checked then."""
        for due, end in list(self.undo):
            if time.monotonic() >= due:
                self.undo.remove((due, end))
                end()
        code = self.process.poll()
        with suppress(OSError):  # not there yet
            for event, offset in Outbox(self.run_dir / FILE_NAME).read(self._offset):
                self.events.append(event)
                self._offset = offset
        if code is None:
            return False
        self.codes.append(code)
        if code not in self.fine:
            self.problems.append(f"exit code {code}, not of {sorted(self.fine)}")
        try:
            wait_for(lambda: not self.processes(), seconds=END_SECONDS)
        except AssertionError:
            left = [" ".join(each.info["cmdline"] or [])[:80] for each in self.processes()]
            self.problems.append(f"processes left: {left}")
        return True

    def end(self) -> None:
        """Ends all disturbances and processes, whatever they do."""
        for _, end in self.undo:
            end()
        self.undo = []
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def processes(self, *names: str) -> list[psutil.Process]:
        """Its living processes: all, or those whose command lines name something."""
        found = []
        for each in psutil.process_iter(["cmdline", "status"]):
            with suppress(psutil.Error):
                line = " ".join(each.info["cmdline"] or [])
                named = not names or any(name in line for name in names)
                if (
                    named
                    and each.info["status"] != psutil.STATUS_ZOMBIE
                    and each.environ().get(MARK) == str(self.folder)
                ):
                    found.append(each)
        return found

    def of(self, kind: type[E]) -> list[E]:
        """Events of a kind in the newest attempt."""
        return [event for event in self.events if isinstance(event, kind) and event.attempt == self.attempt]

    @property
    def attempt(self) -> int:
        return max((event.attempt for event in self.events), default=0)

    @property
    def child(self) -> list[psutil.Process]:
        """The process that drives the run."""
        with suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if child.cmdline() == psutil.Process(self.process.pid).cmdline()]
        return []

    @property
    def workers(self) -> dict[int, int]:
        """Process ids of the attempt's workers, by rank."""
        return {event.rank: event.pid for event in self.of(WorkerStarted) if event.pid and psutil.pid_exists(event.pid)}

    @property
    def working(self) -> bool:
        """Whether a trial has begun and not ended."""
        ends = [event for event in self.events if event.trial and isinstance(event, TrialStarted | TrialEnded)]
        again = [event for event in self.events if isinstance(event, TrialRestarted)]
        return bool(ends) and (isinstance(ends[-1], TrialStarted) or (bool(again) and again[-1].time > ends[-1].time))

    @property
    def phase(self) -> str:
        """What it is at: `ray` (checks, and the start of Ray), `setup`, `training`, `results`, or nothing of these."""
        ended = [event for event in self.events if isinstance(event, TrialEnded)]
        if not self.events:
            return "ray" if self.child else ""
        return "training" if self.training else "setup" if self.working else "results" if ended else ""

    @property
    def training(self) -> bool:
        """Whether the workers train, have come past the last failure, and nothing is about to end them."""
        failed = [event for event in self.events if isinstance(event, WorkerFailed)]
        past = max([0, *(event.iteration for event in failed)])
        done = [event.iteration for event in self.of(StepsDone)]
        return (
            self.working
            and self.attempt > self.disturbed
            and len({event.rank for event in self.of(LoopStarted)}) == self.world_size
            and not self.of(WorkerFailed)
            and len(self.workers) == self.world_size
            and past < max(done, default=-1) < self.iterations - 2 * PERIOD
        )

    def inject(self, fault: Fault) -> None:
        """Has a worker do something to itself at the next place that fits, and waits until it has begun to."""
        before = len(fired(self._faults))
        new = self._faults.with_suffix(".new")
        new.write_text(json.dumps([dataclasses.asdict(fault)]))
        new.rename(self._faults)
        wait_for(lambda: len(fired(self._faults)) > before or self.process.poll() is not None, seconds=120)

    def let_go(self) -> None:
        """Lets a worker that is held go on, once it knows of a stop."""
        (log,) = self.run_dir.glob("*/log.txt")
        wait_for(lambda: "The driver's command: stop" in log.read_text(), seconds=120)
        self._faults.unlink()

    def for_a_while(self, seconds: float, undo: Callable[[], object]) -> None:
        """Ends a disturbance after some seconds."""
        self.undo.append((time.monotonic() + seconds, undo))

    @property
    def files(self) -> set[str]:
        """Names in the run's folder and in that for temporary files, without numbers and hashes."""
        roots = (self.run_dir, self.folder / "tmp")
        names = {str(path.relative_to(root)) for root in roots for path in root.rglob("*") if path.is_file()}
        return {re.sub(r"[0-9a-f]{8,}|\d+", "#", name) for name in names if not name.startswith("ray/")}


def _take_default_signals() -> None:
    """Signals that whoever runs this may ignore, as a shell does for what it runs in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
