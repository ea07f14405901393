"""Whether a benchmark's score may be compared with MLPerf's: MLPerf's own checkers over the logs of all its runs.

The checkers come with `mlperf-logging`: compliance of each log, seeds, epochs to converge (MLPerf Training rules,
"Reference Convergence Points"). What they do not check, because reviewers do, is checked here: data, and how often it
was evaluated.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

from orchestrator.experiment.spec import Experiment
from orchestrator.figures.benchmark import epochs_to_target, olympic_score, scored
from orchestrator.figures.benchmark_records import BenchmarkResult, ConvergenceCheck
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.files import write_atomically
from orchestrator.report.airank import SYSTEM_NAME
from orchestrator.report.mlperf import LOG_NAME, RULESET, Division, failed_rules, quiet_checkers
from orchestrator.report.system_description import system_description, system_id

FOLDER = "mlperf"
"""Folder of a benchmark's run with the layout of a submission, for MLPerf's package checker."""

IMAGES = {"num_train_images": (117_266, 118_287), "num_val_images": (5_000,)}
"""Images of COCO 2017: for training those with an object or all, for validation all."""

MAX_EVALUATIONS_PER_EPOCH = 1.05
"""The closed division evaluates Mask R-CNN once per epoch (rounded to whole batches); more often ends a run earlier."""

CLOSED_TASK = "Mask R-CNN R50-FPN on COCO 2017 to box AP 37.7 and mask AP 33.9"


def benchmark_result(
    trials: Sequence[TrialResult], logs: Sequence[str], num_runs: int, ruleset: str = RULESET
) -> BenchmarkResult:
    """Scores some trials, and checks by MLPerf's rules whether the score may be compared.

    Args:
        trials: One for each seed that was run.
        logs: The text of each one's MLPerf log; "" where it never reached its training loop.
        num_runs: Seeds that were asked for; one that was not run counts as a run that missed.
        ruleset: MLPerf Training's rules, one of 1.0.0 to 3.1.0, which have reference points for Mask R-CNN.
    """
    result = scored(trials, num_runs)
    result.division = _division(logs)
    for trial, log in zip(trials, logs, strict=True):
        if rules := failed_rules(log, ruleset) if log else ["it never trained"]:
            result.failed_rules[trial.name] = rules
    reasons = [result.score_reason, *_rule_reasons(result, trials, sum(map(bool, logs)))]
    epochs = olympic_score([epochs_to_target(trial) for trial in trials]).value
    if result.division == "closed" and result.score_minutes is not None and epochs is not None:
        with tempfile.TemporaryDirectory(prefix="mlperf-") as folder:
            write_logs(Path(folder), logs)
            reasons.append(_seed_reason(Path(folder), ruleset))
            result.convergence = _check_convergence(Path(folder), epochs, trials, ruleset)
        if not result.convergence.passed:
            reasons.append(_convergence_reason(result.convergence))
    result.reasons = [reason for reason in reasons if reason]
    result.comparable = not result.reasons
    return result


def judge_run(experiment: Experiment, result: ExperimentResult, run_dir: Path) -> BenchmarkResult | None:
    """Scores a run that has ended, and writes its logs in the layout of a submission; None for another protocol.

    Args:
        experiment: What was run.
        result: Its trials.
        run_dir: Its folder, with MLPerf's log and AI-Rank's description of the system in the folders of the trials.

    Raises:
        OSError: A log cannot be read, or the folder not be written.
    """
    if experiment.protocol.kind != "benchmark":
        return None
    folders = [run_dir / trial.name for trial in result.trials]
    logs = [
        (folder / LOG_NAME).read_text(encoding="utf-8") if (folder / LOG_NAME).exists() else "" for folder in folders
    ]
    judged = benchmark_result(result.trials, logs, len(experiment.trials.seeds))
    if any(logs):
        trial = result.trials[next(number for number, log in enumerate(logs) if log)]
        known = json.loads((run_dir / trial.name / SYSTEM_NAME).read_text(encoding="utf-8"))
        name = system_id(trial)
        description = system_description(known, trial, judged.division)
        write_atomically(run_dir / FOLDER / "systems" / f"{name}.json", json.dumps(description, indent=2) + "\n")
        write_logs(run_dir / FOLDER / "results" / name / "maskrcnn", logs)
    return judged


def write_logs(folder: Path, logs: Sequence[str]) -> None:
    """Writes the logs under the names that MLPerf's checkers look for."""
    for number, log in enumerate(logs):
        if log:
            write_atomically(folder / f"result_{number}.txt", log)


def _division(logs: Sequence[str]) -> Division | None:
    found = {match[1] for log in logs for match in re.finditer(r'"submission_division", *"value": *"(\w+)"', log)}
    return cast("Division", found.pop()) if len(found) == 1 and found <= {"closed", "open"} else None


def _rule_reasons(result: BenchmarkResult, trials: Sequence[TrialResult], num_logs: int) -> list[str]:
    """Why a score may not be compared, as far as the record of the trials and the compliance of the logs tell."""
    from mlperf_logging.benchmark_meta import get_result_file_counts

    required = get_result_file_counts("training")["maskrcnn"]
    reasons = []
    if not num_logs == result.num_runs == required:
        reasons.append(f"{num_logs} logs of {result.num_runs} runs, where MLPerf's rules require {required}")
    if result.division == "open":
        reasons.append(f"another task than {CLOSED_TASK}")
    elif result.division is None and num_logs:
        reasons.append("the logs do not name one division")
    if len(result.failed_rules) > 1:  # one log that does not comply is accepted, as the slowest run
        rules = dict.fromkeys(rule for rules in result.failed_rules.values() for rule in rules)
        reasons.append(f"{len(result.failed_rules)} logs break rules of MLPerf's: {', '.join(rules)}")
    if shared := sorted({host for trial in trials for host in trial.shared_hosts or ()}):
        reasons.append(f"trials shared {', '.join(shared)} while they ran")
    if result.division == "closed":
        reasons += _data_reasons(trials)
        reasons += [] if result.epochs is not None or result.score_reason else ["a log does not say its epochs"]
    return reasons


def _data_reasons(trials: Sequence[TrialResult]) -> list[str]:
    """What a reviewer would find in the closed division: other images than COCO 2017's, evaluations too often."""
    reasons = []
    for name, allowed in IMAGES.items():
        foreign = {number for trial in trials if (number := getattr(trial, name)) is not None and number not in allowed}
        if foreign:
            found, whole = " and ".join(f"{number:,}" for number in sorted(foreign)), f"{allowed[0]:,}"
            reasons.append(f"{found} {'training' if 'train' in name else 'validation'} images, where COCO has {whole}")
    often = max((rate for trial in trials if (rate := _evaluations_per_epoch(trial)) is not None), default=0.0)
    if often > MAX_EVALUATIONS_PER_EPOCH:
        reasons.append(f"evaluated {often:.2g} times per epoch, where the closed division does once")
    return reasons


def _evaluations_per_epoch(trial: TrialResult) -> float | None:
    """How often a trial was evaluated; the median, as the end of a schedule may follow soon upon an evaluation."""
    epochs = [0.0, *(each.epoch for each in trial.evaluations if each.epoch is not None)]
    gaps = [after - before for before, after in pairwise(epochs) if after > before]
    return 1 / statistics.median(gaps) if gaps else None


def _seed_reason(folder: Path, ruleset: str) -> str:
    """What MLPerf's seed checker finds wrong; "" for nothing."""
    from mlperf_logging.package_checker.seed_checker import SeedChecker

    with quiet_checkers():
        fit = SeedChecker(ruleset).check_seeds([str(path) for path in sorted(folder.iterdir())])
    return "" if fit else "a log has no seed, or two logs have the same one"


def _check_convergence(folder: Path, epochs: float, trials: Sequence[TrialResult], ruleset: str) -> ConvergenceCheck:
    """MLPerf's check of the epochs to converge against its reference convergence points.

    As in MLPerf's package checker, points are pruned first: those that converge slower than their neighbours say.
    """
    from mlperf_logging.rcp_checker import rcp_checker

    with quiet_checkers():
        try:
            passed, message, factor = rcp_checker.check_directory(
                str(folder), "training", ruleset, False, False, None, "pruned_rcps"
            )
        except (KeyError, TypeError, ValueError) as error:  # of a log that another program wrote
            passed, message, factor = False, f"the logs cannot be read: {error!r}", 1.0
        points = rcp_checker.RCP_Checker("training", ruleset, "maskrcnn", False).pruned_rcp_data.values()
    batch = next((trial.global_batch_size for trial in trials if trial.global_batch_size), None)
    exact = next((float(point["Min Epochs"]) for point in points if point["BS"] == batch), None)
    return ConvergenceCheck(
        passed=bool(passed),
        message=message,
        epochs=epochs,
        reference_epochs=_reference_epochs({point["BS"]: float(point["RCP Mean"]) for point in points}, batch),
        min_epochs=exact,
        score_factor=float(factor) if passed else 1.0,
    )


def _reference_epochs(points: Mapping[int, float], batch: int | None) -> float | None:
    """Mean epochs of the reference at a batch size, interpolated between its points, by size; None beyond the largest.

    A batch smaller than the smallest is compared with that one.
    """
    if batch is None or batch > max(points):
        return None
    above = min(size for size in points if size >= batch)
    below = max((size for size in points if size <= batch), default=above)
    share = (batch - below) / (above - below) if above > below else 0.0
    return points[below] + share * (points[above] - points[below])


def _convergence_reason(check: ConvergenceCheck) -> str:
    needs = "the check of convergence does not pass"
    if check.min_epochs is not None:
        needs = f"the reference allows no fewer than {check.min_epochs:.2f}"
    elif check.reference_epochs is not None:
        needs = f"too few against the reference's {check.reference_epochs:.2f}"
    return f"{check.epochs:.2f} epochs to the targets, and {needs} ({check.message})"
