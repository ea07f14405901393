"""A trial's evaluations: which count, which meets the targets, and what the record says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.records import Evaluation
from orchestrator.figures.sections import began, lacks
from trainers.contract.events import Evaluated, Event
from trainers.contract.targets import all_met, metric_rating, metric_value


def first_evaluations(events: Sequence[Event]) -> list[Evaluated]:
    """Evaluations by iteration, without those a later attempt repeated: the first one's clock is the true one."""
    attempts: dict[int, int] = {}
    evaluated = [e for e in events if isinstance(e, Evaluated)]
    first = [e for e in evaluated if attempts.setdefault(e.iteration, e.attempt) == e.attempt]
    return sorted(first, key=lambda event: event.iteration)


def first_to_meet(plan: Plan, evaluations: Sequence[Evaluated]) -> tuple[Evaluated, float] | None:
    """The first of the evaluations that met all targets, and when those of its figures were known (Unix seconds)."""
    targets = {"box": plan.target_box_ap, "mask": plan.target_mask_ap}
    parts = [part for part, target in targets.items() if target is not None]
    if plan.target is not None:
        parts.append(plan.metric.partition("_")[0])
    for event in evaluations:
        if all_met(event, plan):
            scored = {"box": event.box_scored, "mask": event.mask_scored, "keypoint": event.keypoint_scored}
            known = [when for part in parts if (when := scored.get(part, event.scored)) is not None]
            return event, max(known, default=event.time)
    return None


def accuracy(
    plan: Plan, events: Sequence[Event], evaluations: Sequence[Evaluated], scored: Evaluated | None
) -> dict[str, Any]:
    """Fields of a trial's record: AP of the last, the best and the scored evaluation, and every evaluation."""
    last = evaluations[-1].figures if evaluations else {}
    values: dict[str, Any] = {"scored_iteration": scored.iteration if scored else None}
    for name in ("box_ap", "mask_ap", "keypoint_ap"):
        measured = [ap for e in evaluations if (ap := e.figures.get(name)) is not None]
        values[name] = last.get(name)
        values[f"best_{name}"] = max(measured, default=None)
        values[f"scored_{name}"] = scored.figures.get(name) if scored else None
    rated = [(rating, e) for e in evaluations if (rating := metric_rating(e, plan.metric)) is not None]
    best = max(rated, key=lambda pair: pair[0])[1] if rated else None
    values["best_metric"] = metric_value(best, plan.metric) if best else None
    values["best_metric_iteration"] = best.iteration if best else None
    start, has_times = began(events), not lacks(events, "times")
    values["evaluations"] = [_record(event, start, has_times=has_times) for event in evaluations]
    return values


def _record(event: Evaluated, start: float | None, *, has_times: bool) -> Evaluation:
    def elapsed(moment: float | None) -> float | None:
        return None if start is None or moment is None else moment - start

    return Evaluation(
        iteration=event.iteration,
        epoch=event.epoch,
        box_ap=event.figures.get("box_ap"),
        mask_ap=event.figures.get("mask_ap"),
        keypoint_ap=event.figures.get("keypoint_ap"),
        seconds=event.seconds if has_times else None,
        elapsed_seconds=elapsed(event.box_scored),
        mask_elapsed_seconds=elapsed(event.mask_scored),
        keypoint_elapsed_seconds=elapsed(event.keypoint_scored),
        figures=event.figures,
        part_seconds=event.part_seconds,
        class_ap=event.class_ap,
        validation_losses=event.validation_losses,
        details_file=event.details_file,
    )
