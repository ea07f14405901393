"""Where the seconds between a failure and the end of the next step go: pure arithmetic on events."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.figures.sections import LoopRun
from trainers.contract.events import (
    Event,
    GroupStarted,
    LoopStarted,
    StandbyLost,
    StandbyReady,
    TrialRestarted,
    WorkerFailed,
)


def recovery_parts(
    events: Sequence[Event], restart: TrialRestarted, failed: float | None, after: LoopRun
) -> dict[str, float]:
    """Cuts a recovery into parts, in order; they add up to it.

    Args:
        events: All events of the trial.
        restart: The driver's decision to start the workers again.
        failed: When the failure happened (Unix seconds); None for a resumed run, whose recovery is not measured.
        after: The attempt that it led to; its first step has been measured.

    Returns:
        Seconds by part: `detection`, `shutdown` (until the workers are gone and the decision is made), `scheduling`
        (until nodes are chosen and Ray Train runs), `processes`, `process_group`, or instead of these three `standby`
        (until the workers that waited have their orders); those of `LoopStarted`, `first_step`. What an event file of
        an older version does not tell apart is in the part before.
    """
    if failed is None:
        return {}
    own = [event for event in events if event.attempt == restart.attempt]
    noticed = [e.time for e in events if isinstance(e, WorkerFailed) and e.attempt == restart.attempt - 1]
    group = next((event for event in own if isinstance(event, GroupStarted)), None)
    loop = next(event for event in own if isinstance(event, LoopStarted) and event.rank == 0)
    entered = after.started - (loop.setup_seconds or 0.0)
    ends = {"detection": max(min(noticed, default=restart.time), failed), "shutdown": restart.time}
    if group and "standby" in group.part_seconds:
        ends["standby"] = entered
    elif group:
        ends["scheduling"] = group.time - sum(group.part_seconds.values())
        ends["processes"] = group.time - group.part_seconds["process_group"]
        ends["process_group"] = entered
    else:
        ends["scheduling"] = entered
    parts = {part: end - begin for (part, end), begin in zip(ends.items(), [failed, *ends.values()], strict=False)}
    parts |= loop.setup_part_seconds or {"setup": loop.setup_seconds or 0.0}
    return parts | {"first_step": after.steps[0].step_seconds[0]}


def standby_notes(events: Sequence[Event]) -> list[str]:
    """What a record says of workers that waited: which steps their start made slower, and which of them were lost."""
    notes = []
    if ready := [event for event in events if isinstance(event, StandbyReady)]:
        until = ", ".join(str(event.iteration) for event in ready)
        seconds = sum(event.start_seconds for event in ready)
        notes.append(
            f"workers that wait for a failure (faults.standby) were started next to training, for {seconds:.0f} s up "
            f"to iteration {until}: steps meanwhile are slower"
        )
    lost = (event for event in events if isinstance(event, StandbyLost))
    return notes + [f"workers that waited for a failure were lost: {event.message}" for event in lost]
