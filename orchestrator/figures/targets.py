"""Which evaluation of a trial first met its targets, and when that was known.

Whether an AP meets a target is decided in `trainers.contract.targets`, for the training loop and for here.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.figures.logged_plan import Plan
from trainers.contract.events import Evaluated, Event
from trainers.contract.targets import all_met, is_met


def has_target(plan: Plan) -> bool:
    """Whether the trial is meant to reach an AP."""
    return plan.target_box_ap is not None or plan.target_mask_ap is not None


def first_evaluations(events: Sequence[Event]) -> list[Evaluated]:
    """Evaluations by iteration, without those a later attempt repeated: the first one's clock is the true one."""
    attempts: dict[int, int] = {}
    evaluations = (e for e in events if isinstance(e, Evaluated))
    first = [e for e in evaluations if attempts.setdefault(e.iteration, e.attempt) == e.attempt]
    return sorted(first, key=lambda event: event.iteration)


def first_to_meet(plan: Plan, evaluations: Sequence[Evaluated]) -> tuple[Evaluated, float] | None:
    """The first of the evaluations that met all targets, and when its figures were known (Unix seconds).

    Args:
        plan: The trial.
        evaluations: Its evaluations by iteration.

    Returns:
        None where there is no target or none met them.
    """
    for event in evaluations:
        if all_met(event.figures, plan.target_box_ap, plan.target_mask_ap):
            known = [] if plan.target_box_ap is None else [event.box_scored]
            if plan.target_mask_ap is not None and event.mask_scored is not None:
                known.append(event.mask_scored)
            return event, max(known, default=event.time)
    return None


def box_target_met(plan: Plan, evaluations: Sequence[Evaluated]) -> float | None:
    """When the first of the evaluations that met the box target had its box figures (Unix seconds); None for none."""
    met = (e.box_scored for e in evaluations if is_met(e.figures.get("box_ap"), plan.target_box_ap))
    return next(met, None)
