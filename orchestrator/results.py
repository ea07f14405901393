"""The result record: what a run leaves in results.json, and how it is put together from the events of its trials.

One record feeds the table, the report, MLflow's summary metrics and comparisons; `orchestrator.replay` makes the same
record of a run made without us. A figure that was not measured is null.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.spec import ReferenceRow
from trainers import clock
from trainers.contract import (
    CheckpointSaved,
    Evaluated,
    Event,
    LoopFinished,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialPlan,
    TrialRestarted,
    TrialStarted,
    WorkerFailed,
    WorkerStarted,
)

E = TypeVar("E", bound=Event)
ByIteration = TypeVar("ByIteration", Evaluated, StepsDone)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Quantiles(_Record):
    """Quantiles of a duration over the steps of the throughput window, all ranks together, in seconds."""

    p50: float | None = None
    """Median."""
    p95: float | None = None
    """95th percentile."""
    p99: float | None = None
    """99th percentile."""


class Evaluation(_Record):
    """One COCO evaluation."""

    iteration: int
    """Iterations trained when it was made."""
    epoch: float | None = None
    """The same in passes over the training data."""
    box_ap: float | None = None
    """Box AP, 0–100."""
    mask_ap: float | None = None
    """Mask AP, 0–100."""
    seconds: float | None = None
    """How long training stood still for it."""
    elapsed_seconds: float | None = None
    """Seed clock when the box figures were known."""
    mask_elapsed_seconds: float | None = None
    """Seed clock when the mask figures were known."""
    figures: dict[str, float | None] = {}
    """COCO's twelve figures for boxes and for masks (`box_ap50`, …), 0–100."""
    part_seconds: dict[str, float] = {}
    """The seconds by part: inference, gather, score."""


class Restart(_Record):
    """One start of the workers after the first."""

    attempt: int
    """Number of the new attempt."""
    cause: str
    """What sort of failure ended the one before."""
    message: str
    """The cause, for a person."""
    lost_iterations: int
    """Iterations that had to be trained again."""
    downtime_seconds: float | None = None
    """From the last step before the failure to the first step after it."""


class TrialResult(_Record):
    """What one trial measured. Definitions: docs/measurement.md."""

    name: str
    """Name of the trial."""
    world_size: int
    """Workers, one per accelerator."""
    num_nodes: int | None = None
    """Hosts they ran on."""
    device: str | None = None
    """`cuda` or `cpu`."""
    device_name: str | None = None
    """Model name of the accelerator or processor."""
    recipe: str | None = None
    """Speed recipe."""
    scaling: Literal["weak", "strong"] | None = None
    """What was kept while scaling."""
    protocol: Literal["throughput", "time_to_train"] | None = None
    """What was measured."""
    seed: int | None = None
    """Seed."""
    status: Literal["FINISHED", "FAILED", "KILLED"]
    """MLflow's run status."""
    reason: str = ""
    """Why it failed or was ended, or why a figure is missing."""
    global_batch_size: int | None = None
    """Images per iteration over all workers."""
    base_lr: float | None = None
    """Learning rate after warm-up."""
    max_iter: int | None = None
    """Iterations of the schedule."""
    iterations: int | None = None
    """Iterations trained."""
    images_per_second: float | None = None
    """Throughput: all workers, by the slowest, warm-up and hooks left out."""
    wall_images_per_second: float | None = None
    """Images of the final state over the seconds from the first step to the end, everything on the clock."""
    step_seconds: Quantiles = Quantiles()
    """Wall time of a step."""
    data_seconds: Quantiles = Quantiles()
    """Waiting for data, part of the step."""
    time_to_train_seconds: float | None = None
    """Seed clock to the evaluation that first met all targets."""
    time_to_box_target_seconds: float | None = None
    """Seed clock to the box figures of the evaluation that first met the box target."""
    schedule_seconds: float | None = None
    """Seed clock to the end of training, reached target or not."""
    startup_seconds: float | None = None
    """From the driver's start of the trial to the first batch being asked for, first attempt."""
    evaluation_seconds: float | None = None
    """Training standing still for evaluations."""
    checkpoint_seconds: float | None = None
    """Training standing still for checkpoints."""
    downtime_seconds: float = 0.0
    """Between the last step before each failure and the first after it."""
    num_restarts: int = 0
    """Starts of the workers after the first."""
    restarts: list[Restart] = []
    """Each of them."""
    box_ap: float | None = None
    """Box AP of the last evaluation, 0–100."""
    mask_ap: float | None = None
    """Mask AP of the last evaluation, 0–100."""
    best_box_ap: float | None = None
    """Best box AP, 0–100."""
    best_mask_ap: float | None = None
    """Best mask AP, 0–100."""
    target_box_ap: float | None = None
    """Box AP that counts as trained."""
    target_mask_ap: float | None = None
    """Mask AP that counts as trained."""
    evaluations: list[Evaluation] = []
    """All evaluations, in order."""
    peak_memory_gib: float | None = None
    """Most memory any worker used: of its device, or of its process on CPU."""
    state_sha256: str | None = None
    """Hash of the final model and optimizer state."""
    hosts: list[str] = []
    """Host names."""
    mlflow_run_id: str | None = None
    """MLflow run of this trial."""


class ScalingRow(_Record):
    """One world size against the smallest one of the same recipe and kind of scaling."""

    recipe: str
    """Speed recipe."""
    kind: Literal["weak", "strong"]
    """What was kept."""
    world_size: int
    """Workers."""
    base_world_size: int
    """Workers of the row compared with."""
    speed_up: float | None
    """Ratio of the throughputs."""
    efficiency: float | None
    """Throughput over (workers / base workers) x base throughput; 1 is ideal."""


class ExperimentResult(_Record):
    """results.json."""

    schema_version: Literal[1] = 1
    """Version of this format; a reader refuses one it does not know."""
    experiment: str
    """Name of the experiment."""
    description: str = ""
    """Its one line for people."""
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
    """MLflow's run status."""
    started: str
    """UTC, ISO 8601."""
    ended: str | None = None
    """UTC, ISO 8601."""
    command: list[str] = []
    """The command that made it."""
    environment: dict[str, str] = {}
    """Versions, host, git commit."""
    mlflow_tracking_uri: str | None = None
    """Store the runs are in, without credentials."""
    mlflow_run_id: str | None = None
    """MLflow's parent run."""
    trials: list[TrialResult] = []
    """Every trial that was started."""
    scaling: list[ScalingRow] = []
    """Speed-up and efficiency."""
    reference_rows: list[ReferenceRow] = Field(default=[])
    """Published figures shown beside."""

    def write(self, path: Path) -> None:
        """Writes the record atomically."""
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        aside.replace(path)


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
    loops = [e for e in events if isinstance(e, LoopStarted) and e.rank == 0]
    steps = [e for e in events if isinstance(e, StepsDone)]
    finished = _last(events, LoopFinished)
    evaluations = [_evaluation(e, _seed_clock(workers)) for e in _settled(events, Evaluated)]
    iterations = max((e.iteration for e in steps if e.rank == 0), default=0 if loops else None)
    windows: dict[int, list[clock.Window]] = defaultdict(list)
    for step in steps:
        windows[step.rank].append(clock.Window(step.first_iteration, step.num_images, step.step_seconds))
    measured = [e for e in steps if e.iteration > plan.throughput_warmup_iters]
    step_times = [
        s for e in measured for s in e.step_seconds[max(0, plan.throughput_warmup_iters - e.first_iteration) :]
    ]
    data_times = [
        s for e in measured for s in e.data_seconds[max(0, plan.throughput_warmup_iters - e.first_iteration) :]
    ]
    began = min((e.time for e in workers), default=None)
    wall_images_per_second = None
    if loops and iterations:
        end = finished.time if finished else max(e.time for e in steps)
        wall_images_per_second = iterations * plan.solver.global_batch_size / (end - loops[0].time)
    restarts = _restarts(events)
    time_to_train, time_to_box = _times_to_target(plan, evaluations)
    reason = ended.reason
    if not reason and plan.protocol == "time_to_train" and time_to_train is None and _has_target(plan):
        reason = f"target not reached in {iterations} iterations"
    boxes = [e.box_ap for e in evaluations if e.box_ap is not None]
    masks = [e.mask_ap for e in evaluations if e.mask_ap is not None]
    trial_started = _first(events, TrialStarted)
    return TrialResult(
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
        wall_images_per_second=wall_images_per_second,
        step_seconds=_quantiles(step_times),
        data_seconds=_quantiles(data_times),
        time_to_train_seconds=time_to_train,
        time_to_box_target_seconds=time_to_box,
        schedule_seconds=finished.time - began if finished and began is not None else None,
        startup_seconds=loops[0].time - trial_started.time if loops and trial_started else None,
        evaluation_seconds=sum(e.seconds for e in events if isinstance(e, Evaluated)),
        checkpoint_seconds=sum(e.stall_seconds for e in events if isinstance(e, CheckpointSaved)),
        downtime_seconds=sum(r.downtime_seconds or 0.0 for r in restarts),
        num_restarts=len(restarts),
        restarts=restarts,
        box_ap=evaluations[-1].box_ap if evaluations else None,
        mask_ap=evaluations[-1].mask_ap if evaluations else None,
        best_box_ap=max(boxes, default=None),
        best_mask_ap=max(masks, default=None),
        target_box_ap=plan.target_box_ap,
        target_mask_ap=plan.target_mask_ap,
        evaluations=evaluations,
        peak_memory_gib=max((e.peak_memory_gib for e in steps), default=None),
        state_sha256=finished.state_sha256 if finished else None,
        hosts=sorted({e.host for e in workers}),
        mlflow_run_id=mlflow_run_id,
    )


def scaling_rows(trials: Sequence[TrialResult]) -> list[ScalingRow]:
    """Speed-up and efficiency of every world size against the smallest of its recipe and kind; medians over seeds."""
    groups: dict[tuple[str, Literal["weak", "strong"]], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if trial.images_per_second is not None and trial.recipe and trial.scaling:
            groups[trial.recipe, trial.scaling][trial.world_size].append(trial.images_per_second)
    rows = []
    for (recipe, kind), rates in groups.items():
        base = min(rates)
        base_rate = clock.quantile(rates[base], 0.5)
        for world_size in sorted(rates):
            rate = clock.quantile(rates[world_size], 0.5)
            speed_up = rate / base_rate if rate and base_rate else None
            rows.append(
                ScalingRow(
                    recipe=recipe,
                    kind=kind,
                    world_size=world_size,
                    base_world_size=base,
                    speed_up=speed_up,
                    efficiency=speed_up * base / world_size if speed_up else None,
                )
            )
    return rows


def _first(events: Sequence[Event], kind: type[E]) -> E | None:
    return next((e for e in events if isinstance(e, kind)), None)


def _last(events: Sequence[Event], kind: type[E]) -> E | None:
    return next((e for e in reversed(events) if isinstance(e, kind)), None)


def _settled(events: Sequence[Event], kind: type[ByIteration]) -> list[ByIteration]:
    """Events of one kind by iteration, the first of those that were repeated after a restart."""
    first: dict[int, ByIteration] = {}
    for event in events:
        if isinstance(event, kind):
            first.setdefault(event.iteration, event)
    return [first[iteration] for iteration in sorted(first)]


def _seed_clock(workers: Sequence[WorkerStarted]) -> float | None:
    return min((e.time for e in workers), default=None)


def _evaluation(event: Evaluated, began: float | None) -> Evaluation:
    return Evaluation(
        iteration=event.iteration,
        epoch=event.epoch,
        box_ap=event.figures.get("box_ap"),
        mask_ap=event.figures.get("mask_ap"),
        seconds=event.seconds,
        elapsed_seconds=event.box_scored - began if began is not None else None,
        mask_elapsed_seconds=event.mask_scored - began if began is not None and event.mask_scored else None,
        figures=event.figures,
        part_seconds=event.part_seconds,
    )


def _has_target(plan: TrialPlan) -> bool:
    return plan.target_box_ap is not None or plan.target_mask_ap is not None


def _times_to_target(plan: TrialPlan, evaluations: Sequence[Evaluation]) -> tuple[float | None, float | None]:
    """Seed clock to (all targets, the box target), each None where it was not met."""
    box, mask = plan.target_box_ap, plan.target_mask_ap
    box_met = [e for e in evaluations if box is not None and e.box_ap is not None and e.box_ap >= box]
    time_to_box = box_met[0].elapsed_seconds if box_met else None
    if not _has_target(plan):
        return None, None
    for e in box_met if box is not None else evaluations:
        if mask is None:
            return e.elapsed_seconds, time_to_box
        if e.mask_ap is not None and e.mask_ap >= mask:
            return e.mask_elapsed_seconds, time_to_box
    return None, time_to_box


def _restarts(events: Sequence[Event]) -> list[Restart]:
    found = []
    for event in events:
        if not isinstance(event, TrialRestarted):
            continue
        before = [e for e in events if isinstance(e, StepsDone | WorkerFailed) and e.attempt < event.attempt]
        after = [e for e in events if isinstance(e, LoopStarted) and e.attempt == event.attempt and e.rank == 0]
        last_step = max((e.time for e in before if isinstance(e, StepsDone)), default=None)
        found.append(
            Restart(
                attempt=event.attempt,
                cause=event.failure,
                message=event.message,
                lost_iterations=max(0, event.iteration - after[0].iteration) if after else event.iteration,
                downtime_seconds=after[0].time - last_step if after and last_step else None,
            )
        )
    return found


def _quantiles(values: Sequence[float]) -> Quantiles:
    return Quantiles(**{f"p{q}": clock.quantile(values, q / 100) for q in (50, 95, 99)})
