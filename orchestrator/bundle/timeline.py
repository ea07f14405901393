"""Checks that a trial's events follow on each other: no iteration, worker or evaluation is missing, and no clock moved.

Events hold durations next to moments, from another clock, so that a moment that was changed does not fit any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from orchestrator.bundle.contents import BundledRun
from orchestrator.figures.causes import lost_events
from orchestrator.figures.sections import loop_end
from orchestrator.findings import FindingList
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from trainers.contract.events import (
    Evaluated,
    EvaluationLost,
    Event,
    LoopFinished,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialStarted,
    WorkerStarted,
)
from trainers.contract.plan import TrialPlan

TOLERANCE_SECONDS, RELATIVE_TOLERANCE = 0.2, 0.05
"""How far a duration may exceed the time between its moments: a GPU's timeline is not the host's."""

SETUP_TOLERANCE_SECONDS = 1.0
"""Between a worker's start, and the start of its loop minus its set-up; both are of one clock."""

AP_TOLERANCE = 1e-4
"""Of AP, 0-100; scorers sum up in another order."""

CUT = "Ask for the whole of its events"
MOVED = "Of two clocks, one was moved"


def check_file(run: BundledRun, findings: FindingList) -> None:
    """Checks that every line of the events can be read, to the last."""
    path, place = run.folder / FILE_NAME, f"{run.name}/{FILE_NAME}"
    if damage := sorted({line for lines in Outbox(path).damage().values() for line in lines}):
        findings.error("events_cut", place, f"line {damage[0]}", f"{len(damage)} lines cannot be read", CUT)
    if not path.read_bytes().endswith(b"\n"):
        findings.error("events_cut", place, "its end", "the last line is cut off", CUT)


def check_trial(run: BundledRun, plan: TrialPlan, findings: FindingList) -> None:
    """Checks the events of one trial among themselves."""
    events, place = run.of(plan.name), f"{run.name}/{FILE_NAME}"
    for code, hint, problems in (
        ("events_cut", CUT, _missing(plan, events)),
        ("images_differ", "A rate is made of images and seconds", _miscounted(plan, events)),
        ("classes_differ", "A figure is the mean of those of the classes with objects", _averages(events)),
        ("clock_moved", MOVED, _misplaced(plan, events)),
    ):
        for what in problems:
            findings.error(code, place, plan.name, what, hint)


def _missing(plan: TrialPlan, events: Sequence[Event]) -> Iterator[str]:
    """What the events of a trial lack."""
    yield from lost_events(events, plan.solver.eval_period)
    ended = [event for event in events if isinstance(event, TrialEnded)]
    if not isinstance(events[0], TrialStarted) or not ended:
        yield "they do not hold the start and the end of the trial"
        return
    finished = loop_end(events)
    if ended[-1].status != "FINISHED":
        return
    if finished is None:
        yield "the trial finished, and its loop did not"
        return
    last = {event.rank: event.iteration for event in events if isinstance(event, StepsDone)}
    size = _world_sizes(plan, events).get(finished.attempt, plan.world_size)
    for rank in range(min(size, len(last) + 1)):
        if last.get(rank) != finished.iteration:
            yield f"the steps of rank {rank} end at iteration {last.get(rank)}, training at {finished.iteration}"
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    evaluated = {event.iteration for event in evaluations}
    if period := plan.solver.eval_period:
        # A concurrent evaluation may end training while the next one is in progress.
        early = plan.evaluates_concurrently and finished.reason != "max_iter"
        due = range(period, (max(evaluated, default=0) if early else finished.iteration) + 1, period)
        left_out = {event.iteration for event in events if isinstance(event, EvaluationLost)}
        left_out.update(n for event in events if isinstance(event, Evaluated | EvaluationLost) for n in event.left_out)
        if missing := sorted(set(due) - evaluated - left_out):
            yield f"the evaluation after {missing[0]} iterations is missing, one of {len(missing)}"
    if plan.solver.evaluate_at_end and finished.reason == "max_iter" and finished.iteration not in evaluated:
        yield "the evaluation after the last iteration is missing"


def _miscounted(plan: TrialPlan, events: Sequence[Event]) -> Iterator[str]:
    """Windows of steps whose numbers do not fit together."""
    sizes = _world_sizes(plan, events)
    for event in events:
        if isinstance(event, StepsDone):
            steps, size = event.iteration - event.first_iteration, sizes.get(event.attempt, plan.world_size)
            images = steps * plan.solver.global_batch_size / size
            where = f"iterations {event.first_iteration} to {event.iteration} of rank {event.rank}"
            if event.num_images != images or len(event.step_seconds) != steps:
                made = f"{event.num_images} images in {len(event.step_seconds)} steps"
                yield f"{where}: {made}, not {images:g} in {steps}"
            elif not _close(event.seconds, sum(event.step_seconds)):
                yield f"{where}: {event.seconds:.6g} s, its steps take {sum(event.step_seconds):.6g} s"
            elif any(not _close(event.part_seconds.get(p, 0), sum(v)) for p, v in event.step_part_seconds.items()):
                yield f"{where}: the seconds of a part are not those of its steps"
    images_of_epoch = next((e.num_train_images for e in events if isinstance(e, LoopStarted)), None)
    for event in events:
        if isinstance(event, Evaluated) and event.epoch is not None and images_of_epoch:
            epoch = event.iteration * plan.solver.global_batch_size / images_of_epoch
            if not _close(event.epoch, epoch):
                yield f"the evaluation after {event.iteration} iterations is at epoch {event.epoch:g}, not {epoch:g}"


def _averages(events: Sequence[Event]) -> Iterator[str]:
    """Evaluations with an AP that is not the mean of the classes' (COCO's definition)."""
    for event in events:
        if isinstance(event, Evaluated):
            for figure, value in event.figures.items():
                own = [ap for name, ap in event.class_ap.items() if name.startswith(f"{figure}/") and ap is not None]
                mean = sum(own) / len(own) if own else None
                if value is not None and mean is not None and abs(value - mean) > AP_TOLERANCE:
                    where = f"the evaluation after {event.iteration} iterations"
                    yield f"{where} has {figure} {value:.4f}, and its {len(own)} classes {mean:.4f}"


def _misplaced(plan: TrialPlan, events: Sequence[Event]) -> Iterator[str]:
    """Moments of a trial that are in the wrong order, or too close together for what happened between them."""
    for event in events:
        if isinstance(event, Evaluated):
            moments = (event.box_scored, event.mask_scored, event.keypoint_scored, event.time)
            known = [moment for moment in moments if moment is not None]
            first = event.time - (event.seconds or 0.0)
            if known != sorted(known) or known[0] < first - TOLERANCE_SECONDS:
                yield f"the scores of the evaluation after {event.iteration} iterations lie outside of it"
    for attempt, rank in sorted({(event.attempt, event.rank) for event in events if event.rank >= 0}):
        own = [event for event in events if (event.attempt, event.rank) == (attempt, rank)]
        yield from _set_up(own, rank)
        line = [event for event in own if isinstance(event, LoopStarted | StepsDone | Evaluated | LoopFinished)]
        # A concurrent evaluation lies within the time of steps.
        line = [event for event in line if not (isinstance(event, Evaluated) and event.overlapped)]
        for before, after in pairwise(line):
            took = after.seconds or 0.0 if isinstance(after, StepsDone | Evaluated) else 0.0
            between = after.time - before.time
            if between < took * (1 - RELATIVE_TOLERANCE) - TOLERANCE_SECONDS:
                what = f"{after.kind} at iteration {after.iteration} of rank {rank} comes {between:.3f} s after"
                yield f"{what} {before.kind}, and took {took:.3f} s"
    times = [event.time for event in events if event.rank >= 0]
    if times and not events[0].time <= min(times) <= max(times) <= events[-1].time + TOLERANCE_SECONDS:
        yield f"events of its workers lie outside of the trial {plan.name}"


def _set_up(own: Sequence[Event], rank: int) -> Iterator[str]:
    started = next((event for event in own if isinstance(event, WorkerStarted)), None)
    loop = next((event for event in own if isinstance(event, LoopStarted)), None)
    if started and loop and loop.setup_seconds is not None:
        difference = loop.time - loop.setup_seconds - started.time
        if abs(difference) > SETUP_TOLERANCE_SECONDS:
            between = f"{loop.time - started.time:.3f} s"
            yield f"rank {rank} took {between} from its start to its loop, and set up for {loop.setup_seconds:.3f} s"


def _world_sizes(plan: TrialPlan, events: Sequence[Event]) -> dict[int, int]:
    """The number of workers of each attempt, which may be fewer after a failure."""
    return {e.attempt: e.world_size or plan.world_size for e in events if isinstance(e, WorkerStarted)}


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 + 1e-6 * abs(other)
