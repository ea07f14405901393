"""Decides when a trial that runs with fewer workers than planned is started again with more: events in, a size out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from orchestrator.execution.nodes import has_room_besides
from orchestrator.experiment.placement import smaller
from orchestrator.figures.goodput import RESIZED
from trainers.contract.events import Event, GroupStarted, LoopStarted, StepsDone, TrialRestarted, WorkerStarted
from trainers.contract.plan import TrialPlan

POLL_INTERVAL_SECONDS = 5.0
"""How often the cluster is asked for room."""

WORTH = 2.0
"""What a larger number of workers must save at least, in starts of new workers: it is no gain where it saves one, and
more workers are not that much faster."""

E = TypeVar("E", bound=Event)


class Growth:
    """Watches for room while an attempt runs with fewer workers than planned.

    A start costs what it costs, and a node that has come may go again: room must have been there for
    `resize_after_seconds`, twice as long after each growth that the trial has had, and what is left of the schedule
    must be worth a start.

    Args:
        planned: The trial.
        running: The same with the workers that it runs with; nothing is looked for where these are all.
        started: When the attempt was started (Unix seconds).
        attempt: Its number.
        events: Returns all events of the trial so far.
        has_room: Whether the trial with so many workers would have room if those that run, by node, gave theirs back.
    """

    def __init__(
        self,
        planned: TrialPlan,
        running: TrialPlan,
        started: float,
        attempt: int,
        events: Callable[[], Sequence[Event]],
        has_room: Callable[[TrialPlan, Mapping[str, int]], bool] = has_room_besides,
    ) -> None:
        self._larger = [each for each in (planned, *smaller(planned)) if each.world_size > running.world_size]
        self._running, self._started, self._attempt = running, started, attempt
        self._events, self._has_room = events, has_room
        self._next_look: float = started
        self._since: float | None = None

    def look(self, now: float) -> int | None:
        """The number of workers to start again with now (Unix seconds); None to go on with those that run."""
        if not self._larger or now < self._next_look:
            return None
        self._next_look, events = now + POLL_INTERVAL_SECONDS, self._events()
        nodes = Counter(event.node_id for event in self._own(events, WorkerStarted))
        worthy = (each for each in self._larger if self._saves(each.world_size, events) > WORTH)
        size = next((each.world_size for each in worthy if self._has_room(each, nodes)), None)
        if size is None:
            self._since = None
            return None
        self._since = now if self._since is None else self._since
        times = sum(event.failure == RESIZED for event in _all(events, TrialRestarted))
        return size if now - self._since >= self._running.resize_after_seconds * 2**times else None

    def _saves(self, size: int, events: Sequence[Event]) -> float:
        """What the rest of the schedule would take less with so many workers, over the seconds of a start."""
        windows = [event for event in self._own(events, StepsDone) if event.rank == 0]
        if not windows:
            return 0.0
        step_seconds = sum(window.seconds for window in windows) / (windows[-1].iteration - windows[0].first_iteration)
        left = (self._running.solver.max_iter - windows[-1].iteration) * step_seconds
        return left * (1 - self._running.world_size / size) / self._start_seconds(events)

    def _start_seconds(self, events: Sequence[Event]) -> float:
        """The longest start that the trial has had: workers that waited for a failure were faster than new ones are."""
        began = {event.attempt: event.time - sum(event.part_seconds.values()) for event in _all(events, GroupStarted)}
        began.setdefault(self._attempt, self._started)
        return max([1.0, *(loop.time - began.get(loop.attempt, loop.time) for loop in _all(events, LoopStarted))])

    def _own(self, events: Sequence[Event], kind: type[E]) -> list[E]:
        return [event for event in _all(events, kind) if event.attempt == self._attempt]


def _all(events: Sequence[Event], kind: type[E]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]
