"""What crosses the process boundary between driver and workers, both ways.

Standard library only: the driver reads it without torch, and an event written by one version of the program can be
read back from the outbox by another. Times are Unix seconds, durations seconds, AP on the 0–100 scale. A figure that
was not measured is None, never 0 and never NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Section = Literal["setup", "step", "evaluation", "checkpoint", "report"]
StopReason = Literal["target", "max_iter", "interrupted", "preempted"]
FailureKind = Literal[
    "bad_input",  # an image or annotation that cannot be read
    "not_finite",  # a loss of NaN or Inf
    "configuration",  # detectron2 or torch refuses what was asked for
    "out_of_memory",
    "communication",  # a collective failed or timed out
    "worker_lost",  # the process or its node went away
    "stuck",  # alive, but without progress for longer than the section's time-out
    "storage",  # a checkpoint could not be written
    "unknown",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a trial.

    Attributes:
        trial: Name of the trial.
        attempt: Number of the attempt.
        rank: Rank of the worker it happened on; -1 for the driver.
        time: When (Unix seconds).
    """

    kind: ClassVar[str]
    trial: str
    attempt: int
    rank: int
    time: float

    def to_json(self) -> str:
        """One line of JSON; raises ValueError on NaN or infinity."""
        return json.dumps({"kind": self.kind, **dataclasses.asdict(self)}, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class WorkerStarted(Event):
    """The training function began on one rank: the first thing it does (rank 0 of attempt 0 starts the seed clock).

    Attributes:
        host: Host name.
        node_id: Ray's id of the node, or "" outside Ray.
        pid: Process id.
        local_rank: Rank within the node.
        world_size: Number of workers of this attempt; 0 for as many as the plan says.
        device_name: Model name of the accelerator or the processor.
        device_memory_gib: Memory of that device.
        versions: Package name to version.
        host_processor: Model name of the host's processor, or "".
        host_cores: Its cores, hyper-threads counted; None where not known.
        host_memory_gib: Memory of the host.
        operating_system: Name and version, or "".
    """

    kind: ClassVar[str] = "worker_started"
    host: str
    node_id: str
    pid: int
    local_rank: int
    device_name: str
    device_memory_gib: float | None
    versions: dict[str, str]
    host_processor: str = ""
    host_cores: int | None = None
    host_memory_gib: float | None = None
    operating_system: str = ""
    world_size: int = 0


@dataclass(frozen=True, kw_only=True)
class LoopStarted(Event):
    """Model, optimizer and loader are ready, the first batch has not been asked for (MLPerf's run_start on attempt 0).

    Attributes:
        iteration: First iteration to run: 0, or the restored checkpoint's.
        num_train_images: Images trained on per epoch, after detectron2's filtering.
        num_val_images: Images evaluated on.
        setup_seconds: From the start of the training function to here.
        config_yaml: The resolved detectron2 config (rank 0 only, else "").
        restored_from: Checkpoint that was restored, or "".
    """

    kind: ClassVar[str] = "loop_started"
    iteration: int
    num_train_images: int
    num_val_images: int
    setup_seconds: float
    config_yaml: str
    restored_from: str


@dataclass(frozen=True, kw_only=True)
class StepsDone(Event):
    """A window of training steps on one rank; hooks are outside the window.

    Attributes:
        first_iteration: First iteration of the window, counted from 0.
        iteration: Iterations done since the start of training: the last one of the window, plus 1.
        num_images: Images this rank trained on in the window.
        seconds: Wall time of the window on this rank, the device synchronised at both edges.
        step_seconds: Wall time of each step, in order.
        part_seconds: Seconds of the window by part: `data`, `forward`, `backward`, `optimizer`. With several workers
            also `communication`, waiting for their gradients with the own ones ready; `backward` is without it. On a
            GPU all of them, and the steps, are of the device's own line of time: `data` is its standing idle.
        data_seconds: Waiting for the loader, for each step, in order.
        losses: Mean over the window and over the workers, by detectron2's name, and `total_loss` (rank 0 only).
        learning_rate: At the last step.
        peak_memory_gib: Most memory used so far: of the device, or of the process on CPU.
        step_part_seconds: The parts but `data` for each step, in order; a part that was not timed by step is left out.
        num_ranks: Ranks it tells of together: 1, or all of them where a replayed log tells no rank from another. Then
            `step_seconds` and `data_seconds` are empty: a log prints no single step.
    """

    kind: ClassVar[str] = "steps_done"
    first_iteration: int
    iteration: int
    num_images: int
    seconds: float
    step_seconds: tuple[float, ...]
    data_seconds: tuple[float, ...]
    part_seconds: dict[str, float]
    losses: dict[str, float]
    learning_rate: float
    peak_memory_gib: float
    step_part_seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """A COCO evaluation of the model (rank 0).

    Attributes:
        iteration: Iterations trained when it was made.
        epoch: The same in passes over the training data.
        figures: COCO's figures, 0–100: `box_ap`, `box_ap50`, `box_ap75`, `box_aps`, `box_apm`, `box_apl`,
            `box_ar1`, `box_ar10`, `box_ar100`, `box_ars`, `box_arm`, `box_arl`, and the same with `mask_`.
            None where COCO gives none (no object of that size, a model without masks).
        box_scored: When the box figures were known (Unix seconds).
        mask_scored: When the mask figures were known; None without masks.
        seconds: How long it took; training stood still as long, where it was not made beside training.
        part_seconds: The same by part: `inference`, `gather`, `score`. With an evaluation beside training also `stall`:
            how long training stood still for it, handing the weights on and waiting at the next one or a checkpoint.
    """

    kind: ClassVar[str] = "evaluated"
    iteration: int
    epoch: float
    figures: dict[str, float | None]
    box_scored: float
    mask_scored: float | None
    seconds: float
    part_seconds: dict[str, float]

    @property
    def overlapped(self) -> bool:
        """Whether it was made beside training."""
        return "stall" in self.part_seconds

    @property
    def stall_seconds(self) -> float:
        """How long training stood still for it."""
        return self.part_seconds.get("stall", self.seconds)


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is complete in storage (rank 0).

    Attributes:
        iteration: Iterations trained when it was taken.
        path: Where it lies.
        size_bytes: Its size.
        stall_seconds: How long training stood still for it.
        write_seconds: From the snapshot to the rename.
    """

    kind: ClassVar[str] = "checkpoint_saved"
    iteration: int
    path: str
    size_bytes: int
    stall_seconds: float
    write_seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint could not be written, and training goes on with the older ones (rank 0).

    Attributes:
        iteration: Iterations trained when it was taken.
        message: What storage said.
    """

    kind: ClassVar[str] = "checkpoint_failed"
    iteration: int
    message: str


@dataclass(frozen=True, kw_only=True)
class SystemSampled(Event):
    """Load of one node (its local rank 0).

    Attributes:
        host: Host name.
        values: MLflow's names of system metrics (`cpu_utilization_percentage`, …) and their values.
    """

    kind: ClassVar[str] = "system_sampled"
    host: str
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Heartbeat(Event):
    """What a rank is doing; not kept in the outbox.

    Attributes:
        section: Section of the loop.
        part: Finer: `data`, `forward`, `backward`, `optimizer`, or "".
        iteration: Iterations done.
        since: When that section began (Unix seconds).
        image_files: Images of the current batch: named when the process dies without a word.
    """

    kind: ClassVar[str] = "heartbeat"
    section: Section
    part: str
    iteration: int
    since: float
    image_files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoopFinished(Event):
    """Training came to a regular end (rank 0).

    Attributes:
        iteration: Iterations trained.
        reason: Why it ended.
        state_sha256: Hash of the model's and optimizer's state, for comparing runs bit for bit.
    """

    kind: ClassVar[str] = "loop_finished"
    iteration: int
    reason: StopReason
    state_sha256: str


@dataclass(frozen=True, kw_only=True)
class WorkerFailed(Event):
    """An exception ended the training function on one rank, or the driver found a rank lost or stuck.

    Attributes:
        failure: What sort of failure.
        iteration: Iterations done by then.
        section: Section of the loop it happened in.
        message: What happened, for a person.
        image_files: Images of the batch it happened on.
        traceback: The worker's traceback, or "".
        began: When it happened, where that was before it was told (Unix seconds of the driver's host): the last sign
            of life of a process that died, the beginning of what a stuck one is at.
    """

    kind: ClassVar[str] = "worker_failed"
    failure: FailureKind
    iteration: int
    section: str
    message: str
    image_files: tuple[str, ...] = ()
    traceback: str = ""
    began: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run of an experiment began (driver; trial "").

    Attributes:
        experiment: The experiment file's values, as they were resolved.
        run_id: Unique id of the run, the same after `--resume`.
        tags: Git commit, versions, command, host: what the run is told apart by.
    """

    kind: ClassVar[str] = "run_started"
    experiment: dict[str, Any]
    run_id: str
    tags: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """All trials of a run have ended, and its results and report are written (driver; trial "").

    Attributes:
        status: MLflow's run status.
    """

    kind: ClassVar[str] = "run_ended"
    status: Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class TrialStarted(Event):
    """The driver began with a trial (rank -1, attempt 0).

    Attributes:
        plan: The trial's plan, as plain values.
    """

    kind: ClassVar[str] = "trial_started"
    plan: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrialRestarted(Event):
    """The driver starts the workers again (rank -1; `attempt` is the new one).

    Attributes:
        failure: What ended the attempt before.
        message: Its cause, for a person.
        iteration: Iterations that had been done when it ended.
    """

    kind: ClassVar[str] = "trial_restarted"
    failure: str
    message: str
    iteration: int


@dataclass(frozen=True, kw_only=True)
class LogReplayed(Event):
    """The trial was made without this program, and its events were read off a log (rank -1).

    Attributes:
        step_seconds: Mean step that the log closes with (or had reached), hooks left out; None where it prints none.
        step_iterations: Iterations behind that mean.
        total_seconds: Training time that the log closes with, hooks included; None where it prints none.
        unknown: Fields of the result record that the plan had to fill, but the log does not hold;
            `evaluations_clock` for the times of the evaluations.
        notes: What is missing or must be known to read the figures.
    """

    kind: ClassVar[str] = "log_replayed"
    step_seconds: float | None
    step_iterations: int | None
    total_seconds: float | None
    unknown: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TrialEnded(Event):
    """The driver is done with a trial (rank -1).

    Attributes:
        status: MLflow's run status.
        reason: Why, for a person; "" when it finished.
    """

    kind: ClassVar[str] = "trial_ended"
    status: Literal["FINISHED", "FAILED", "KILLED"]
    reason: str


EVENTS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        WorkerStarted, LoopStarted, StepsDone, Evaluated, CheckpointSaved, CheckpointFailed, SystemSampled, Heartbeat,
        LoopFinished, WorkerFailed, RunStarted, RunEnded, TrialStarted, TrialRestarted, LogReplayed, TrialEnded,
    )
}  # fmt: skip


def event_from_json(line: str) -> Event:
    """Reads what `Event.to_json` wrote.

    Raises:
        ValueError: The line is not JSON, its kind is unknown, or fields are missing.
    """
    try:
        values: dict[str, Any] = json.loads(line)
        event = EVENTS[values.pop("kind")]
        names = {f.name for f in dataclasses.fields(event)}
        return event(**{name: _without_lists(value) for name, value in values.items() if name in names})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event: {error}: {line[:200]}") from error


def _without_lists(value: Any) -> Any:
    """JSON has no tuples; events hold them, in fields and within dicts."""
    if isinstance(value, dict):
        return {name: _without_lists(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def measured(value: float | None) -> float | None:
    """A finite number as a plain float, everything else (None, NaN, infinity) as None: not measured."""
    return float(value) if value is not None and math.isfinite(value) else None
