"""The result record, results.json: what a run leaves, read by the table, the report, MLflow and comparisons.

A figure that was not measured is null, never 0. Fields without a description are rows of `figures.catalog`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, computed_field

from orchestrator.experiment.prediction_file import Prediction
from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures.benchmark_records import BenchmarkResult
from orchestrator.figures.energy_records import Energy
from orchestrator.figures.record import Record
from orchestrator.figures.scaling_records import RepeatRow, ScalingFit, ScalingRow
from orchestrator.files import write_atomically
from trainers.contract.plan import ProtocolKind, Scaling


class Quantiles(Record):
    """Quantiles of a duration over the steps of the throughput window, all ranks together, in seconds."""

    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class Evaluation(Record):
    """One COCO evaluation (`evaluations.` in the catalogue)."""

    iteration: int
    epoch: float | None = None
    box_ap: float | None = None
    mask_ap: float | None = None
    keypoint_ap: float | None = None
    seconds: float | None = None
    elapsed_seconds: float | None = None
    mask_elapsed_seconds: float | None = None
    keypoint_elapsed_seconds: float | None = None
    figures: dict[str, float | None] = {}
    part_seconds: dict[str, float] = {}
    class_ap: dict[str, float | None] = {}
    validation_losses: dict[str, float] = {}
    details_file: str = ""
    """File of its curves, confusions and images, relative to the trial's folder; empty where there is none."""


class Sections(Record):
    """Where the wall time of a trial went, in seconds of rank 0 (`sections.` in the catalogue); they add up to `wall`.

    A section that was not measured by itself is null, and its seconds are in `step_other` or `other`.
    """

    wall: float
    startup: float
    data: float | None
    forward: float | None
    backward: float | None
    graph: float | None = None
    communication: float | None
    optimizer: float | None
    step_other: float
    evaluation: float
    checkpoint: float | None
    lost_work: float
    downtime: float
    shutdown: float
    other: float


class RankFigures(Record):
    """One worker's figures over the throughput window."""

    rank: int
    host: str | None = None
    images_per_second: float | None = None
    """Images it trained on over the wall time of its steps."""
    step_seconds: Quantiles = Quantiles()
    part_seconds: dict[str, Quantiles] = {}
    """Its steps by part: data, forward, backward, graph, communication, optimizer."""
    own_seconds: float | None = None
    """Its steps without waiting for the other workers, summed; null where that wait was not measured."""
    peak_memory_gib: float | None = None


class CurvePoint(Record):
    """Consecutive steps of the run, all workers together, warm-up and hooks left out: a point of the drift curve."""

    model_config = ConfigDict(extra="ignore", frozen=True)  # `images_per_second` is written, and not read

    first_iteration: int
    iteration: int
    num_images: float
    """Images all workers trained on; a fraction where a window was cut."""
    seconds: float
    """Wall time of its steps on the slowest worker."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def images_per_second(self) -> float:
        """The one over the other."""
        return self.num_images / self.seconds


class Restart(Record):
    """One start of the workers after the first (`restarts.` in the catalogue)."""

    attempt: int
    cause: str
    """Kind of the failure that ended the one before."""
    message: str
    """The cause, for a person."""
    world_size: int | None = None
    """Workers of the new attempt; null where they never started."""
    lost_iterations: int
    downtime_seconds: float | None = None
    recovery_seconds: float | None = None
    recovery_part_seconds: dict[str, float] = {}
    """Its parts in order, from `detection` to `first_step` (docs/measurement.md, "Downtime"); empty without it."""


class PredictedFigures(Record):
    """The prediction of a trial (`predicted.` in the catalogue)."""

    images_per_second: float | None = None
    low: float | None = None
    """Lower end of its 95 % interval."""
    high: float | None = None
    """Upper end of its 95 % interval."""
    error: float | None = None


class Segment(Record):
    """Consecutive iterations of the final state that were trained with one number of workers."""

    first_iteration: int
    """Counted from 0."""
    iteration: int
    """Iterations done at its end."""
    world_size: int
    """Workers, which train the batches of all that were planned."""
    global_batch_size: int | None = None
    """Images of an iteration: the same with any number of workers."""
    base_lr: float | None = None
    """Learning rate after warm-up: likewise."""
    images_per_second: float | None = None
    """Throughput of its attempts, as the trial's; null where it has no iteration after the warm-up."""


class TrialResult(Record):
    """What one trial measured."""

    name: str
    world_size: int
    num_nodes: int | None = None
    device: str | None = None
    """`cuda` or `cpu`."""
    device_name: str | None = None
    """Model name of the accelerator or processor."""
    recipe: str | None = None
    scaling: Scaling | None = None
    """What stays the same: the batch per worker (weak) or the global batch (strong)."""
    protocol: ProtocolKind | None = None
    seed: int | None = None
    status: Literal["FINISHED", "FAILED", "KILLED"]
    """MLflow's run status."""
    reason: str = ""
    """Why it failed or was ended, or why a figure is missing."""
    global_batch_size: int | None = None
    accumulate: int | None = None
    base_lr: float | None = None
    max_iter: int | None = None
    iterations: int | None = None
    images_per_second: float | None = None
    predicted: PredictedFigures = PredictedFigures()
    """What was predicted for it before it ran; null where nothing was."""
    wall_images_per_second: float | None = None
    step_seconds: Quantiles = Quantiles()
    data_seconds: Quantiles = Quantiles()
    part_seconds: dict[str, Quantiles] = {}
    data_wait_share: float | None = None
    ranks: list[RankFigures] = []
    rank_skew: float | None = None
    rate_curve: list[CurvePoint] = []
    """Throughput along the run."""
    rate_curve_source: Literal["steps", "timestamps"] | None = None
    """Made of measured steps, or of a log's time stamps (1 s each)."""
    drift_ratio: float | None = None
    throughput_warmup_iters: int | None = None
    time_to_train_seconds: float | None = None
    time_to_box_target_seconds: float | None = None
    mlperf_seconds: float | None = None
    scored_iteration: int | None = None
    scored_box_ap: float | None = None
    scored_mask_ap: float | None = None
    scored_keypoint_ap: float | None = None
    schedule_seconds: float | None = None
    startup_seconds: float | None = None
    evaluation_seconds: float | None = None
    checkpoint_seconds: float | None = None
    downtime_seconds: float = 0.0
    lost_work_seconds: float | None = None
    sections: Sections | None = None
    goodput: float | None = None
    ettr: float | None = None
    paused_seconds: float | None = None
    mtbf_seconds: float | None = None
    mtbf_source: Literal["stated", "measured", "default"] | None = None
    """Where it is from: `faults.mtbf_hours`, this trial's failures, or what such hosts are known for."""
    checkpoint_interval_seconds: float | None = None
    advised_checkpoint_seconds: float | None = None
    num_restarts: int = 0
    restarts: list[Restart] = []
    segments: list[Segment] | None = None
    """Which iterations were trained with how many workers; empty where it was always as many as planned, null where an
    older version did not say."""
    box_ap: float | None = None
    mask_ap: float | None = None
    keypoint_ap: float | None = None
    best_box_ap: float | None = None
    best_mask_ap: float | None = None
    best_keypoint_ap: float | None = None
    target_box_ap: float | None = None
    target_mask_ap: float | None = None
    metric: str | None = None
    """What the best checkpoint was chosen by, and `target` is for (`protocol.metric`)."""
    target: float | None = None
    best_metric: float | None = None
    best_metric_iteration: int | None = None
    evaluations: list[Evaluation] = []
    cost: float | None = None
    cost_to_target: float | None = None
    energy: Energy = Energy()
    """What its devices took."""
    peak_memory_gib: float | None = None
    num_shapes: int | None = None
    new_shape_seconds: float | None = None
    num_graphs: int | None = None
    capture_seconds: float | None = None
    wasted_pixel_share: float | None = None
    eager_step_share: float | None = None
    eager_steps: dict[str, int] = {}
    """Those steps by the reason."""
    state_sha256: str | None = None
    """Hash of the final model and optimizer state."""
    hosts: list[str] = []
    ran_with: list[str] | None = None
    """Trials of the run that were under way at the same time, for some of it; null where that is not known."""
    shared_hosts: list[str] | None = None
    """Hosts on which they had workers, too."""
    num_train_images: int | None = None
    num_val_images: int | None = None
    numerics: dict[str, bool | str] = {}
    """What decided how the device computes: `precision`, and torch's switches by their names under `torch.backends`."""
    notes: list[str] = []
    """What is missing or must be known to read the figures, for a person."""
    mlflow_run_id: str | None = None


class ExperimentResult(Record):
    """results.json."""

    schema_version: Literal[1] = 1
    """Version of this format; a reader refuses one it does not know."""
    experiment: str
    description: str = ""
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
    """MLflow's run status."""
    started: str
    """UTC, ISO 8601."""
    ended: str | None = None
    """UTC, ISO 8601."""
    command: list[str] = []
    environment: dict[str, str] = {}
    """Versions, host, git commit."""
    mlflow_tracking_uri: str | None = None
    """Store the runs are in, without credentials."""
    mlflow_run_id: str | None = None
    tracked: bool | None = None
    """Whether MLflow has all of the run; null before its end, for replayed logs, and in results of older versions."""
    trials: list[TrialResult] = []
    scaling: list[ScalingRow] = []
    fits: list[ScalingFit] = []
    """Projections to the next world size."""
    repeats: list[RepeatRow] = []
    """Figures that several runs gave."""
    prediction: Prediction | None = None
    """What its trials, as a calibration, predict for other sizes; null where nothing was asked (`--predict`)."""
    benchmark: BenchmarkResult | None = None
    """The score of its seeds; null for other protocols, and before the end."""
    reference_rows: list[ReferenceRow] = []
    """Published figures shown next to them."""

    def write(self, path: Path) -> None:
        """Writes the record atomically."""
        write_atomically(path, self.model_dump_json(indent=2) + "\n")
