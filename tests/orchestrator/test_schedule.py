"""Schedules: values that cannot be used are refused, and numbers that are given are those that run."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.preflight.settings import check_settings
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from trainers.contract.plan import SolverPlan, TrialPlan


def plans(experiment: Experiment, hardware: Hardware = Hardware()) -> list[TrialPlan]:  # noqa: B008 - frozen
    return expand(experiment, hardware, "/runs/x", Path("/data"))


SCHEDULE = (
    "IMS_PER_BATCH",
    "MAX_ITER",
    "STEPS",
    "WARMUP_ITERS",
    "CHECKPOINT_PERIOD",
    "BASE_LR",
    "REFERENCE_WORLD_SIZE",
)


@pytest.mark.parametrize("name", SCHEDULE)
@pytest.mark.parametrize(
    "value",
    ["abc", None, "(abc)", [1, "2"], "1e3", "two", -1, [-1], True, 10**20, float("inf"), float("nan"), {"A": 1}],
    ids=repr,
)
def test_a_value_that_the_schedule_cannot_use_is_refused_with_its_key_and_the_value_wanted(
    name: str, value: object
) -> None:
    values = tiny_experiment(storage={}, trials={"world_sizes": [1]})
    values["model"] = {"overrides": {f"SOLVER.{name}": value}}
    wanted = r"not of the type of detectron2's default, .+|out of range: at least \d.*"
    if name == "BASE_LR" and value == "1e3":
        assert plans(parse_experiment(values, "test"))[0].solver.base_lr == 1000.0, "text of a number to detectron2"
        return
    with pytest.raises(
        SpecError, match=f"^model.overrides.SOLVER.{name}: its value .* is ({wanted}). Write a value like .+"
    ):
        plans(parse_experiment(values, "test"))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"STEPS": 3}, r"not of the type of .*, .30000,.\. Write a value like .3.\.$"),
        ({"MAX_ITER": 1000.0}, "not of the type of .*, 40000. Write a value like 1000.$"),
        ({"BASE_LR": 1}, "not of the type of .*, 0.001. Write a value like 1.0.$"),
        ({"STEPS": [6, 4]}, "STEPS .6, 4. of the plan for world size 1 do not ascend"),
        ({"STEPS": [1, 2], "MAX_ITER": 2}, None),
        ({"STEPS": "(2*1, 3)"}, "STEPS: its value '.2.1, 3.' is not of the type"),
        ({"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 1.0}, "BASE_LR_END 1.0 is not between 0 and"),
        ({"LR_SCHEDULER_NAME": "Cosine"}, "Cosine is not one of detectron2's. Take 'WarmupMultiStepLR' or"),
    ],
    ids=str,
)
def test_a_schedule_that_detectron2_could_not_use_is_refused(schedule: dict[str, object], message: str | None) -> None:
    values = tiny_experiment()
    values["model"]["overrides"] = TINY_OVERRIDES | {f"SOLVER.{name}": value for name, value in schedule.items()}
    experiment = parse_experiment(values, "test")
    if message is None:
        assert plans(experiment)[0].solver.steps == (1,), "a step after the last iteration has no effect"
        return
    with pytest.raises(SpecError, match=message):
        plans(experiment)


def solver_of(world_sizes: list[int], overrides: dict[str, object], **changes: object) -> list[SolverPlan]:
    values = tiny_experiment(trials={"world_sizes": world_sizes}, **{"protocol": {}, "storage": {}, **changes})
    values["model"] = {"overrides": overrides}
    return [plan.solver for plan in plans(parse_experiment(values, "test"))]


def test_numbers_that_are_given_are_those_that_run_on_the_smallest_world_size() -> None:
    own = {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.BASE_LR": 0.01, "SOLVER.MAX_ITER": 60, "SOLVER.STEPS": [40]}
    one, two = solver_of([1, 2], own, protocol={"eval_period_iterations": 20})
    assert (one.global_batch_size, one.base_lr, one.max_iter, one.steps, one.eval_period) == (2, 0.01, 60, (40,), 20)
    assert (two.global_batch_size, two.base_lr, two.max_iter, two.steps, two.eval_period) == (4, 0.02, 30, (20,), 10)


def test_numbers_of_the_model_zoo_are_for_eight_workers() -> None:
    (solver,) = solver_of([1], {})
    assert (solver.global_batch_size, solver.base_lr, solver.max_iter) == (2, 0.0025, 720_000)
    (solver,) = solver_of([1], {"SOLVER.MAX_ITER": 60}, storage={"checkpoint_period_iterations": 30})
    assert (solver.global_batch_size, solver.max_iter, solver.warmup_iters) == (2, 60, 1000)
    assert solver.checkpoint_period == 30
    (solver,) = solver_of([1], {"SOLVER.BASE_LR": 0.005})
    assert (solver.global_batch_size, solver.base_lr, solver.max_iter) == (2, 0.005, 720_000)


def test_a_period_that_sets_itself_begins_with_a_window_at_every_world_size() -> None:
    values = tiny_experiment(trials={"world_sizes": [1, 2]}, storage={"checkpoint_period": "auto"})
    planned = plans(parse_experiment({**values, "log_period_iterations": 7, "faults": {"mtbf_hours": 5}}, "test"))
    assert [(p.solver.checkpoint_period, p.solver.auto_checkpoints, p.mtbf_hours) for p in planned] == [
        (7, True, 5.0)
    ] * 2  # fmt: skip
    (fixed,) = solver_of([1], {}, storage={"checkpoint_period_iterations": 30})
    assert (fixed.checkpoint_period, fixed.auto_checkpoints) == (30, False)


def test_a_period_that_sets_itself_replaces_one_that_is_given_in_a_key() -> None:
    values = tiny_experiment(storage={"checkpoint_period": "auto"})
    values["model"]["overrides"] = {**values["model"]["overrides"], "SOLVER.CHECKPOINT_PERIOD": 3}
    (finding,) = (each for each in check_settings(parse_experiment(values, "test")) if each.level == "error")
    assert (finding.code, finding.id) == ("config_replaced", "SOLVER.CHECKPOINT_PERIOD")
    assert "storage.checkpoint_period is 'auto' and replaces it" in finding.what


@pytest.mark.parametrize("kind", ["throughput", "time_to_train"])
@pytest.mark.parametrize("reference", [None, 8])
def test_the_iterations_of_the_protocol_are_those_of_every_trial(kind: str, reference: int | None) -> None:
    protocol = {"kind": kind, "iterations": 60, "eval_period_iterations": 20}
    trials = {"world_sizes": [1, 8], "reference_world_size": reference}
    values = tiny_experiment(model={}, trials=trials, protocol=protocol, storage={})
    solvers = [plan.solver for plan in plans(parse_experiment(values, "test"))]
    assert [(each.max_iter, each.eval_period, each.global_batch_size) for each in solvers] == [
        (60, 20, 2),
        (60, 20, 16),
    ]


def test_a_batch_that_does_not_divide_among_the_workers_it_is_for_names_both_ways_out() -> None:
    with pytest.raises(SpecError, match=r"3 does not divide among the 2 .*reference_world_size, or trials.scaling="):
        solver_of([2], {"SOLVER.IMS_PER_BATCH": 3})


def test_a_world_size_that_leaves_no_iteration_is_refused() -> None:
    with pytest.raises(SpecError, match=r"MAX_ITER is 0 in the plan for world size 32: .* take smaller world sizes"):
        solver_of([1, 32], {"SOLVER.MAX_ITER": 8, "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"})


def test_loader_processes_that_the_config_gives_are_those_that_run() -> None:
    values = tiny_experiment()
    values["model"] = {"overrides": TINY_OVERRIDES | {"DATALOADER.NUM_WORKERS": 3}}
    for hardware in (Hardware(), Hardware(num_gpus=1, num_cpus=16)):
        (plan,) = plans(parse_experiment({**values, "resources": {}}, "test"), hardware)
        assert (plan.loader_workers, plan.most_loader_workers) == (3, 0)


def test_a_step_at_the_end_of_the_schedule_is_left_out_at_every_world_size() -> None:
    values = tiny_experiment(storage={}, trials={"world_sizes": [1]}, protocol={"iterations": 60})
    values["model"] = {"overrides": {"SOLVER.STEPS": [30, 60]}}
    assert plans(parse_experiment(values, "test"))[0].solver.steps == (30,)
    values |= {"protocol": {}, "trials": {"world_sizes": [1, 2, 4]}}
    values["model"] = {"overrides": {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.MAX_ITER": 81, "SOLVER.STEPS": [40, 81]}}
    assert [plan.solver.steps for plan in plans(parse_experiment(values, "test"))] == [(40,), (20,), (10,)]
