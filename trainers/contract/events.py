"""What happens in a trial, as typed events: workers send them to the driver, which writes them to `events.jsonl`.

Standard library only: the driver reads it without torch, and an event written by one version of the program can be
read by another. Times are Unix seconds, durations seconds, AP on the 0–100 scale; `iteration` is the number of
iterations done, `message` and `reason` are for a person. A figure that was not measured, or that a replayed log does
not hold, is None, never 0 and never NaN; a text that is not known is empty.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Section = Literal["setup", "step", "evaluation", "checkpoint", "report"]
StopReason = Literal["target", "patience", "max_iter", "interrupted", "preempted"]
Status = Literal["FINISHED", "FAILED", "KILLED"]  # of a run, in MLflow's words
FailureKind = Literal[
    "bad_input",  # an image or annotation that cannot be read
    "not_finite",  # a loss of NaN or Inf
    "configuration",  # detectron2 or torch refuses what was asked for
    "out_of_memory",
    "communication",  # a collective failed or timed out
    "worker_lost",  # the process or its node went away
    "stuck",  # alive, but without progress for longer than the section's time-out
    "storage",  # a checkpoint or another file of the run could not be written
    "unknown",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a trial."""

    kind: ClassVar[str]
    trial: str
    attempt: int
    rank: int
    """Rank of the worker it happened on; -1 for the driver."""
    time: float

    def to_json(self) -> str:
        """One line of JSON; raises ValueError on NaN or infinity."""
        return json.dumps({"kind": self.kind, **dataclasses.asdict(self)}, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class WorkerStarted(Event):
    """The training function began on one rank: the first thing it does (rank 0 of attempt 0 starts the seed clock)."""

    kind: ClassVar[str] = "worker_started"
    host: str
    node_id: str
    pid: int | None
    local_rank: int
    device_name: str
    device_memory_gib: float | None
    versions: dict[str, str]
    host_processor: str = ""
    host_cores: int | None = None
    """Counting hyper-threads."""
    host_memory_gib: float | None = None
    operating_system: str = ""
    oom_kills: int | None = None
    """Processes that the kernel had killed for lack of memory before (`trainers.contract.memory.oom_kills`)."""
    world_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class GroupStarted(Event):
    """Ray Train has started the processes of an attempt and connected them (rank -1)."""

    kind: ClassVar[str] = "group_started"
    part_seconds: dict[str, float]
    """How long it took by part: `processes`, `process_group`; `standby` where workers that waited take over."""


@dataclass(frozen=True, kw_only=True)
class StandbyReady(Event):
    """Workers that were started next to those that train wait for a failure (rank -1; `attempt` is the others')."""

    kind: ClassVar[str] = "standby_ready"
    iteration: int
    start_seconds: float
    """How long they took to start."""


@dataclass(frozen=True, kw_only=True)
class StandbyLost(Event):
    """Workers that waited for a failure were lost, or could not take over (rank -1)."""

    kind: ClassVar[str] = "standby_lost"
    message: str


@dataclass(frozen=True, kw_only=True)
class LoopStarted(Event):
    """Model, optimizer and loader are ready, no batch has been requested yet (MLPerf's run_start on attempt 0)."""

    kind: ClassVar[str] = "loop_started"
    iteration: int
    """First iteration to run: 0, or the restored checkpoint's."""
    num_train_images: int | None
    """Images of an epoch, after detectron2's filtering."""
    num_val_images: int | None
    setup_seconds: float | None
    """Since the start of the training function."""
    config_yaml: str
    """The resolved detectron2 config (rank 0 only, else empty)."""
    restored_from: str
    setup_part_seconds: dict[str, float] = field(default_factory=dict)
    """`setup_seconds` by part: `imports`, `data`, `model`, `checkpoint` (finding and reading the newest), `loop`."""
    numerics: dict[str, bool | str] = field(default_factory=dict)
    """What decides how the device computes: `precision` (`fp32`, `amp` or `bf16`), and torch's switches by their names
    under `torch.backends`."""


@dataclass(frozen=True, kw_only=True)
class StepsDone(Event):
    """A window of training steps on one rank; hooks are outside the window."""

    kind: ClassVar[str] = "steps_done"
    first_iteration: int
    """Counted from 0; `iteration` is that of the last step, plus 1."""
    iteration: int
    num_images: int | None
    """Images this rank trained on."""
    seconds: float
    """Wall time, the device synchronised at both edges."""
    step_seconds: tuple[float, ...]
    """Wall time of each step."""
    data_seconds: tuple[float, ...]
    """Waiting for the loader, in each step."""
    part_seconds: dict[str, float]
    """Seconds of the window by part: `data`, `forward`, `backward`, `optimizer`. With several workers also
    `communication`: waiting for the others' gradients after the local ones are ready; `backward` excludes it. A step
    that a CUDA graph replays has `graph` instead of `forward` and `backward`, which a replay does not tell apart. On a
    GPU all parts, and the steps, are measured on the device's timeline: `data` is its idle time for lack of data."""
    losses: dict[str, float]
    """Means over the window and the workers, by detectron2's name, and `total_loss` (rank 0 only); none that is not
    known."""
    learning_rate: float | None
    peak_memory_gib: float | None
    """Most memory used so far: of the device, or of the process on CPU."""
    step_part_seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """The parts but `data` in each step; a part that was not timed in every step is left out."""
    num_graphs: int | None = None
    """CUDA graphs held at the end of the window; None without them."""
    capture_seconds: float | None = None
    """Capturing graphs, in the seconds of their steps."""
    eager_steps: dict[str, int] = field(default_factory=dict)
    """With CUDA graphs, the batches that none of them replayed, by the reason."""
    new_shapes: dict[str, int] | None = None
    """Padded shapes of batches (`images x height x width`) that this process met for the first time, and the step of
    the window, counted from 0; None where they were not noted."""
    pixels: int | None = None
    """Pixels that were computed on, padding included; `wasted_pixels` are those of them that detectron2's own padding
    would not have."""
    wasted_pixels: int | None = None
    eager_batches: dict[str, int] | None = None
    """Batches without fixed sizes, by the reason; None where the recipe does not ask for them."""
    batches_per_step: int = 1
    """Batches of this rank in a step, whose gradients add up."""
    num_ranks: int = 1
    """1, or all of them where a replayed log does not separate ranks; then `step_seconds` and `data_seconds` are empty,
    because a log prints no single step."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """A COCO evaluation of the model (rank 0)."""

    kind: ClassVar[str] = "evaluated"
    iteration: int
    epoch: float | None
    """The same in passes over the training data."""
    figures: dict[str, float | None]
    """COCO's figures, 0–100: `box_ap`, `box_ap50`, `box_ap75`, `box_aps`, `box_apm`, `box_apl`, `box_ar1`, `box_ar10`,
    `box_ar100`, `box_ars`, `box_arm`, `box_arl`, and the same with `mask_` for a model with masks; for one with
    keypoints `keypoint_ap`, `keypoint_ap50`, … (COCO's ten figures of keypoints). None where COCO gives none.
    Where weights and their average were evaluated, those of the average as `ema_box_ap`, …."""
    box_scored: float
    """When the box figures were known; `mask_scored` is None for a model without masks."""
    mask_scored: float | None
    seconds: float | None
    """How long it took; training was stalled as long, unless it ran concurrently."""
    part_seconds: dict[str, float]
    """The same by part: `inference`, `gather`, `score`, `details` (the file of them); `loss` where a validation loss is
    computed, `precise_bn` where statistics of batch norm are. With a concurrent evaluation also `stall`: how long
    training was stalled for it, copying the weights and, at the end of training, waiting for it."""
    keypoint_scored: float | None = None
    """When the keypoint figures were known; None for a model without keypoints."""
    left_out: tuple[int, ...] = ()
    """Iterations of older evaluations that were left out for it: one was still in progress when they were due."""
    num_lost: int = 0
    """How often it was begun again because the process that made it was lost."""
    class_ap: dict[str, float | None] = field(default_factory=dict)
    """AP of each class, 0–100, by `FIGURE/CLASS`: `box_ap/person`, `mask_ap/person`, `keypoint_ap/person`. None for a
    class without an object in the validation set; empty in old files."""
    validation_losses: dict[str, float] = field(default_factory=dict)
    """Losses on the validation images by detectron2's name, and `total_loss`; empty where they were not computed."""
    details_file: str = ""
    """File of its `EvaluationDetails`, relative to the trial's folder; empty where there is none."""

    @property
    def scored(self) -> float:
        """When all of its figures were known."""
        return max(filter(None, (self.box_scored, self.mask_scored, self.keypoint_scored)))

    @property
    def overlapped(self) -> bool:
        """Whether it ran concurrently with training."""
        return "stall" in self.part_seconds

    @property
    def stall_seconds(self) -> float | None:
        """How long training was stalled for it."""
        return self.part_seconds.get("stall", self.seconds)


@dataclass(frozen=True, kw_only=True)
class EvaluationLost(Event):
    """A concurrent evaluation is left out because the process that made it was lost again and again (rank 0)."""

    kind: ClassVar[str] = "evaluation_lost"
    iteration: int
    message: str
    left_out: tuple[int, ...] = ()
    """As in `Evaluated`."""
    stall_seconds: float = 0.0
    """How long training was stalled for it."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is complete in storage (rank 0)."""

    kind: ClassVar[str] = "checkpoint_saved"
    iteration: int
    path: str
    size_bytes: int
    stall_seconds: float
    """How long training was stalled for it."""
    write_seconds: float
    """From the snapshot to the rename."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint could not be written, and training goes on with the older ones (rank 0)."""

    kind: ClassVar[str] = "checkpoint_failed"
    iteration: int
    message: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSkipped(Event):
    """A checkpoint is damaged, and training goes on from an older one or from its start (rank 0)."""

    kind: ClassVar[str] = "checkpoint_skipped"
    path: str
    message: str


@dataclass(frozen=True, kw_only=True)
class ClockChanged(Event):
    """A machine's clock is not that of the times of events: the driver's (rank -1) was set, a worker's is another."""

    kind: ClassVar[str] = "clock_changed"
    seconds: float
    """How far it is ahead of the times of events since then; negative where it is behind."""


@dataclass(frozen=True, kw_only=True)
class EventsLost(Event):
    """Lines of the events file could not be read when the run was resumed (rank -1)."""

    kind: ClassVar[str] = "events_lost"
    lines: tuple[int, ...]
    """Their numbers, counted from 1."""


@dataclass(frozen=True, kw_only=True)
class SystemSampled(Event):
    """Load of one node (its local rank 0)."""

    kind: ClassVar[str] = "system_sampled"
    host: str
    values: dict[str, float]
    """MLflow's names of system metrics (`cpu_utilization_percentage`, …) and their values."""


@dataclass(frozen=True, kw_only=True)
class EnergySampled(Event):
    """Energy that one node has taken since its workers started (its local rank 0)."""

    kind: ClassVar[str] = "energy_sampled"
    host: str
    times: tuple[float, ...]
    """When it was read (Unix seconds), about once a second since the last event."""
    joules: tuple[float, ...] | None
    """Of the devices that the trial computes on, then, since the first reading; None where they are not measured."""
    host_joules: tuple[float, ...] | None
    """Of the node's processors and memory, likewise."""
    source: Literal["counter", "power"] | None
    """Whether the devices count their energy, or report their power."""
    lost_seconds: float = 0.0
    """How long a device has not been measured so far: its counter was reset, or it could not be read for too long."""
    reason: str = ""
    """Why `joules` is None; `host_reason`: why `host_joules` is."""
    host_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Heartbeat(Event):
    """What a rank has been doing since a moment; not written to the events file."""

    kind: ClassVar[str] = "heartbeat"
    section: Section
    part: str
    """Part of a step: `data`, `forward`, `backward`, `optimizer`; empty for none."""
    iteration: int
    since: float
    image_files: tuple[str, ...] = ()
    """Images of the current batch: named when the process dies without a word."""


@dataclass(frozen=True, kw_only=True)
class LoopFinished(Event):
    """Training came to a regular end (rank 0)."""

    kind: ClassVar[str] = "loop_finished"
    iteration: int
    reason: StopReason
    state_sha256: str | None
    """Hash of the model's and optimizer's state, for comparing runs bit for bit; None in a replayed log."""


@dataclass(frozen=True, kw_only=True)
class WorkerFailed(Event):
    """An exception ended the training function on one rank, or the driver found a rank lost or stuck."""

    kind: ClassVar[str] = "worker_failed"
    failure: FailureKind
    iteration: int
    section: str
    message: str
    image_files: tuple[str, ...] = ()
    """Images of the batch it happened on."""
    traceback: str = ""
    began: float | None = None
    """When it happened by the driver's clock, where that was before it was noticed: the last sign of life of a process
    that died, the start of the section that a stuck one is in; None for `time`."""


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run of an experiment began (driver; trial "")."""

    kind: ClassVar[str] = "run_started"
    experiment: dict[str, Any]
    """The resolved values of the experiment file."""
    run_id: str
    """Unique id of the run, the same after `--resume`."""
    tags: dict[str, str]
    """Git commit, versions, command, host: what identifies the run."""
    changes: dict[str, Any] = field(default_factory=dict)
    """What `--resume --set` changed then, by dotted key; `experiment` has it already."""
    packages: dict[str, str] = field(default_factory=dict)
    """Every package that the driver had installed: `VERSION sha256:HASH`, of the hashes of its files in its RECORD."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`train` and `val`, as preflight found them: `annotations_sha256`, `num_images` (of the annotations),
    `image_bytes` (sum over their files), `image_sizes_sha256` (of a line `NAME BYTES` for each image file, by name)."""


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """All trials of a run have ended, and its results and report are written (driver; trial "")."""

    kind: ClassVar[str] = "run_ended"
    status: Status
    reason: str = ""
    """Why it could not go on (its cluster or process was lost); "" where it came to its end, or was stopped."""


@dataclass(frozen=True, kw_only=True)
class TrialStarted(Event):
    """The driver began with a trial (rank -1, attempt 0; a later one where a resumption found this event lost)."""

    kind: ClassVar[str] = "trial_started"
    plan: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrialRestarted(Event):
    """The driver starts the workers again after a failure (rank -1; `attempt` is the new one)."""

    kind: ClassVar[str] = "trial_restarted"
    failure: str
    message: str
    iteration: int


@dataclass(frozen=True, kw_only=True)
class LogReplayed(Event):
    """The trial was trained by another program, and its events were read from its log (rank -1)."""

    kind: ClassVar[str] = "log_replayed"
    step_seconds: float | None
    """Mean step that the log closes with (or had reached), hooks left out."""
    step_iterations: int | None
    """Iterations behind that mean."""
    total_seconds: float | None
    """Training time that the log closes with, hooks included."""
    unknown: tuple[str, ...]
    """What else the log does not hold: `start`, the beginning of training, so that times since then are not known;
    `times`, so that no moment is. Older versions list fields of the result record here."""
    notes: tuple[str, ...]
    """What is missing or must be known to read the figures."""
    run_status: str = ""
    """What `run_stop` of MLPerf's log says (`success`, `aborted`), or `missing`; empty for other logs."""
    run_seconds: float | None = None
    """From `run_start` to `run_stop` of a successful one: MLPerf's time to train."""


@dataclass(frozen=True, kw_only=True)
class TrialEnded(Event):
    """The driver is done with a trial (rank -1)."""

    kind: ClassVar[str] = "trial_ended"
    status: Status
    reason: str


EVENTS: dict[str, type[Event]] = {event.kind: event for event in Event.__subclasses__()}


_OLD_SENTINELS: dict[type[Event], tuple[str, Any]] = {
    WorkerStarted: ("world_size", 0),
    StepsDone: ("peak_memory_gib", 0.0),
    LoopFinished: ("state_sha256", ""),
}
"""Field and value that older versions wrote for "not known"; read as None."""


def event_from_json(line: str) -> Event:
    """Reads what `Event.to_json` wrote.

    Raises:
        ValueError: The line is not JSON, its kind is unknown, or fields are missing.
    """
    try:
        values: dict[str, Any] = json.loads(line)
        event = EVENTS[values.pop("kind")]
        sentinel = _OLD_SENTINELS.get(event)
        if sentinel and values.get(sentinel[0]) == sentinel[1]:
            values[sentinel[0]] = None
        if event is StepsDone and not values["step_seconds"] and not values["learning_rate"]:
            values["learning_rate"] = None  # of a log without one; a trained step's may be 0.0
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
