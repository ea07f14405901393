"""Parts of a trial's result record: quantiles, evaluations, sections of the wall time, workers, the drift curve.

A figure that was not measured is null, never 0. Definitions: docs/measurement.md.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
    """How long it took; training stood still as long, or for the part `stall` where it was made beside training."""
    elapsed_seconds: float | None = None
    """Seed clock when the box figures were known."""
    mask_elapsed_seconds: float | None = None
    """Seed clock when the mask figures were known."""
    figures: dict[str, float | None] = {}
    """COCO's twelve figures for boxes and for masks (`box_ap50`, …), 0–100."""
    part_seconds: dict[str, float] = {}
    """The seconds by part: inference, gather, score; and stall, of an evaluation beside training."""


class Sections(_Record):
    """Where the wall time of a trial went, in seconds of rank 0; the sections add up to `wall`.

    A section that was not told apart is null, and its seconds are in `step_other` or `other`.
    """

    wall: float
    """From the driver's start of the trial to its end."""
    startup: float
    """From the driver's start of the trial to the first batch being asked for."""
    data: float | None
    """Steps: waiting for the loader."""
    forward: float | None
    """Steps: forward pass."""
    backward: float | None
    """Steps: backward pass, without waiting for other workers' gradients where that was told apart."""
    communication: float | None
    """Steps: waiting for other workers' gradients with the own ones ready."""
    optimizer: float | None
    """Steps: optimizer and learning rate schedule."""
    step_other: float
    """Steps: the rest of them."""
    evaluation: float
    """Training standing still for evaluations."""
    checkpoint: float | None
    """Training standing still for checkpoints."""
    lost_work: float
    """Steps that had to be trained again after a restart: the first time they were trained."""
    downtime: float
    """Between the last sign of progress before each failure and the first batch being asked for after it."""
    shutdown: float
    """From the last sign of progress to the end of the trial."""
    other: float
    """The rest: agreeing at the ends of windows, progress lines, hooks that have no section."""


class RankFigures(_Record):
    """One worker's own figures over the throughput window."""

    rank: int
    """Its rank."""
    host: str | None = None
    """Its host."""
    images_per_second: float | None = None
    """Images it trained on over the wall time of its steps."""
    step_seconds: Quantiles = Quantiles()
    """Wall time of its steps."""
    part_seconds: dict[str, Quantiles] = {}
    """Its steps by part: data, forward, backward, communication, optimizer."""
    own_seconds: float | None = None
    """Its steps without waiting for the other workers, summed; null where that wait was not measured."""
    peak_memory_gib: float | None = None
    """Most memory it used."""


class CurvePoint(_Record):
    """Throughput over a stretch of the run, warm-up and hooks left out: the drift curve."""

    first_iteration: int
    """First iteration, from 0."""
    iteration: int
    """Iterations done at its end."""
    num_images: float
    """Images all workers trained on."""
    seconds: float
    """Wall time of its steps on the slowest worker."""
    images_per_second: float
    """The one over the other."""


class Restart(_Record):
    """One start of the workers after the first."""

    attempt: int
    """Number of the new attempt."""
    cause: str
    """What sort of failure ended the one before."""
    message: str
    """The cause, for a person."""
    world_size: int | None = None
    """Workers of the new attempt; null where they never started."""
    lost_iterations: int
    """Iterations that had to be trained again."""
    downtime_seconds: float | None = None
    """From the last sign of progress before the failure to the first batch asked for after it."""
    recovery_seconds: float | None = None
    """From the failure to the end of the first step trained after it; null where nothing failed: a resumed run."""
