"""Batches that add up to a step count as workers: in batch, learning rate and schedule, and in what is reported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from orchestrator.experiment.placement import smaller
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import load_experiment, parse_experiment
from orchestrator.experiment.spec import CONFIGS, SpecError
from orchestrator.figures.trial import trial_result
from orchestrator.report.mlperf import mllog_text
from tests.builders.experiments import tiny_experiment
from tests.builders.trials import trained
from trainers.contract.plan import TrialPlan

ZOO = {"config": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"}


def planned(trials: dict[str, Any], **changes: Any) -> list[TrialPlan]:
    values = tiny_experiment(trials=trials, storage={}, **changes)
    return expand(parse_experiment(values, "test"), Hardware(), "/runs/x", Path("/data"))


@pytest.mark.parametrize(
    ("trials", "model", "expected"),
    [
        ({"world_sizes": [1], "accumulate": 8}, ZOO, (2, 16, 0.02, 90000)),
        ({"world_sizes": [4], "accumulate": 2}, ZOO, (2, 16, 0.02, 90000)),
        ({"world_sizes": [1], "accumulate": 4}, ZOO, (2, 8, 0.01, 180000)),
        ({"world_sizes": [2], "accumulate": 2, "batch_per_worker": 8}, ZOO, (8, 32, 0.04, 45000)),
        ({"world_sizes": [1], "accumulate": 2, "reference_world_size": 1}, ZOO, (16, 32, 0.04, 45000)),
        ({"world_sizes": [2], "accumulate": 4, "scaling": "strong"}, ZOO, (2, 16, 0.02, 90000)),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_worker_counts_as_often_as_it_accumulates(
    trials: dict[str, Any], model: dict[str, Any], expected: tuple[int, int, float, int]
) -> None:
    (plan,) = planned(trials, model=model, protocol={})
    solver = plan.solver
    found = (plan.batch_per_worker, solver.global_batch_size, solver.base_lr, solver.max_iter)
    assert found == pytest.approx(expected) and plan.accumulate == trials["accumulate"]


def test_numbers_of_ones_own_are_those_of_the_smallest_world_size_and_its_batches() -> None:
    model = {"overrides": {"SOLVER.IMS_PER_BATCH": 16, "SOLVER.BASE_LR": 0.1, "SOLVER.MAX_ITER": 800}}
    small, large = planned({"world_sizes": [1, 2], "accumulate": 4}, model=model)
    assert (small.batch_per_worker, small.solver.global_batch_size, small.solver.base_lr) == (4, 16, 0.1)
    assert (small.solver.max_iter, small.solver.eval_period) == (800, 4)
    assert (large.batch_per_worker, large.solver.global_batch_size, large.solver.base_lr) == (4, 32, 0.2)
    assert (large.solver.max_iter, large.solver.eval_period) == (400, 2)


def test_the_batch_96_config_of_one_gpu_is_that_of_eight() -> None:
    hardware = Hardware(num_gpus=8, num_cpus=80)
    one, eight = (
        expand(load_experiment(CONFIGS / f"{name}.yaml"), hardware, "/runs/x", Path("/data"))
        for name in ("mlperf_batch96_1gpu", "mlperf_batch96")
    )
    assert one[0].solver == eight[0].solver and one[0].batch_per_worker == eight[0].batch_per_worker == 12
    assert (one[0].world_size, one[0].accumulate, one[0].recipe) == (1, 8, eight[0].recipe)


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ({"world_sizes": [1], "accumulate": 3, "scaling": "strong"}, "4 does not divide among 1 workers x 3 batches"),
        ({"world_sizes": [2], "accumulate": 4, "scaling": "strong"}, "to a multiple of 8"),
        ({"world_sizes": [1], "accumulate": 3}, "4 does not divide among the 3 workers"),
        ({"accumulate": 0}, "greater than or equal to 1"),
        ({"accumulate": 1.5}, "valid integer"),
        ({"accumulate": "many"}, "valid integer"),
        ({"accumulate": 5000}, "less than or equal to 4096"),
    ],
)
def test_batches_that_do_not_add_up_are_refused(trials: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        planned(trials)


def test_fewer_workers_keep_whole_batches() -> None:
    (plan,) = planned({"world_sizes": [4], "accumulate": 3, "batch_per_worker": 1}, model=ZOO)
    assert [each.world_size for each in smaller(dataclasses.replace(plan, min_workers=1))] == [2, 1]


def test_record_and_mlperfs_log_have_the_batches_of_a_step() -> None:
    made = trained(global_batch_size=8, accumulate=2)
    result = trial_result(made.trial, made.events)
    assert (result.accumulate, result.global_batch_size) == (2, 8)
    text = mllog_text(made.trial, made.events, result)
    assert '"gradient_accumulation_steps", "value": 2' in text and '"global_batch_size", "value": 8' in text
