"""Scores the runs of one setup as MLPerf does, and says in sentences what the score is worth.

MLPerf Training rules, "Benchmark Results" (github.com/mlcommons/training_policies, training_rules.adoc): five runs of
Mask R-CNN; the fastest and the slowest are dropped, the others averaged; one run that did not converge may be dropped
as the slowest, with a second one the result is invalid.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from orchestrator.figures.benchmark_records import BenchmarkResult, ConvergenceCheck
from orchestrator.figures.figure import number_text, rate_text
from orchestrator.figures.records import ExperimentResult, TrialResult

MIN_VALID_RUNS = 3
"""Fewer leave nothing to average, or one run alone that says nothing of the others."""

MAX_MISSES = 1
"""Runs that may miss the targets."""

MEANS = ("images_per_second", "energy.joules_per_image", "energy.watt_hours_to_target", "cost_to_target")
"""Figures of a trial of which a benchmark has the mean."""


@dataclass(frozen=True, slots=True)
class Score:
    """A score of several runs."""

    value: float | None
    """Mean of the runs that count, in the unit of the runs; None where there is no score."""
    counted: list[int]
    """Positions of the runs that count; without a score, of all that met the targets."""
    reason: str = ""
    """Why there is no score."""


def olympic_score(values: Sequence[float | None]) -> Score:
    """The mean without the best and the worst run.

    Args:
        values: Time to train of every run that was asked for, in any unit; None (or a value that is not finite) for one
            that missed the target, was aborted or never ran, which counts as the worst. Of equal runs one is left out.

    Returns:
        No score with two such runs or more, or with fewer than three others.
    """
    times = [value if value is not None and math.isfinite(value) else math.inf for value in values]
    ordered = sorted(range(len(times)), key=lambda position: times[position])
    valid = [position for position in ordered if math.isfinite(times[position])]
    if len(times) - len(valid) > MAX_MISSES:
        return Score(None, valid, f"{len(times) - len(valid)} of {len(times)} runs did not meet the targets")
    if len(valid) < MIN_VALID_RUNS:
        return Score(None, valid, f"{len(valid)} of {len(times)} runs met the targets, at least {MIN_VALID_RUNS} must")
    counted = ordered[1:-1]
    return Score(statistics.fmean(times[position] for position in counted), counted)


def scored(trials: Sequence[TrialResult], num_runs: int) -> BenchmarkResult:
    """The score of some trials and the means of their figures, before any checker has seen the logs.

    Args:
        trials: One for each seed that was run.
        num_runs: Seeds that were asked for; one that was not run counts as a run that missed.
    """
    missing = [None] * (num_runs - len(trials))
    score = olympic_score([*(trial.mlperf_seconds for trial in trials), *missing])
    counted = [trials[position] for position in sorted(score.counted)]
    return BenchmarkResult(
        num_runs=max(num_runs, len(trials)),
        num_valid=sum(trial.mlperf_seconds is not None for trial in trials),
        counted=[trial.name for trial in counted],
        score_minutes=None if score.value is None else score.value / 60,
        score_reason=score.reason,
        comparable=False,
        reasons=[],
        epochs=_mean([epochs_to_target(trial) for trial in counted]),
        **{key.rpartition(".")[2]: _mean([attrgetter(key)(trial) for trial in counted]) for key in MEANS},
    )


def epochs_to_target(trial: TrialResult) -> float | None:
    """Epochs trained at the evaluation that first met all targets; None where none did, or a log has no epochs."""
    return next((each.epoch for each in trial.evaluations if each.iteration == trial.scored_iteration), None)


def verdict_lines(result: ExperimentResult) -> list[str]:
    """The score with its runs, and whether it may be compared with MLPerf's, for a person: a line each.

    None where the run is no benchmark, or has not ended.
    """
    benchmark, trials = result.benchmark, result.trials
    if benchmark is None:
        return []
    runs = "; ".join(_run_text(trial, benchmark) for trial in trials)
    if benchmark.score_minutes is None:
        score = f"no score: {benchmark.score_reason}"
    else:
        score = (
            f"score {number_text(benchmark.score_minutes, 2)} minutes, the mean of {len(benchmark.counted)} of "
            f"{benchmark.num_runs} runs without the fastest and the slowest; {rate_text(benchmark.images_per_second)} "
            "images/s"
        )
    if benchmark.comparable:
        checked = benchmark.convergence and _convergence_text(benchmark.convergence)
        verdict = f"comparable with MLPerf's closed division, whose checkers pass ({checked}); nobody reviewed it"
    else:
        verdict = f"not comparable with MLPerf's closed division: {'; '.join(benchmark.reasons)}"
    return [f"Benchmark: {score} ({runs})", f"Verdict: {verdict}"]


def _convergence_text(check: ConvergenceCheck) -> str:
    """The check of convergence in a few words."""
    known = check.reference_epochs
    reference = f", reference {number_text(known, 2)}" if known is not None else ""
    factor = f", MLPerf would multiply the score by {check.score_factor:.3f}" if check.score_factor != 1 else ""
    return f"{number_text(check.epochs, 2)} epochs{reference}: {check.message}{factor}"


def _run_text(trial: TrialResult, benchmark: BenchmarkResult) -> str:
    """A run in a few words: its seed, its minutes, and whether it counts."""
    name = trial.name if trial.seed is None else f"seed {trial.seed}"
    minutes = "missed" if trial.mlperf_seconds is None else number_text(trial.mlperf_seconds / 60, 2)
    left_out = benchmark.score_minutes is not None and trial.name not in benchmark.counted
    return f"{name}: {minutes}{', left out' if left_out else ''}"


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean over the runs that count; None where one of them does not have the figure."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
