"""Makes a trial's result record out of its events. What other files need of the record is importable from here.

The trap it protects against: what Ray Train reports at the end is bound to the last checkpoint, so figures come from
the events alone; and an absent result is an error, never a blank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from orchestrator.figures.causes import root_cause
from orchestrator.figures.record_parts import CurvePoint, Evaluation, Quantiles, RankFigures, Restart, Sections
from orchestrator.figures.records import ExperimentResult, RepeatRow, ScalingFit, ScalingRow, Spread, TrialResult
from orchestrator.figures.scaling import repeat_rows, scaling_fits, scaling_rows
from orchestrator.figures.sections import LoopRun, began, loop_runs, sections
from orchestrator.figures.steps import data_wait_share, quantiles, rank_figures, step_parts, windows_by_rank
from trainers import clock
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
from trainers.contract.plan import TrialPlan

__all__ = [
    "CurvePoint", "Evaluation", "ExperimentResult", "Quantiles", "RankFigures", "RepeatRow", "Restart", "ScalingFit",
    "ScalingRow", "Sections", "Spread", "TrialResult", "repeat_rows", "scaling_fits", "scaling_rows", "trial_result",
]  # fmt: skip

E = TypeVar("E", bound=Event)


def trial_result(plan: TrialPlan, events: Sequence[Event], mlflow_run_id: str | None = None) -> TrialResult:
    """The record of one trial from its events.

    Args:
        plan: The trial.
        events: All its events so far, of every attempt, in the order they arrived.
        mlflow_run_id: Its MLflow run.

    Raises:
        ValueError: The trial has not ended: an absent result is an error, never a blank.
    """
    ended = _last(events, TrialEnded)
    if ended is None:
        raise ValueError(f"trial {plan.name} has not ended")
    workers = [e for e in events if isinstance(e, WorkerStarted)]
    sizes = {e.attempt: e.world_size or plan.world_size for e in workers}
    loops = [e for e in events if isinstance(e, LoopStarted) and e.rank == 0]
    steps = [e for e in events if isinstance(e, StepsDone)]
    finished = _last(events, LoopFinished)
    attempts = loop_runs(events)
    seed_clock = began(events)
    scored = _settled(events)
    evaluations = [_evaluation(e, seed_clock) for e in scored]
    done = [e.iteration for e in steps if e.rank == 0] + ([finished.iteration] if finished else [])
    iterations = max(done, default=0 if loops else None)
    # A rate belongs to one world size.
    timed = [e for e in steps if sizes.get(e.attempt, plan.world_size) == plan.world_size]
    windows = windows_by_rank(timed)
    log = _last(events, LogReplayed)
    curve = clock.stretches(windows, plan.throughput_warmup_iters, _max_points(windows, log))
    parts = {
        name: quantiles(step_parts(timed, name, plan.throughput_warmup_iters))
        for name in ("data", "forward", "backward", "communication", "optimizer")
    }
    ranks = [] if log else [rank_figures(rank, timed, workers, plan) for rank in sorted(windows)]
    own = [rank.own_seconds for rank in ranks if rank.own_seconds is not None]
    restarts = _restarts(events, attempts, sizes)
    target = _target(plan, scored)
    time_to_train = target[1] - seed_clock if target and seed_clock is not None else None
    where = sections(events)
    reason = ended.reason
    if not reason and time_to_train is None and _has_target(plan):
        reason = f"target not reached in {iterations} iterations"
    trial_started = next((e for e in events if isinstance(e, TrialStarted)), None)
    last_end = finished.time if finished else (attempts[-1].last_progress if attempts else None)
    result = TrialResult(
        name=plan.name,
        world_size=plan.world_size,
        num_nodes=len({e.host + e.node_id for e in workers if e.attempt == workers[-1].attempt}) or None,
        device=plan.device,
        device_name=workers[0].device_name if workers else None,
        recipe=plan.recipe_name,
        scaling=plan.scaling,
        protocol=plan.protocol,
        seed=plan.seed,
        status=ended.status,
        reason=reason,
        global_batch_size=plan.solver.global_batch_size,
        base_lr=plan.solver.base_lr,
        max_iter=plan.solver.max_iter,
        iterations=iterations,
        images_per_second=clock.throughput(windows, plan.throughput_warmup_iters),
        wall_images_per_second=(
            iterations * plan.solver.global_batch_size / (last_end - attempts[0].started)
            if iterations and last_end is not None and last_end > attempts[0].started
            else None
        ),
        step_seconds=quantiles(step_parts(timed, "step", plan.throughput_warmup_iters)),
        data_seconds=parts.pop("data"),
        part_seconds={name: quantiles for name, quantiles in parts.items() if quantiles.p50 is not None},
        data_wait_share=data_wait_share(timed, plan.throughput_warmup_iters),
        ranks=ranks,
        rank_skew=clock.skew(own) if len(own) == len(ranks) else None,
        rate_curve=[curve_point(point) for point in curve],
        rate_curve_source=("timestamps" if log else "steps") if curve else None,
        drift_ratio=clock.drift_ratio(curve),
        throughput_warmup_iters=plan.throughput_warmup_iters,
        time_to_train_seconds=time_to_train,
        time_to_box_target_seconds=_time_to_box(plan, scored, seed_clock),
        mlperf_seconds=target[1] - attempts[0].started if target and attempts else None,
        scored_iteration=target[0].iteration if target else None,
        scored_box_ap=target[0].figures.get("box_ap") if target else None,
        scored_mask_ap=target[0].figures.get("mask_ap") if target else None,
        schedule_seconds=finished.time - seed_clock if finished and seed_clock is not None else None,
        startup_seconds=attempts[0].started - trial_started.time if attempts and trial_started else None,
        evaluation_seconds=sum(e.stall_seconds for e in events if isinstance(e, Evaluated)),
        checkpoint_seconds=sum(e.stall_seconds for e in events if isinstance(e, CheckpointSaved)),
        downtime_seconds=sum(r.downtime_seconds or 0.0 for r in restarts),
        lost_work_seconds=where.lost_work if where else None,
        sections=where,
        num_restarts=len(restarts),
        restarts=restarts,
        box_ap=evaluations[-1].box_ap if evaluations else None,
        mask_ap=evaluations[-1].mask_ap if evaluations else None,
        best_box_ap=max((e.box_ap for e in evaluations if e.box_ap is not None), default=None),
        best_mask_ap=max((e.mask_ap for e in evaluations if e.mask_ap is not None), default=None),
        target_box_ap=plan.target_box_ap,
        target_mask_ap=plan.target_mask_ap,
        evaluations=evaluations,
        cost=_cost(plan, ended.time - trial_started.time if trial_started else None),
        cost_to_target=_cost(plan, time_to_train),
        peak_memory_gib=max((e.peak_memory_gib for e in steps), default=None),
        state_sha256=finished.state_sha256 if finished else None,
        hosts=sorted({e.host for e in workers}),
        num_train_images=loops[0].num_train_images if loops else None,
        num_val_images=loops[0].num_val_images if loops else None,
        mlflow_run_id=mlflow_run_id,
        notes=_notes(plan, sizes),
    )
    return _as_logged(result, log, plan) if log else result


def _as_logged(result: TrialResult, log: LogReplayed, plan: TrialPlan) -> TrialResult:
    """The record of a replayed log: its own closing figures where it prints them, null where it holds nothing."""
    figures: dict[str, object] = {"images_per_second": None, "throughput_warmup_iters": None, "notes": list(log.notes)}
    figures |= {"num_nodes": plan.num_nodes, "hosts": []}
    if log.step_seconds and result.global_batch_size:
        figures["images_per_second"] = result.global_batch_size / log.step_seconds
    if log.step_iterations is not None and result.iterations is not None:
        figures["throughput_warmup_iters"] = max(result.iterations - log.step_iterations, 0)
    if log.total_seconds and result.iterations and result.global_batch_size:
        figures["wall_images_per_second"] = result.iterations * result.global_batch_size / log.total_seconds
    if "evaluations_clock" in log.unknown:
        clocks = dict.fromkeys(("seconds", "elapsed_seconds", "mask_elapsed_seconds"))
        figures["evaluations"] = [e.model_copy(update=clocks) for e in result.evaluations]
    figures |= dict.fromkeys(name for name in log.unknown if name in TrialResult.model_fields)
    return TrialResult.model_validate({**result.model_dump(), **figures})


def _notes(plan: TrialPlan, sizes: Mapping[int, int]) -> list[str]:
    """What must be known of a trial that did not keep its world size."""
    fewer = [f"attempt {attempt} with {size}" for attempt, size in sorted(sizes.items()) if size != plan.world_size]
    what = "rates and step times are of the attempts with all workers, clocks and costs of all attempts"
    return [f"{', '.join(fewer)} of {plan.world_size} workers: {what}"] if fewer else []


def _max_points(windows: Mapping[int, Sequence[clock.Window]], log: LogReplayed | None) -> int:
    """Points of the drift curve: 50, and no shorter than a minute where a log's time stamps have whole seconds."""
    if log is None:
        return 50
    seconds = sum(sum(window.step_seconds) for own in windows.values() for window in own)
    return max(1, min(50, int(seconds / 60)))


def curve_point(point: clock.Stretch) -> CurvePoint:
    """A stretch of the drift curve as a record."""
    return CurvePoint(
        first_iteration=point.first_iteration,
        iteration=point.iteration,
        num_images=point.num_images,
        seconds=point.seconds,
        images_per_second=point.num_images / point.seconds,
    )


def _last(events: Sequence[Event], kind: type[E]) -> E | None:
    return next((e for e in reversed(events) if isinstance(e, kind)), None)


def _settled(events: Sequence[Event]) -> list[Evaluated]:
    """Evaluations by iteration, without those a later attempt repeated: the first one's clock is the true one."""
    attempts: dict[int, int] = {}
    kept = []
    for event in events:
        if isinstance(event, Evaluated) and attempts.setdefault(event.iteration, event.attempt) == event.attempt:
            kept.append(event)
    return sorted(kept, key=lambda event: event.iteration)


def _evaluation(event: Evaluated, seed_clock: float | None) -> Evaluation:
    return Evaluation(
        iteration=event.iteration,
        epoch=event.epoch,
        box_ap=event.figures.get("box_ap"),
        mask_ap=event.figures.get("mask_ap"),
        seconds=event.seconds,
        elapsed_seconds=event.box_scored - seed_clock if seed_clock is not None else None,
        mask_elapsed_seconds=event.mask_scored - seed_clock if seed_clock is not None and event.mask_scored else None,
        figures=event.figures,
        part_seconds=event.part_seconds,
    )


def _cost(plan: TrialPlan, seconds: float | None) -> float | None:
    """What the trial's accelerators cost for so many seconds; None where price or seconds are not known."""
    price = plan.price_per_accelerator_hour
    return None if price is None or seconds is None else price * plan.world_size * seconds / 3600


def _has_target(plan: TrialPlan) -> bool:
    return plan.target_box_ap is not None or plan.target_mask_ap is not None


def _meets(ap: float | None, target: float | None) -> bool:
    return target is None or (ap is not None and ap >= target)


def _target(plan: TrialPlan, scored: Sequence[Evaluated]) -> tuple[Evaluated, float] | None:
    """The evaluation that first met all targets, and when its figures were known (Unix seconds)."""
    for event in scored if _has_target(plan) else ():
        if _meets(event.figures.get("box_ap"), plan.target_box_ap) and _meets(
            event.figures.get("mask_ap"), plan.target_mask_ap
        ):
            known = [] if plan.target_box_ap is None else [event.box_scored]
            if plan.target_mask_ap is not None and event.mask_scored is not None:
                known.append(event.mask_scored)
            return event, max(known, default=event.time)
    return None


def _time_to_box(plan: TrialPlan, scored: Sequence[Evaluated], seed_clock: float | None) -> float | None:
    if plan.target_box_ap is None or seed_clock is None:
        return None
    met = (e.box_scored - seed_clock for e in scored if _meets(e.figures.get("box_ap"), plan.target_box_ap))
    return next(met, None)


def _restarts(events: Sequence[Event], attempts: Sequence[LoopRun], sizes: Mapping[int, int]) -> list[Restart]:
    found = []
    for event in events:
        if not isinstance(event, TrialRestarted):
            continue
        before = [stay for stay in attempts if stay.attempt < event.attempt]
        after = next((stay for stay in attempts if stay.attempt == event.attempt), None)
        cause = root_cause([e for e in events if e.attempt == event.attempt - 1])
        failed = (cause.began or cause.time) if cause and cause.failure == event.failure else None
        # A replayed log tells of windows, not of steps.
        first = after.steps[0].step_seconds[:1] if after and after.steps else ()
        next_step = after.started + first[0] if after and first else None
        found.append(
            Restart(
                attempt=event.attempt,
                cause=event.failure,
                message=event.message,
                world_size=sizes.get(event.attempt),
                lost_iterations=max(0, event.iteration - after.first_iteration) if after else event.iteration,
                downtime_seconds=after.started - before[-1].last_progress if after and before else None,
                recovery_seconds=next_step - failed if next_step is not None and failed is not None else None,
            )
        )
    return found
