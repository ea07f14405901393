"""The record of a benchmark: several seeds of one setup, their score, and whether it may be compared with MLPerf's."""

from __future__ import annotations

from typing import Literal

from orchestrator.figures.record import Record


class ConvergenceCheck(Record):
    """MLPerf's check that runs do not converge in fewer epochs than the reference (docs/measurement.md)."""

    passed: bool
    message: str
    """The checker's own words: which reference convergence point (RCP) it found or made, or that it has none."""
    epochs: float
    """Mean epochs to the targets, the smallest and the largest left out."""
    reference_epochs: float | None = None
    """The reference's mean at this batch size; null where it was not run at this batch size."""
    min_epochs: float | None = None
    """Fewest epochs that pass; null likewise."""
    score_factor: float = 1.0
    """What MLPerf multiplies the score by: more than 1 where fewer epochs than the reference's mean were needed."""


class BenchmarkResult(Record):
    """The runs of one setup together (`benchmark.` in the catalogue); figures are means over the runs that count."""

    num_runs: int
    """Runs that were asked for."""
    num_valid: int
    """Runs that met all targets."""
    counted: list[str]
    """Names of the trials that count: without the fastest and the slowest; all that met the targets without a score."""
    score_minutes: float | None = None
    score_reason: str = ""
    """Why there is no score; empty with one."""
    comparable: bool
    """Whether the score may be compared with MLPerf's of the closed division."""
    reasons: list[str]
    """Why it may not."""
    division: Literal["closed", "open"] | None = None
    """The division whose rules the logs were checked by; null where they do not agree on one."""
    failed_rules: dict[str, list[str]] = {}
    """Rules that a trial's log breaks, by the trial's name; empty where all logs pass."""
    convergence: ConvergenceCheck | None = None
    """null where it does not apply: another task, or no score."""
    epochs: float | None = None
    images_per_second: float | None = None
    joules_per_image: float | None = None
    watt_hours_to_target: float | None = None
    cost_to_target: float | None = None
