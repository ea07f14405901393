"""Makes a trial's result record from its events.

Ray Train's own result is bound to the last checkpoint, so figures come from the events alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from orchestrator.figures.accuracy import accuracy, first_evaluations, first_to_meet
from orchestrator.figures.causes import lost_events, oddities, root_cause
from orchestrator.figures.early_stop import average_notes
from orchestrator.figures.energy import energy_figures
from orchestrator.figures.goodput import goodput_figures
from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.predicted import predicted_figures, prediction_notes
from orchestrator.figures.records import Restart, TrialResult
from orchestrator.figures.recovery import recovery_parts, standby_notes
from orchestrator.figures.sections import (
    began,
    evaluation_stall,
    iterations_done,
    lacks,
    loop_end,
    loop_runs,
    num_nodes,
    sections,
    trial_start,
)
from orchestrator.figures.segments import segments
from orchestrator.figures.shapes import shape_figures
from orchestrator.figures.steps import (
    MAX_POINTS,
    PARTS,
    data_wait_share,
    drift_ratio,
    peak_memory,
    quantiles,
    rank_figures,
    rate_curve,
    skew,
    step_parts,
    throughput,
)
from trainers.contract.events import (
    CheckpointSaved,
    Event,
    LogReplayed,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialRestarted,
    WorkerStarted,
)
from trainers.contract.plan import TrialPlan
from trainers.contract.targets import is_met

E = TypeVar("E", bound=Event)

TARGETS = ("target_box_ap", "target_mask_ap", "metric", "target")
"""Fields of a plan and of a record."""


def trial_result(plan: Plan, events: Sequence[Event], mlflow_run_id: str | None = None) -> TrialResult:
    """The record of one trial from its events.

    Args:
        plan: The trial.
        events: All its events so far, of every attempt, in the order they were received.
        mlflow_run_id: Its MLflow run.

    Raises:
        ValueError: The trial has not ended.
    """
    trial = _Trial(plan, events)
    scores = accuracy(plan, events, trial.evaluations, trial.scored)
    values = {**_setup(trial), **scores, **_clocks(trial), **_steps(trial), **_restarts(trial)}
    if trial.log:
        values |= _printed(trial, trial.log, values["wall_images_per_second"])
    reason, targets = trial.ended.reason, (plan.target_box_ap, plan.target_mask_ap, plan.target)
    stopped = trial.ended.status == "FINISHED"  # by patience, if there is a reason
    missed = any(target is not None for target in targets) and values["time_to_train_seconds"] is None
    if missed and (stopped or not reason):
        reason = "; ".join(filter(None, [f"target not reached in {trial.iterations} iterations", reason]))
    return TrialResult(**values, status=trial.ended.status, reason=reason, mlflow_run_id=mlflow_run_id)


class _Trial:
    """A trial's events, as the groups of figures below take them."""

    def __init__(self, plan: Plan, events: Sequence[Event]) -> None:
        ended, steps = _last(events, TrialEnded), _all(events, StepsDone)
        if ended is None:
            raise ValueError(f"trial {plan.name} has not ended")
        self.plan, self.events, self.ended = plan, events, ended
        self.finished, self.log = loop_end(events), _last(events, LogReplayed)
        self.attempts = loop_runs(events)
        self.workers = _all(events, WorkerStarted)
        self.sizes = {e.attempt: e.world_size or plan.world_size for e in self.workers}
        """Number of workers by attempt."""
        self.steps = [e for e in steps if self.sizes.get(e.attempt, plan.world_size) == plan.world_size]
        """Windows of the attempts with all workers: a rate belongs to one world size."""
        self.iterations = iterations_done(events)
        self.evaluations = first_evaluations(events)
        met = first_to_meet(plan, self.evaluations)
        self.scored, self.met_at = met[0] if met else None, met[1] if met else None
        """The first evaluation that met all targets, and when its figures were known (Unix seconds)."""
        self.driver_start = trial_start(events)
        self.worker_start = began(events)
        """Start of the seed clock (Unix seconds); None where a log does not have it."""
        self.loop_start = self.attempts[0].started if self.attempts and not lacks(events, "start") else None
        """Start of MLPerf's clock, the first batch request; likewise."""


def _setup(trial: _Trial) -> dict[str, Any]:
    """What was run on what, and how far it came."""
    plan, workers = trial.plan, trial.workers
    loop = next((e for e in _all(trial.events, LoopStarted) if e.rank == 0), None)
    fewer = [f"attempt {number} with {size}" for number, size in sorted(trial.sizes.items()) if size != plan.world_size]
    note = (
        f"{', '.join(fewer)} of {plan.world_size} workers: rates and step times are of the attempts with all workers, "
        "clocks and costs of all attempts"
    )
    same = ("name", "world_size", "device", "scaling", "protocol", "seed", *TARGETS)
    return {
        **{name: getattr(plan, name) for name in same},
        **{name: getattr(plan.solver, name) for name in ("global_batch_size", "base_lr", "max_iter")},
        "accumulate": plan.accumulate if isinstance(plan, TrialPlan) else None,
        "num_nodes": num_nodes(trial.events),
        "hosts": sorted({e.host for e in workers}),
        "device_name": _device(workers),
        "recipe": plan.recipe_name,
        "iterations": trial.iterations,
        "num_train_images": loop.num_train_images if loop else None,
        "num_val_images": loop.num_val_images if loop else None,
        "numerics": loop.numerics if loop else {},
        "state_sha256": trial.finished.state_sha256 if trial.finished else None,
        "notes": [
            *([note] if fewer else []),
            *average_notes(plan),
            *prediction_notes(plan, _device(workers)),
            *standby_notes(trial.events),
            *lost_events(trial.events, plan.solver.eval_period or 0),
            *oddities(trial.events),
        ],
    }


def _clocks(trial: _Trial) -> dict[str, Any]:
    """Times by the seed clock, by MLPerf's and by the wall clock, and what they cost."""
    time_to_train = _between(trial.worker_start, trial.met_at)
    target = trial.plan.target_box_ap
    box_met = (e.box_scored for e in trial.evaluations if is_met(e.figures.get("box_ap"), target))
    where = sections(trial.events) if trial.loop_start is not None else None
    return {
        "time_to_train_seconds": time_to_train,
        "time_to_box_target_seconds": _between(trial.worker_start, next(box_met, None)),
        "mlperf_seconds": _between(trial.loop_start, trial.met_at),
        "schedule_seconds": _between(trial.worker_start, trial.finished.time if trial.finished else None),
        "startup_seconds": _between(trial.driver_start, trial.loop_start),
        "evaluation_seconds": None if lacks(trial.events, "times") else evaluation_stall(trial.events),
        "checkpoint_seconds": sum(e.stall_seconds for e in _all(trial.events, CheckpointSaved)),
        "sections": where,
        "lost_work_seconds": where.lost_work if where else None,
        **goodput_figures(where, trial.events, trial.plan.mtbf_hours),
        "wall_images_per_second": _wall_rate(trial),
        "cost": _cost(trial.plan, _between(trial.driver_start, trial.ended.time)),
        "cost_to_target": _cost(trial.plan, time_to_train),
        "energy": energy_figures(trial.plan, trial.events, trial.steps, trial.met_at),
    }


def _wall_rate(trial: _Trial) -> float | None:
    end = trial.finished.time if trial.finished else trial.attempts[-1].last_progress if trial.attempts else None
    batch, seconds = trial.plan.solver.global_batch_size, _between(trial.loop_start, end)
    return trial.iterations * batch / seconds if trial.iterations and batch and seconds and seconds > 0 else None


def _steps(trial: _Trial) -> dict[str, Any]:
    """Throughput, step times, and every worker by itself."""
    plan, steps, warmup = trial.plan, trial.steps, trial.plan.throughput_warmup_iters
    images_per_second = throughput(steps, warmup)
    max_points = MAX_POINTS
    if trial.log:  # whose time stamps have whole seconds: no point shorter than a minute
        max_points = max(1, min(MAX_POINTS, int(sum(e.seconds for e in steps) / 60)))
    curve = rate_curve(steps, warmup, max_points)
    parts = {name: quantiles(step_parts(steps, name, warmup)) for name in PARTS}
    numbers = [] if trial.log else sorted({e.rank for e in steps})
    ranks = [rank_figures(rank, steps, trial.workers, warmup, plan.world_size) for rank in numbers]
    own = [rank.own_seconds for rank in ranks if rank.own_seconds is not None]
    return {
        "images_per_second": images_per_second,
        "predicted": predicted_figures(plan, images_per_second, _device(trial.workers)),
        "throughput_warmup_iters": warmup,
        "step_seconds": quantiles(step_parts(steps, "step", warmup)),
        "data_seconds": parts.pop("data"),
        "part_seconds": {name: part for name, part in parts.items() if part.p50 is not None},
        "data_wait_share": data_wait_share(steps, warmup),
        "ranks": ranks,
        "rank_skew": skew(own) if len(own) == len(ranks) else None,
        "rate_curve": curve,
        "rate_curve_source": ("timestamps" if trial.log else "steps") if curve else None,
        "drift_ratio": drift_ratio(curve),
        "peak_memory_gib": peak_memory(_all(trial.events, StepsDone)),
        **shape_figures(_all(trial.events, StepsDone)),
    }


def _restarts(trial: _Trial) -> dict[str, Any]:
    """Every restart with its cause and what it cost, and what was trained with how many workers."""
    restarts = [_restart(trial, event) for event in _all(trial.events, TrialRestarted)]
    down = sum(restart.downtime_seconds or 0.0 for restart in restarts)
    resized = segments(trial.plan, trial.attempts, trial.sizes, _all(trial.events, StepsDone))
    return {"num_restarts": len(restarts), "restarts": restarts, "segments": resized, "downtime_seconds": down}


def _restart(trial: _Trial, event: TrialRestarted) -> Restart:
    before = [run for run in trial.attempts if run.attempt < event.attempt]
    next_run = next((run for run in trial.attempts if run.attempt >= event.attempt), None)
    after = next_run if next_run and next_run.attempt == event.attempt else None  # a start may be lost before training
    cause = root_cause([e for e in trial.events if e.attempt == event.attempt - 1])
    failed = (cause.began or cause.time) if cause and cause.failure == event.failure else None
    first_step = after.steps[0].step_seconds[:1] if after and after.steps else ()  # a replayed log has no single steps
    return Restart(
        attempt=event.attempt,
        cause=event.failure,
        message=event.message,
        world_size=trial.sizes.get(event.attempt),
        lost_iterations=max(0, event.iteration - next_run.first_iteration) if next_run else event.iteration,
        downtime_seconds=after.started - before[-1].last_progress if after and before else None,
        recovery_seconds=_between(failed, after.started + first_step[0]) if after and first_step else None,
        recovery_part_seconds=recovery_parts(trial.events, event, failed, after) if after and first_step else {},
    )


def _printed(trial: _Trial, log: LogReplayed, wall_rate: float | None) -> dict[str, Any]:
    """What a replayed log prints itself, and null for what it does not have."""
    batch, iterations = trial.plan.solver.global_batch_size, trial.iterations
    warmup = None
    if log.step_iterations is not None and iterations is not None:
        warmup = max(iterations - log.step_iterations, 0)
    if log.total_seconds and iterations and batch:
        wall_rate = iterations * batch / log.total_seconds
    return {
        "num_nodes": trial.plan.num_nodes,
        "hosts": [],
        "notes": list(log.notes),
        "images_per_second": batch / log.step_seconds if log.step_seconds and batch else None,
        "wall_images_per_second": wall_rate,
        "throughput_warmup_iters": warmup,
        "checkpoint_seconds": None,
        **({"mlperf_seconds": log.run_seconds} if log.run_status else {}),
        # Release 0.1 wrote 0 where a log has no value, and named the figures.
        **dict.fromkeys(name for name in log.unknown if name in TrialResult.model_fields),
    }


def _cost(plan: Plan, seconds: float | None) -> float | None:
    """What the trial's accelerators cost for so many seconds; None where price or seconds are not known."""
    price = plan.price_per_accelerator_hour
    return None if price is None or seconds is None else price * plan.world_size * seconds / 3600


def _device(workers: Sequence[WorkerStarted]) -> str | None:
    return workers[0].device_name or None if workers else None


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _all(events: Sequence[Event], kind: type[E]) -> list[E]:
    return [e for e in events if isinstance(e, kind)]


def _last(events: Sequence[Event], kind: type[E]) -> E | None:
    return next((e for e in reversed(events) if isinstance(e, kind)), None)
