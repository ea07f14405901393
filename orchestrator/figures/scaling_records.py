"""What several trials of a run show together: scaling, its projection, and the spread of repeats."""

from __future__ import annotations

from typing import Literal

from orchestrator.figures.record import Record
from trainers.contract.plan import Scaling


class ScalingRow(Record):
    """One world size against the smallest one of the same recipe and kind of scaling (`scaling.` in the catalogue)."""

    recipe: str
    kind: Scaling
    world_size: int
    base_world_size: int
    """Workers of the row compared with."""
    speed_up: float | None
    efficiency: float | None
    efficiency_low: float | None = None
    """Lower end of its 95 % interval."""
    efficiency_high: float | None = None
    """Upper end of its 95 % interval."""
    interval_source: Literal["repeats", "within runs"] | None = None
    """Spread behind the interval: between repeats, or within one run of each size (blind to what differs by run)."""
    matched_first_iteration: int | None = None
    """First iteration compared; null where whole runs are compared."""
    matched_iteration: int | None = None
    """Iterations done at the end of what is compared."""


class ScalingFit(Record):
    """A model of the step time over the world size, and its projection to a size that was not run (`fits.`)."""

    recipe: str
    kind: Scaling
    world_sizes: list[int]
    """Sizes it was fitted to."""
    computation_seconds: float
    """Step time that workers divide: a batch's on one worker (strong), or a worker's own, serial part too (weak)."""
    communication_seconds: float | None = None
    """Step time that every doubling of the workers adds; null with too few sizes to separate it."""
    serial_seconds: float | None = None
    """Step time that no worker saves; null where it cannot be separated."""
    worst_relative_error: float
    """Largest deviation of the fit from a measured step time."""
    projected_world_size: int
    """The next size."""
    projected_images_per_second: float
    projected_efficiency: float


class Spread(Record):
    """One figure over the repeats that have it."""

    num_values: int
    median: float
    minimum: float
    maximum: float
    mean: float
    low: float | None = None
    """Lower end of the mean's 95 % interval (Student's t); null for one value."""
    high: float | None = None
    """Upper end of it."""
    trimmed_mean: float | None = None
    """Mean without the smallest and the largest, from five values up (as MLPerf scores)."""


class RepeatRow(Record):
    """The repeats of one recipe, kind of scaling and world size."""

    recipe: str
    kind: Scaling
    world_size: int
    num_trials: int
    """Repeats, failed ones too."""
    num_target_met: int
    """Repeats that met all targets."""
    figures: dict[str, Spread]
    """By the figure's key."""
