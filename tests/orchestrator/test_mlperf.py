"""A trial's lines in the form of MLPerf, against MLPerf's own checker."""

import json
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.experiment.detectron_config import model_value
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import load_experiment
from orchestrator.experiment.spec import DEFAULT_CONFIG
from orchestrator.figures.trial import trial_result
from orchestrator.replay.record import replay
from orchestrator.report.mlperf import division_of, failed_rules, mllog_text, write_mllog
from tests.builders.commands import run_command
from tests.builders.logs import whole_run
from tests.builders.trials import CONFIG_YAML, TrialBuilder, plan, trained
from trainers.contract.events import LoopStarted
from trainers.contract.plan import DatasetPlan


def _text(made: TrialBuilder, **options: Any) -> str:
    return mllog_text(made.trial, made.events, trial_result(made.trial, made.events), **options)


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in text.splitlines()]


def _times(text: str, key: str) -> list[float]:
    return [line["time_ms"] / 1000 - 1_700_000_000 for line in _lines(text) if line["key"] == key]


def _coco(**fields: Any) -> TrialBuilder:
    return trained(val=DatasetPlan("coco_2017_val", "", ""), target_box_ap=37.7, target_mask_ap=33.9, **fields)


def test_a_run_of_the_closed_divisions_task_passes_the_checker_whole():
    text = _text(_coco())
    assert [line["value"] for line in _lines(text) if line["key"] == "submission_division"] == ["closed"]
    assert failed_rules(text) == []


def test_mlperfs_clock_runs_from_the_first_batch_to_the_scored_evaluation():
    text = _text(trained())
    assert _times(text, "init_start") == [10] and _times(text, "init_stop") == [14]
    assert _times(text, "run_start") == [14] and _times(text, "run_stop") == [27]
    (stop,) = [line for line in _lines(text) if line["key"] == "run_stop"]
    assert stop["metadata"]["status"] == "success"
    assert stop["time_ms"] / 1000 - _lines(text)[0]["time_ms"] / 1000 == 17


def test_ap_is_between_0_and_1_there():
    values = [line["value"] for line in _lines(_text(trained())) if line["key"] == "eval_accuracy"]
    assert values == [{"BBOX": 0.51, "SEGM": 0.4}, {"BBOX": 0.55, "SEGM": 0.46}]


def test_what_a_run_does_after_its_target_is_not_on_the_clock():
    text = _text(trained(target_box_ap=30.0, target_mask_ap=30.0))
    assert _times(text, "run_stop") == [20] and len(_times(text, "eval_accuracy")) == 1


def test_a_run_that_missed_its_target_is_aborted_and_only_that_rule_fails():
    made = trained(val=DatasetPlan("coco_2017_val", "", ""), target_box_ap=90.0, target_mask_ap=90.0)
    made.events = [e for e in made.events if e.kind != "evaluated"]
    made.evaluated(27.0, 8, 20.0, 18.0)
    made.events.sort(key=lambda e: e.time)
    text = _text(made)
    (stop,) = [line for line in _lines(text) if line["key"] == "run_stop"]
    assert stop["metadata"]["status"] == "aborted"
    (rule,) = failed_rules(text)
    assert rule.startswith("Failed checks for eval_accuracy")


def test_a_run_without_evaluation_names_the_missing_keys():
    made = trained()
    made.events = [e for e in made.events if e.kind != "evaluated"]
    rules = failed_rules(_text(made, division="closed"))
    assert rules == ["Required AT_LEAST_ONE occurrence of 'eval_accuracy' but found 0"]


def test_a_restart_in_the_middle_leaves_one_run_and_one_stop():
    made = trained(val=DatasetPlan("coco_2017_val", "", ""), target_box_ap=52.0, target_mask_ap=33.9)
    made.events = [e for e in made.events if e.time < made.epoch + 21]
    made.restarted(22.0, iteration=4)
    made.workers(30.0)
    made.loop(31.0, iteration=4)
    for rank in (0, 1):
        made.steps(35.0, 4, 1.0, 1.0, 1.0, 1.0, rank=rank)
    made.evaluated(37.0, 8, 55.0, 46.0)
    made.finished(37.0, 8)
    made.ended(38.0)
    text = _text(made)
    assert _times(text, "run_start") == [14] and _times(text, "run_stop") == [37]
    assert failed_rules(text) == []


def test_a_trial_that_never_trained_has_no_log(tmp_path):
    made = TrialBuilder(plan())
    made.started()
    made.ended(5.0, "FAILED", "no such data")
    result = trial_result(made.trial, made.events)
    assert write_mllog(made.trial, made.events, result, tmp_path) is None


def test_the_line_says_that_it_is_no_submission():
    values = {line["key"]: line["value"] for line in _lines(_text(trained()))}
    assert "not a submission" in values["submission_org"] and values["submission_status"] == "research"


def test_other_data_or_smaller_targets_are_of_the_open_division():
    assert division_of(plan()) == "open"
    assert division_of(_coco().trial) == "closed"
    assert division_of(plan(val=DatasetPlan("coco_2017_val", "", ""), target_box_ap=30.0)) == "open"


@pytest.fixture(scope="module")
def demo() -> TrialBuilder:
    """The demo's first trial as planned, with a made course of events and the values of its own config."""
    experiment = load_experiment(DEFAULT_CONFIG)
    trial = expand(experiment, Hardware(), "/runs/demo", DEFAULT_CONFIG)[0]
    candidates = model_value(experiment, "MODEL.RPN.POST_NMS_TOPK_TRAIN")
    made = trained(
        val=trial.val, world_size=trial.world_size, target_box_ap=trial.target_box_ap, seed=trial.seed,
        target_mask_ap=45.0, **{f: getattr(trial.solver, f) for f in ("global_batch_size", "base_lr", "steps")},
    )  # fmt: skip
    config = CONFIG_YAML.replace("POST_NMS_TOPK_TRAIN: 1000", f"POST_NMS_TOPK_TRAIN: {candidates}")
    made.events = [replace(e, config_yaml=config) if isinstance(e, LoopStarted) else e for e in made.events]
    return made


def test_the_demo_passes_the_open_divisions_rules_whole(demo):
    assert failed_rules(_text(demo)) == []


def test_of_the_closed_rules_the_demo_breaks_those_of_the_schedule_and_the_proposals_alone(demo):
    # A small model on small images has few proposals a picture, and its rate drops once: it is no submission. Its
    # targets are above the closed division's, on drawn shapes.
    assert sorted(failed_rules(_text(demo, division="closed"))) == [
        "num_image_candidates: is_integer(v['value'] / 1000.0)",
        "opt_learning_rate_decay_steps: len(v['value']) == 2",
    ]


def test_a_foreign_log_gives_mlperfs_lines_by_the_command(tmp_path):
    log = whole_run().write(tmp_path / "log.txt")
    done = run_command(log, "--mllog", "ml.txt", module="orchestrator.replay", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # The made run's rate is 0.01 at batch 4, half of the reference's 0.02: allowed below batch 16.
    assert failed_rules((tmp_path / "ml.txt").read_text()) == []


def test_two_runs_do_not_go_into_one_mlperf_log(tmp_path):
    logs = [whole_run().write(tmp_path / name) for name in ("a.log", "b.log")]
    done = run_command(*logs, "--mllog", "ml.txt", module="orchestrator.replay", cwd=tmp_path)
    assert done.returncode == 2 and "--mllog takes one run" in done.stderr


@pytest.mark.shared
def test_the_seeds_eight_gpu_log_passes_the_checker_whole(shared_data):
    (one,) = replay([shared_data / "seed_logs" / "GPUx8_time2train_ips.log"])
    text = mllog_text(one.plan, one.events, one.result)
    assert failed_rules(text) == []
    values = {line["key"]: line for line in _lines(text)}
    assert (values["run_stop"]["time_ms"] - values["run_start"]["time_ms"]) / 1000 == 22858
