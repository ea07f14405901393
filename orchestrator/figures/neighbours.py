"""Which trials of a run were under way at the same time, and which hosts they shared then."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.figures.records import TrialResult
from trainers.contract.events import Event, RunStarted, TrialEnded, TrialRestarted, TrialStarted, WorkerStarted


@dataclass(slots=True)
class _Attempt:
    """One start of a trial's workers, from what the driver reported: its times are of one clock."""

    trial: str
    begin: float
    end: float = math.inf
    hosts: dict[tuple[str, str], str] = field(default_factory=dict)
    """Node to the name of its host."""


def with_neighbours(trial: TrialResult, events: Iterable[Event]) -> TrialResult:
    """The record of a trial with those that ran at the same time.

    Args:
        trial: The trial.
        events: All events of the run so far.
    """
    attempts = _attempts(list(events))
    pairs = [
        (own, other)
        for own in attempts
        for other in attempts
        if own.trial == trial.name != other.trial and own.begin < other.end and other.begin < own.end
    ]
    shared = {name for own, other in pairs for node, name in own.hosts.items() if node in other.hosts}
    ran_with = sorted({other.trial for _, other in pairs})
    notes = [f"ran at the same time as {', '.join(ran_with)}"] if ran_with else []
    if shared:
        what = "its speeds are not those of a trial alone, and the energy of their processors is that of all"
        notes = [f"{notes[0]}, and shared {', '.join(sorted(shared))} with others: {what}"]
    update = {"ran_with": ran_with, "shared_hosts": sorted(shared), "notes": [*trial.notes, *notes]}
    return trial.model_copy(update=update)


def _attempts(events: list[Event]) -> list[_Attempt]:
    reported = (event for event in events if isinstance(event, RunStarted | TrialStarted | TrialRestarted | TrialEnded))
    found: dict[tuple[str, int], _Attempt] = {}
    live: dict[str, _Attempt] = {}
    for one in sorted(reported, key=lambda event: event.time):
        if isinstance(one, RunStarted):  # whatever was under way had lost its driver
            for attempt in live.values():
                attempt.end = one.time
            live = {}
            continue
        if before := live.pop(one.trial, None):
            before.end = one.time
        if not isinstance(one, TrialEnded):
            live[one.trial] = found[one.trial, one.attempt] = _Attempt(one.trial, one.time)
    for event in events:
        if isinstance(event, WorkerStarted) and (event.trial, event.attempt) in found:
            found[event.trial, event.attempt].hosts[event.host, event.node_id] = event.host
    return list(found.values())
