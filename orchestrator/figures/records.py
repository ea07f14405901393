"""The result record: every figure a run leaves in results.json, its meaning and its unit.

One record feeds the table, the report, MLflow's summary metrics and comparisons; `orchestrator.replay` makes the same
record of a run made without us. A figure that was not measured is null, never 0. Definitions: docs/measurement.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures.record_parts import CurvePoint, Evaluation, Quantiles, RankFigures, Restart, Sections

__all__ = [
    "CurvePoint", "Evaluation", "ExperimentResult", "Quantiles", "RankFigures", "ReferenceRow", "RepeatRow",
    "Restart", "ScalingFit", "ScalingRow", "Sections", "Spread", "TrialResult",
]  # fmt: skip


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


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
    part_seconds: dict[str, Quantiles] = {}
    """The other parts of a step: forward, backward, communication, optimizer."""
    data_wait_share: float | None = None
    """Waiting for data over the wall time of the steps, 0–1."""
    ranks: list[RankFigures] = []
    """Every worker by itself."""
    rank_skew: float | None = None
    """Slowest worker's own time over the median worker's: 1 is even; null for one worker or where not measured."""
    rate_curve: list[CurvePoint] = []
    """Throughput along the run."""
    rate_curve_source: Literal["steps", "timestamps"] | None = None
    """Made of measured steps, or of a log's time stamps (1 s each)."""
    drift_ratio: float | None = None
    """Throughput of the last quarter of the curve over that of the first; 1 is steady."""
    throughput_warmup_iters: int | None = None
    """Iterations left out of the throughput."""
    time_to_train_seconds: float | None = None
    """Seed clock to the evaluation that first met all targets."""
    time_to_box_target_seconds: float | None = None
    """Seed clock to the box figures of the evaluation that first met the box target."""
    mlperf_seconds: float | None = None
    """MLPerf's clock: from the first batch being asked for to the evaluation that first met all targets."""
    scored_iteration: int | None = None
    """Iterations trained at the evaluation that first met all targets."""
    scored_box_ap: float | None = None
    """Box AP of that evaluation, 0–100."""
    scored_mask_ap: float | None = None
    """Mask AP of that evaluation, 0–100."""
    schedule_seconds: float | None = None
    """Seed clock to the end of training, reached target or not."""
    startup_seconds: float | None = None
    """From the driver's start of the trial to the first batch being asked for, first attempt."""
    evaluation_seconds: float | None = None
    """Training standing still for evaluations."""
    checkpoint_seconds: float | None = None
    """Training standing still for checkpoints."""
    downtime_seconds: float = 0.0
    """Between the last sign of progress before each failure and the first batch asked for after it."""
    lost_work_seconds: float | None = None
    """Steps that had to be trained again after a restart."""
    sections: Sections | None = None
    """Where the whole wall time went."""
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
    cost: float | None = None
    """Price of the accelerators from the driver's start of the trial to its end, in the currency the price is given in;
    null without a price."""
    cost_to_target: float | None = None
    """The same over the time to train."""
    peak_memory_gib: float | None = None
    """Most memory any worker used: of its device, or of its process on CPU."""
    state_sha256: str | None = None
    """Hash of the final model and optimizer state."""
    hosts: list[str] = []
    """Host names."""
    num_train_images: int | None = None
    """Images of an epoch."""
    num_val_images: int | None = None
    """Images of an evaluation."""
    notes: list[str] = []
    """What is missing or must be known to read the figures, for a person."""
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
    efficiency_low: float | None = None
    """Lower end of its 95 % interval."""
    efficiency_high: float | None = None
    """Upper end of its 95 % interval."""
    interval_source: Literal["repeats", "within runs"] | None = None
    """Spread behind the interval: between repeats, or within one run of each size (which cannot see what differs from
    run to run)."""
    matched_first_iteration: int | None = None
    """First iteration compared; null where whole runs are compared."""
    matched_iteration: int | None = None
    """Iterations done at the end of what is compared."""


class ScalingFit(_Record):
    """A model of the step time over the world size, and what it says of a size that was not run: a projection."""

    recipe: str
    """Speed recipe."""
    kind: Literal["weak", "strong"]
    """What was kept."""
    world_sizes: list[int]
    """Sizes it was fitted to."""
    computation_seconds: float
    """Step time that divides among the workers: a whole batch's on one worker (strong), one worker's own (weak,
    together with the serial part, which weak scaling cannot tell apart)."""
    communication_seconds: float | None = None
    """Step time that every doubling of the workers adds; null with too few sizes to tell."""
    serial_seconds: float | None = None
    """Step time that no worker saves; null where it cannot be told apart."""
    worst_relative_error: float
    """Largest deviation of the fit from a measured step time."""
    projected_world_size: int
    """The next size."""
    projected_images_per_second: float
    """PROJECTION, not a measurement: throughput there."""
    projected_efficiency: float
    """PROJECTION, not a measurement: efficiency there, against the smallest size."""


class Spread(_Record):
    """One figure over the repeats that have it."""

    num_values: int
    """Repeats that have it."""
    median: float
    """Median."""
    minimum: float
    """Smallest."""
    maximum: float
    """Largest."""
    mean: float
    """Mean."""
    low: float | None = None
    """Lower end of the mean's 95 % interval (Student's t); null for one value."""
    high: float | None = None
    """Upper end of it."""
    trimmed_mean: float | None = None
    """Mean without the smallest and the largest, from five values up (as MLPerf scores)."""


class RepeatRow(_Record):
    """The repeats of one recipe, kind of scaling and world size."""

    recipe: str
    """Speed recipe."""
    kind: Literal["weak", "strong"]
    """What was kept while scaling."""
    world_size: int
    """Workers."""
    num_trials: int
    """Repeats, failed ones too."""
    num_target_met: int
    """Repeats that met all targets."""
    figures: dict[str, Spread]
    """By the figure's name in the trial's record."""


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
    fits: list[ScalingFit] = []
    """Projections to the next world size."""
    repeats: list[RepeatRow] = []
    """Figures that several runs gave."""
    reference_rows: list[ReferenceRow] = Field(default=[])
    """Published figures shown beside."""

    def write(self, path: Path) -> None:
        """Writes the record atomically."""
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        aside.replace(path)
