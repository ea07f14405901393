"""What concurrent evaluations cost training, against evaluations that it waits for and against none."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import slots
from benchmarks.measure import Row
from benchmarks.training import demo, ours_command, read_events
from trainers.contract.events import Evaluated, Event, LoopStarted, StepsDone
from trainers.contract.plan import TrialPlan


def _in_slots(*plans: TrialPlan) -> list[tuple[slots.Slots, list[Event]]]:
    """Trains plans in slots; when each ran, and its events."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(number)) for number in range(len(plans))]
        for folder in folders:
            folder.mkdir()
        commands = [ours_command(plan, str(folder)) for plan, folder in zip(plans, folders, strict=True)]
        return list(zip(slots.in_slots(commands), [read_events(folder / "events") for folder in folders], strict=True))


def _evaluating(steps: int, period: int, *, concurrent: bool) -> TrialPlan:
    """The demo, of a worker of one thread, evaluated on 256 images; every core but one is to spare."""
    plan = demo(steps, kind="time_to_train", iterations=steps, evaluate_at_end=False, eval_period_iterations=period)
    recipe = dataclasses.replace(plan.recipe, overlapped_evaluation=concurrent)
    return dataclasses.replace(plan, val=dataclasses.replace(plan.train, name=plan.val.name), recipe=recipe)


def evaluation_stall() -> Row:
    """What one evaluation adds to the time of training: concurrent, and with training waiting for it.

    Against training without any, all three in slots; a difference below the noise counts as 10 ms. The wait at the end
    of training for a concurrent evaluation is not counted: it comes once, and with the last evaluation.
    """
    blocking = _evaluating(79, 40, concurrent=False)
    without = dataclasses.replace(blocking, solver=dataclasses.replace(blocking.solver, eval_period=0))

    def stalls() -> list[float]:
        seconds: list[float] = []
        for own, events in _in_slots(without, _evaluating(79, 40, concurrent=True), blocking):
            if len([event for event in events if isinstance(event, Evaluated)]) != (len(seconds) > 0):
                raise RuntimeError("not as many evaluations as asked for")
            seconds.append(slots.ran(own, *_steps_between(events)))
        return [max(each - seconds[0], 0.01) for each in seconds[1:]]

    ours, peer = zip(*(stalls() for _ in range(2)), strict=True)
    return Row("evaluation_stall", "the same evaluation with training waiting for it", "s", ours, peer, 20,
               higher_is_better=False)  # fmt: skip


def evaluation_rate() -> Row:
    """Images per second of training while one evaluation follows on the other, and without any, in slots."""
    plan = _evaluating(120, 5, concurrent=True)
    without = dataclasses.replace(plan, solver=dataclasses.replace(plan.solver, eval_period=0))

    def rates() -> list[float]:
        images = plan.solver.max_iter * plan.solver.global_batch_size
        return [images / slots.ran(own, *_steps_between(events)) for own, events in _in_slots(plan, without)]

    ours, peer = zip(*(rates() for _ in range(2)), strict=True)
    return Row("evaluation_rate", "the same training without evaluations", "images/s", ours, peer, 0.9,
               higher_is_better=True)  # fmt: skip


def _steps_between(events: Sequence[Event]) -> tuple[float, float]:
    """When the first batch was asked for, and when the last step had ended (Unix seconds)."""
    started = next(event.time for event in events if isinstance(event, LoopStarted))
    return started, max(event.time for event in events if isinstance(event, StepsDone))
