"""The score of several seeds, worked out by hand, and the verdict, against MLPerf's own commands."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from mlperf_logging.package_checker import package_checker
from mlperf_logging.rcp_checker import rcp_checker
from mlperf_logging.result_summarizer import result_summarizer
from mlperf_logging.system_desc_checker import system_desc_checker
from rich.console import Console

from orchestrator.closing import close_run
from orchestrator.figures.benchmark import olympic_score, verdict_lines
from orchestrator.figures.benchmark_records import BenchmarkResult
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.trial import trial_result
from orchestrator.report.benchmark import benchmark_result
from orchestrator.report.mlperf import mllog_text
from orchestrator.report.table import markdown_table
from orchestrator.runlog.outbox import FILE_NAME
from orchestrator.tracking.driver import Tracker
from tests.builders.benchmarks import NAME, five, judged, seed_run
from tests.builders.run_folder import made_experiment, make_run
from tests.builders.trials import TrialBuilder


@pytest.mark.parametrize(
    ("times", "score", "counted"),
    [
        ([20.0, 21.0, 22.0, 23.0, 40.0], 22.0, [1, 2, 3]),
        ([40.0, 23.0, 20.0, 22.0, 21.0], 22.0, [4, 3, 1]),
        ([20.0, 21.0, 22.0, 23.0, None], 22.0, [1, 2, 3]),
        ([None, 20.0, 21.0, 22.0, 23.0], 22.0, [2, 3, 4]),
        ([20.0, 21.0, math.inf, 22.0, 23.0], 22.0, [1, 3, 4]),
        ([20.0, 21.0, math.nan, 22.0, 23.0], 22.0, [1, 3, 4]),
        ([20.0, 20.0, 20.0, 26.0, 26.0], 22.0, [1, 2, 3]),
        ([20.0] * 5, 20.0, [1, 2, 3]),
        ([10.0, 20.0, 60.0], 20.0, [1]),
        ([10.0, 20.0, 30.0, None], 25.0, [1, 2]),
    ],
)
def test_the_best_and_the_worst_run_are_left_out_and_a_missed_target_is_the_worst(
    times: list[float | None], score: float, counted: list[int]
) -> None:
    found = olympic_score(times)
    assert (found.value, found.counted, found.reason) == (pytest.approx(score), counted, "")


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ([20.0, 21.0, 22.0, None, None], "2 of 5 runs did not meet the targets"),
        ([None] * 5, "5 of 5 runs did not meet the targets"),
        ([20.0, 21.0, None], "2 of 3 runs met the targets, at least 3 must"),
        ([20.0, 21.0], "2 of 2 runs met the targets, at least 3 must"),
        ([], "0 of 0 runs met the targets, at least 3 must"),
    ],
)
def test_two_misses_or_fewer_than_three_valid_runs_have_no_score(times: list[float | None], reason: str) -> None:
    found = olympic_score(times)
    assert (found.value, found.reason) == (None, reason)
    assert found.counted == [position for position, value in enumerate(times) if value is not None]


def _official(package: Path) -> bool:
    """The answer of MLPerf's package checker: compliance, number of runs, seeds, convergence."""
    checks = (package_checker.check_training_result_files, package_checker.check_systems)
    options = {"quiet": True, "werror": False, "rcp_bypass": False, "rcp_bert_train_samples": False}
    return checks[0](str(package), "training", "3.1.0", **options, seed_checker_bypass=False) and checks[1](
        str(package), "training", "3.1.0"
    )


def _twins() -> list[TrialBuilder]:
    return [*five()[:4], seed_run(3, number=4)]


@pytest.mark.parametrize(
    ("runs", "comparable", "reason"),
    [
        (five(14, 14, 14, 15, 14), True, ""),
        (five(13, 14, 14, 14, 14), True, ""),  # the fastest is left out
        (five(14, 15, 14, 15, 15, global_batch_size=96), True, ""),
        (five(14, 14, 14, 14, 14, global_batch_size=4), True, ""),  # slower than the smallest point
        (five(13, 13, 13, 14, 14), False, r"13.33 epochs to the targets, and the reference allows no fewer than 14.00"),
        (five(11, 11, 11, 11, 11, global_batch_size=16), False, r"11.00 epochs.* the reference's 12.83"),
        (five(14, 14, 14, 14, 14, global_batch_size=300), False, "Missing RCP, please submit RCP with BS = 300"),
        (five(11, 11, 11, 11, 11, global_batch_size=4), False, "Missing RCP"),
        (five(14, 14, 14, 14), False, "4 logs of 5 runs, where MLPerf's rules require 5"),
        (five(14, 14, 14, 14, 14, 14), False, "6 logs of 6 runs"),
        ([*five(14, 14, 14, 14), seed_run(None, number=4)], False, "a log has no seed"),
        (_twins(), False, "two logs have the same one"),
        ([*five(14, 14, 14, 14), seed_run(4, 16, 24.0, met=False)], True, ""),
        ([*five(14, 14, 14), *(seed_run(seed, 16, 24.0, met=False) for seed in (3, 4))], False, "2 of 5 runs did not"),
        (five(14, 14, 14, 14, 14, base_lr=0.013), False, "5 logs break rules of MLPerf's: opt_base_learning_rate"),
    ],
)  # fmt: skip
def test_the_verdict_is_that_of_mlperfs_package_checker(
    tmp_path: Path, runs: list[TrialBuilder], comparable: bool, reason: str
) -> None:
    result = judged(tmp_path, runs)
    assert isinstance(result.benchmark, BenchmarkResult)
    assert (result.benchmark.division, result.benchmark.comparable) == ("closed", comparable)
    assert re.search(reason, "; ".join(result.benchmark.reasons))
    assert bool(reason) != comparable
    assert _official(tmp_path / "mlperf") == comparable


def test_the_score_and_the_convergence_are_those_of_mlperfs_commands(tmp_path: Path) -> None:
    runs = [*five(14, 14, 15, 14, global_batch_size=96), seed_run(4, 16, 60.0, met=False, global_batch_size=96)]
    benchmark = judged(tmp_path, runs).benchmark
    assert benchmark and benchmark.convergence
    # 21, 21, 22.5, 21 and a miss: one of the 21s and the miss are left out.
    assert benchmark.score_minutes == pytest.approx(21.5) and benchmark.num_valid == 4
    assert (benchmark.epochs, benchmark.convergence.epochs) == (pytest.approx(43 / 3), pytest.approx(43 / 3))
    (folder,) = (tmp_path / "mlperf" / "results").glob("*/maskrcnn")
    passed, message, factor = rcp_checker.check_directory(
        str(folder), "training", "3.1.0", False, False, None, "pruned_rcps"
    )
    check = benchmark.convergence
    assert (check.passed, check.message, check.score_factor) == (passed, message, pytest.approx(factor))
    # Between the points of batch 8 (12.75) and 128 (14), the others are pruned: 12.75 + 1.25 x 88 / 120.
    assert check.reference_epochs == pytest.approx(12.75 + 1.25 * 88 / 120) and check.min_epochs is None
    (system,) = (tmp_path / "mlperf" / "systems").iterdir()
    described = json.loads(system.read_text()) | {"host_processors_per_node": "2"}  # which no worker can tell
    system.write_text(json.dumps(described))
    summary, *_ = result_summarizer.summarize_results(str(tmp_path / "mlperf"), "training", "3.1.0")
    assert list(summary["maskrcnn"]) == [pytest.approx(benchmark.score_minutes)]


def test_the_system_is_described_in_mlperfs_schema(tmp_path: Path) -> None:
    judged(tmp_path, five())
    (file,) = (tmp_path / "mlperf" / "systems").iterdir()
    assert file.stem == "1xTest-CPU_reference" and system_desc_checker.check_system_desc(file, "training", "3.1.0")[0]
    described = json.loads(file.read_text())
    assert set(map(type, described.values())) == {str}
    assert (described["accelerators_per_node"], described["accelerator_model_name"]) == ("1", "Test CPU")
    assert described["host_networking"] == "" and "torch 2.14.1" in described["framework"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"images": 4000}, "4,000 training images, where COCO has 117,266"),
        ({"per_epoch": 2}, "evaluated 2 times per epoch"),
        ({"target_box_ap": 30.0}, "another task than Mask R-CNN R50-FPN"),
        ({"config": "MODEL:\n  RESNETS:\n    DEPTH: 101\n"}, "another task than Mask R-CNN R50-FPN"),
        ({"config": "MODEL:\n  ROI_HEADS:\n    NAME: CascadeROIHeads\n"}, "another task than Mask R-CNN R50-FPN"),
    ],
)
def test_what_reviewers_look_at_is_a_reason_too(fields: dict[str, Any], reason: str) -> None:
    found = _result(five(**fields))
    assert found.score_minutes is not None and not found.comparable
    assert reason in "; ".join(found.reasons)


def _read(runs: list[TrialBuilder]) -> tuple[list[TrialResult], list[str]]:
    trials = [trial_result(made.trial, made.events) for made in runs]
    return trials, [mllog_text(made.trial, made.events, trial) for made, trial in zip(runs, trials, strict=True)]


def _result(runs: list[TrialBuilder], num_runs: int | None = None) -> BenchmarkResult:
    return benchmark_result(*_read(runs), num_runs or len(runs))


def test_a_seed_that_was_left_out_counts_as_a_run_that_missed() -> None:
    whole, without = _result(five(14, 15, 16, 17, 18)), _result(five(14, 15, 16, 17), num_runs=5)
    assert whole.score_minutes == without.score_minutes == pytest.approx(24.0)
    assert whole.counted == without.counted == [f"{NAME}{seed}" for seed in (1, 2, 3)]
    assert _result(five(14, 15, 16), num_runs=5).score_reason == "2 of 5 runs did not meet the targets"


def test_a_run_that_never_trained_is_a_miss_and_a_missing_log() -> None:
    runs = five()
    runs[2].events = [event for event in runs[2].events if event.kind in ("trial_started", "trial_ended")]
    found = _result(runs)
    assert (found.num_valid, found.failed_rules) == (4, {f"{NAME}2": ["it never trained"]})
    assert found.reasons == ["4 logs of 5 runs, where MLPerf's rules require 5"]


def test_no_run_at_all_has_no_score_and_the_reason() -> None:
    found = benchmark_result([], [], 5)
    assert (found.score_minutes, found.comparable, found.division) == (None, False, None)
    assert found.score_reason == "5 of 5 runs did not meet the targets"


def test_a_log_that_mlperfs_checker_cannot_read_is_a_reason_and_no_crash() -> None:
    trials, logs = _read(five())
    logs[1] = logs[1].replace('"epoch_num"', '"epoch"')
    found = benchmark_result(trials, logs, 5)
    assert not found.comparable and "cannot be read" in "; ".join(found.reasons)


def test_people_read_the_score_and_the_verdict_in_two_lines(tmp_path: Path) -> None:
    score, verdict = verdict_lines(judged(tmp_path, five(14, 15, 16, 14, 18)))
    assert score.startswith(
        "Benchmark: score 22.50 minutes, the mean of 3 of 5 runs without the fastest and the slowest"
    )
    assert "(seed 0: 21.00, left out; seed 1: 22.50; seed 2: 24.00; seed 3: 21.00; seed 4: 27.00, left out)" in score
    assert verdict.startswith("Verdict: comparable with MLPerf's closed division")
    assert "15.00 epochs, reference 14.00: RCP found" in verdict and "nobody reviewed it" in verdict
    missed = judged(tmp_path / "second", [seed_run(seed, met=False) for seed in range(5)])
    assert verdict_lines(missed)[0].startswith("Benchmark: no score: 5 of 5 runs did not meet the targets (")
    assert "missed" in verdict_lines(missed)[0] and "no score" in markdown_table(missed)


@dataclass
class Published:
    folder: Path
    result: ExperimentResult
    printed: str
    store: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A benchmark on drawn shapes, three seeds, whose trials are over and which is published now."""
    folder = tmp_path_factory.mktemp("benchmark")
    experiment = made_experiment(
        trials={"world_sizes": [1], "seeds": [0, 1, 2], "scaling": "strong", "recipes": ["fast"]},
        protocol={"kind": "benchmark", "iterations": 240, "eval_period_iterations": 60, "target_box_ap": 30},
        reference_rows=[{"name": "published", "world_size": 8, "mlperf_seconds": 1200, "images_per_second": 700}],
        tracking={"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    )
    run_dir = make_run(folder / "run", experiment)
    events = (run_dir / FILE_NAME).read_text().splitlines(keepends=True)
    (run_dir / FILE_NAME).write_text("".join(events[:-1]))  # without its end
    printed = io.StringIO()
    _, tracked = close_run(experiment, run_dir, "FINISHED", "", Console(file=printed, width=400))
    assert tracked
    result = ExperimentResult.model_validate_json((run_dir / "results.json").read_text())
    return Published(run_dir, result, printed.getvalue(), str(experiment.tracking.uri))


def test_another_task_is_scored_but_not_comparable(done: Published) -> None:
    benchmark = done.result.benchmark
    assert benchmark and benchmark.score_minutes and benchmark.images_per_second and benchmark.cost_to_target
    assert (benchmark.division, benchmark.convergence, benchmark.failed_rules) == ("open", None, {})
    assert [reason.split(",")[0].split(" on ")[0] for reason in benchmark.reasons] == [
        "3 logs of 3 runs", "another task than Mask R-CNN R50-FPN",
    ]  # fmt: skip


def test_table_and_report_show_the_verdict(done: Published) -> None:
    report = [(done.folder / name).read_text() for name in ("report.html", "report.md")]
    for text in (done.printed, *report):
        assert "not comparable with MLPerf" in text and "score 0." in text


def test_mlflow_has_one_summary_above_the_trials(done: Published) -> None:
    client, tracker = MlflowClient(done.store), Tracker(done.folder, done.store)
    runs = client.search_runs([str(tracker.experiment_id())])
    (summary,) = (each for each in runs if each.data.tags["kind"] == "benchmark")
    below = [each for each in runs if each.data.tags.get("mlflow.parentRunId") == summary.info.run_id]
    assert len(below) == 3 and {each.data.tags["kind"] for each in below} == {"trial"}
    benchmark = done.result.benchmark
    assert benchmark
    for name in ("score_minutes", "images_per_second", "cost_to_target"):
        assert summary.data.metrics[f"benchmark/{name}"] == pytest.approx(getattr(benchmark, name))
    assert summary.data.tags["verdict"].startswith("not comparable with MLPerf's closed division")
    assert (summary.data.tags["device_name"], summary.data.tags["recipe"]) == ("Test CPU", "fast")
    assert "mlperf" in {file.path for file in client.list_artifacts(summary.info.run_id)}
    rows = client.search_runs([str(tracker.experiment_id())], "tags.kind != 'trial' AND tags.kind != 'experiment'")
    assert {each.data.tags["kind"] for each in rows} == {"benchmark", "reference"}
    (published,) = (each for each in rows if each.data.tags["kind"] == "reference")
    assert published.data.metrics["benchmark/score_minutes"] == 20
    assert published.data.metrics["benchmark/images_per_second"] == 700
    (done.folder / "tracking.json").unlink()
    assert tracker.sync(), "tracked again from its start"
    assert len(client.get_metric_history(summary.info.run_id, "benchmark/score_minutes")) == 1
