"""Makes a trial's result record from its events.

Ray Train's own result is bound to the last checkpoint, so figures come from the events alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from orchestrator.figures.causes import root_cause
from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.records import Evaluation, Restart, TrialResult
from orchestrator.figures.sections import LoopRun, began, loop_runs, sections
from orchestrator.figures.steps import PARTS, data_wait_share, peak_memory, quantiles, rank_figures, step_parts
from orchestrator.figures.targets import box_target_met, first_to_meet, has_target
from orchestrator.figures.throughput import MAX_POINTS, drift_ratio, rate_curve, skew, throughput
from trainers.contract.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    LogReplayed,
    LoopFinished,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialRestarted,
    TrialStarted,
    WorkerStarted,
)

E = TypeVar("E", bound=Event)


def trial_result(plan: Plan, events: Sequence[Event], mlflow_run_id: str | None = None) -> TrialResult:
    """The record of one trial from its events.

    Args:
        plan: The trial.
        events: All its events so far, of every attempt, in the order they were received.
        mlflow_run_id: Its MLflow run.

    Raises:
        ValueError: The trial has not ended.
    """
    ended = _last(events, TrialEnded)
    if ended is None:
        raise ValueError(f"trial {plan.name} has not ended")
    workers = _all(events, WorkerStarted)
    sizes = {e.attempt: e.world_size or plan.world_size for e in workers}
    # A rate belongs to one world size.
    steps = [e for e in _all(events, StepsDone) if sizes.get(e.attempt, plan.world_size) == plan.world_size]
    log = _last(events, LogReplayed)
    values: dict[str, Any] = {
        **_setup(plan, events),
        **_accuracy(plan, events),
        **_clocks(plan, events),
        **_steps(plan, steps, workers),
        **_interruptions(events, sizes),
        "status": ended.status,
        "notes": _notes(plan, sizes),
        "mlflow_run_id": mlflow_run_id,
    }
    if log:
        values |= _logged(plan, log, steps, values)
    values["reason"] = ended.reason
    if not ended.reason and values["time_to_train_seconds"] is None and has_target(plan):
        values["reason"] = f"target not reached in {values['iterations']} iterations"
    return TrialResult.model_validate(values)


def _setup(plan: Plan, events: Sequence[Event]) -> dict[str, Any]:
    """What was run on what, and how far it came."""
    workers = _all(events, WorkerStarted)
    loop = next((e for e in _all(events, LoopStarted) if e.rank == 0), None)
    finished = _last(events, LoopFinished)
    done = [e.iteration for e in _all(events, StepsDone) if e.rank == 0] + ([finished.iteration] if finished else [])
    return {
        "name": plan.name,
        "world_size": plan.world_size,
        "num_nodes": len({e.host + e.node_id for e in workers if e.attempt == workers[-1].attempt}) or None,
        "hosts": sorted({e.host for e in workers}),
        "device": plan.device,
        "device_name": workers[0].device_name or None if workers else None,
        "recipe": plan.recipe_name,
        "scaling": plan.scaling,
        "protocol": plan.protocol,
        "seed": plan.seed,
        "global_batch_size": plan.solver.global_batch_size,
        "base_lr": plan.solver.base_lr,
        "max_iter": plan.solver.max_iter,
        "iterations": max(done, default=0 if loop else None),
        "num_train_images": loop.num_train_images if loop else None,
        "num_val_images": loop.num_val_images if loop else None,
        "target_box_ap": plan.target_box_ap,
        "target_mask_ap": plan.target_mask_ap,
        "state_sha256": finished.state_sha256 if finished else None,
    }


def _accuracy(plan: Plan, events: Sequence[Event]) -> dict[str, Any]:
    """AP of the last, the best and the scored evaluation, and all of them."""
    scored = _evaluations(events)
    last = scored[-1].figures if scored else {}
    met = first_to_meet(plan, scored)
    at_target = met[0].figures if met else {}
    values: dict[str, Any] = {"scored_iteration": met[0].iteration if met else None}
    for name in ("box_ap", "mask_ap"):
        values[name] = last.get(name)
        values[f"best_{name}"] = max((ap for e in scored if (ap := e.figures.get(name)) is not None), default=None)
        values[f"scored_{name}"] = at_target.get(name)
    start, timed = _start(events), "times" not in _unknown(events)
    values["evaluations"] = [
        Evaluation(
            iteration=event.iteration,
            epoch=event.epoch,
            box_ap=event.figures.get("box_ap"),
            mask_ap=event.figures.get("mask_ap"),
            seconds=event.seconds if timed else None,
            elapsed_seconds=_between(start, event.box_scored),
            mask_elapsed_seconds=_between(start, event.mask_scored),
            figures=event.figures,
            part_seconds=event.part_seconds,
        )
        for event in scored
    ]
    return values


def _clocks(plan: Plan, events: Sequence[Event]) -> dict[str, Any]:
    """Times by the seed clock, by MLPerf's and by the wall clock, and what they cost."""
    scored = _evaluations(events)
    met = first_to_meet(plan, scored)
    met_at = met[1] if met else None
    start, attempts, finished = _start(events), loop_runs(events), _last(events, LoopFinished)
    first_batch = attempts[0].started if attempts and start is not None else None
    trial_started = next((e.time for e in _all(events, TrialStarted)), None)
    time_to_train = _between(start, met_at)
    timed = "times" not in _unknown(events)
    return {
        "time_to_train_seconds": time_to_train,
        "time_to_box_target_seconds": _between(start, box_target_met(plan, scored)),
        "mlperf_seconds": _between(first_batch, met_at),
        "schedule_seconds": _between(start, finished.time if finished else None),
        "startup_seconds": _between(trial_started, first_batch),
        "evaluation_seconds": sum(e.stall_seconds for e in _all(events, Evaluated)) if timed else None,
        "checkpoint_seconds": sum(e.stall_seconds for e in _all(events, CheckpointSaved)),
        "sections": sections(events) if start is not None else None,
        "wall_images_per_second": _wall_rate(plan, first_batch, attempts, finished, events),
        "cost": _cost(plan, _between(trial_started, next(e.time for e in reversed(_all(events, TrialEnded))))),
        "cost_to_target": _cost(plan, time_to_train),
    }


def _wall_rate(
    plan: Plan,
    first_batch: float | None,
    attempts: Sequence[LoopRun],
    finished: LoopFinished | None,
    events: Sequence[Event],
) -> float | None:
    """Images of the final state over the seconds from the first batch request to the end of training."""
    iterations, batch = _setup(plan, events)["iterations"], plan.solver.global_batch_size
    if first_batch is None or not iterations or batch is None:
        return None
    seconds = (finished.time if finished else attempts[-1].last_progress) - first_batch
    return iterations * batch / seconds if seconds > 0 else None
