"""Publishes a run whose driving process was lost: its results as its events have them, and its end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from orchestrator.experiment.spec import Experiment
from orchestrator.publish import Publication, Status
from orchestrator.runlog.folder import read_earlier_run
from orchestrator.runlog.lock import LockError, only_driver
from orchestrator.runlog.outbox import FILE_NAME, Outbox, RunFolderError
from orchestrator.tracking.driver import Tracker, tracking_uri
from trainers.contract import clock
from trainers.contract.events import Event, RunEnded, RunStarted, TrialEnded


def close_run(
    experiment: Experiment, run_dir: Path, status: Status, reason: str, console: Console
) -> tuple[Publication, bool | None]:
    """Publishes what a run measured whose process was lost, and marks it as ended.

    A run that had come to its end, or of which only the report was missing, has not failed for it: it has finished, or
    failed by itself.

    Args:
        experiment: What was run.
        run_dir: Its folder, with the events of at least its start.
        status: How it ended, where it had not come to its end itself.
        reason: Why.
        console: Output for people.

    Returns:
        The publication, and whether MLflow has all of the run; None where its folder cannot be written.

    Raises:
        SpecError: No run was started in the folder, or somebody else drives it by now.
    """
    run = read_earlier_run(run_dir)
    outbox, tracker = Outbox(run_dir / FILE_NAME), Tracker(run_dir, tracking_uri(experiment.tracking.uri))
    publication = Publication(experiment, run_dir, tracker, run, outbox, run.environment)
    try:
        with only_driver(run_dir):
            events = [event for event, _ in outbox.read()]
            clock.not_before(max(event.time for event in events))
            is_over = run.keep_failures(_first_open_start(events)).is_complete
            for name, plan in run.plans.items():
                attempt = max(event.attempt for event in events if event.trial == name)
                if not any(isinstance(e, TrialEnded) and (e.trial, e.attempt) == (name, attempt) for e in events):
                    events.append(
                        TrialEnded(trial=name, attempt=attempt, rank=-1, time=clock.now(), status=status, reason=reason)
                    )
                    outbox.append(events[-1])
                    is_over = False
                publication.add_trial(plan, events)
            emit = outbox.append
            if run.ended:
                status = next(event.status for event in reversed(events) if isinstance(event, RunEnded))
                emit, reason = lambda *_: None, ""
            elif is_over and status == "FAILED":
                status, reason = "FAILED" if publication.has_failed_trials else "FINISHED", ""
            return publication, publication.finish(status, emit, console, math.inf, reason)
    except (LockError, RunFolderError) as error:
        gone = isinstance(error, RunFolderError) and error.gone
        publication.give_up(RunFolderError(f"{reason}; {error}", gone=gone), console)
        return publication, None


def _first_open_start(events: Iterable[Event]) -> int:
    """Number of the first start after the last end of the run: earlier failures may be those of a lost driver."""
    number = first = 0
    for event in events:
        number += isinstance(event, RunStarted)
        first = number if isinstance(event, RunEnded) else first
    return first
