"""Runs trials next to each other, each in a thread: started in their order, as soon as there is room for the next.

The main thread only waits, so that it hears signals at once.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from orchestrator.execution.event_log import EventLog
from orchestrator.execution.event_pump import EventPump
from orchestrator.execution.stop import StopRequest
from orchestrator.execution.trial import run_trial
from orchestrator.experiment.spec import Faults
from orchestrator.runlog.outbox import RunFolderError
from trainers.contract.events import TrialEnded
from trainers.contract.plan import TrialPlan

ROOM_POLL_INTERVAL_SECONDS = 1.0
"""How often the cluster is asked for room for the next trial."""


class TrialRunner:
    """Runs trials from any thread, each with an actor for its workers' events that no other one has meanwhile.

    Args:
        log: Takes their events.
        faults: What is done about failures.
        ray_dir: Folder for Ray Train's own files.
        stop: Set when the user or the job server wants an end.
    """

    def __init__(self, log: EventLog, faults: Faults, ray_dir: str, stop: StopRequest) -> None:
        self._log, self._faults, self._ray_dir, self._stop = log, faults, ray_dir, stop
        self._idle: list[EventPump] = []

    def run(self, plan: TrialPlan) -> TrialEnded:
        """Runs a trial to its end; raises what `run_trial` does."""
        try:
            pump = self._idle.pop()
        except IndexError:
            pump = EventPump(self._log)
        try:
            return run_trial(plan, self._faults, pump, self._ray_dir, self._stop)
        finally:
            self._idle.append(pump)

    def close(self) -> None:
        """Ends the actors, when no trial is under way."""
        for pump in self._idle:
            pump.close()


@dataclass(frozen=True, slots=True)
class Calls:
    """What `run_side_by_side` calls."""

    run: Callable[[TrialPlan], TrialEnded]
    """Runs a trial to its end; called in a thread of its own."""
    fits: Callable[[TrialPlan, Collection[str]], bool]
    """Whether a trial has room next to those under way, which are given by name."""
    ended: Callable[[TrialPlan, TrialEnded], None]
    """Called with each trial that has ended."""
    give_up: Callable[[RunFolderError], None]
    """Called where `ended` could not write the run's folder: ends the trials that are under way."""


def run_side_by_side(plans: Sequence[TrialPlan], most: int, calls: Calls, stop: StopRequest) -> None:
    """Runs trials to their ends; after a signal, no other is started.

    A trial is started without being asked for room where none is under way: that it waits for room, and for how long,
    is its own matter then.

    Args:
        plans: The trials.
        most: How many may be under way at a time.
        calls: What is called.
        stop: Set when the user or the job server wants an end.

    Raises:
        RunFolderError: The run's folder cannot be written any more; all trials have ended for it.
        Exception: What else came out of `calls.run`, at once; other trials may still be under way.
    """
    waiting, live = deque(plans), dict[str, TrialPlan]()
    outcomes: queue.SimpleQueue[tuple[TrialPlan, TrialEnded | BaseException]] = queue.SimpleQueue()
    failure: RunFolderError | None = None

    def run(plan: TrialPlan) -> None:
        try:
            outcomes.put((plan, calls.run(plan)))
        except BaseException as error:  # noqa: BLE001 - raised by the main thread
            outcomes.put((plan, error))

    while True:
        while waiting and len(live) < most and not (stop.requested or failure):
            if live and not calls.fits(waiting[0], live.keys()):
                break
            plan = waiting.popleft()
            live[plan.name] = plan
            threading.Thread(target=run, args=[plan], name=f"trial {plan.name}", daemon=True).start()
        if not live:
            break
        try:
            plan, outcome = outcomes.get(timeout=ROOM_POLL_INTERVAL_SECONDS)
        except queue.Empty:
            continue
        del live[plan.name]
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            calls.ended(plan, outcome)
        except RunFolderError as error:
            failure = failure or error
            calls.give_up(failure)
    if failure:
        raise failure
