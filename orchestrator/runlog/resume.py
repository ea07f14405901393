"""Going on with a run that was interrupted, and keeping two drivers off one run.

All that is needed is in the run's folder: the experiment and the plans in its outbox, the checkpoints where the plans
say. The trap it protects against: a "new" start in an old folder that mixes two runs, and a second driver beside one
that is still alive.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from trainers.contract.events import RunEnded, RunStarted, TrialEnded, TrialStarted
from trainers.contract.plan import TrialPlan

LOCK = "driver.lock"
WORKING_DIRECTORY = "run.working_directory"
"""Tag that names where the command was given: an experiment file may hold relative paths."""


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """What a run's folder tells of it.

    Attributes:
        run_dir: The folder.
        experiment: What is run.
        started: How it was first started.
        num_starts: How often it was started.
        plans: Plans of the trials that were begun, by name.
        finished: Names of the trials with nothing left to do.
        ended: Whether its last driver came to the end, and did not die.
    """

    run_dir: Path
    experiment: Experiment
    started: RunStarted
    num_starts: int
    plans: dict[str, TrialPlan]
    finished: frozenset[str]
    ended: bool


def read_run(folder: Path) -> EarlierRun:
    """Reads a run's folder.

    Raises:
        SpecError: There is no run in it, or it lies elsewhere than when it was started.
    """
    folder = folder.expanduser().absolute()
    try:
        events = [event for event, _ in Outbox(folder / FILE_NAME).read()]
    except (OSError, ValueError) as error:
        raise SpecError(f"{folder / FILE_NAME}: {error}") from error
    starts = [event for event in events if isinstance(event, RunStarted)]
    if not starts:
        raise SpecError(f"{folder}: no run was started in this folder (its {FILE_NAME} is missing or empty)")
    plans = {e.trial: TrialPlan.from_dict(e.plan) for e in events if isinstance(e, TrialStarted)}
    for plan in plans.values():
        if Path(plan.trial_dir) != folder / plan.name:
            raise SpecError(f"{folder}: the run was made in {Path(plan.trial_dir).parent}; move it back there")
    last_ends = {event.trial: event for event in events if isinstance(event, TrialEnded)}
    closing = [event for event in events if isinstance(event, RunStarted | RunEnded)]
    return EarlierRun(
        run_dir=folder,
        experiment=parse_experiment(starts[0].experiment, where=str(folder / FILE_NAME)),
        started=starts[0],
        num_starts=len(starts),
        plans=plans,
        finished=frozenset(name for name, event in last_ends.items() if event.status == "FINISHED"),
        ended=isinstance(closing[-1], RunEnded),
    )


def enter_working_directory(run: EarlierRun) -> None:
    """Goes where the run's command was given, if that is on this machine."""
    with suppress(OSError, KeyError):
        os.chdir(run.started.tags[WORKING_DIRECTORY])


@contextmanager
def only_driver(run_dir: Path) -> Iterator[None]:
    """Keeps other drivers off a run's folder; the lock ends with the process, however that ends.

    Raises:
        SpecError: Another driver is at work there.
    """
    with (run_dir / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            text = "another process"
            with suppress(ValueError, KeyError):
                owner = json.loads(file.read())
                text = f"process {owner['pid']} on {owner['host']}"
            raise SpecError(f"{run_dir}: {text} is still running it; stop that one first") from error
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield
