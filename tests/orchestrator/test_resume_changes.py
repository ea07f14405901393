"""What of a run may change when it is gone on with, and the room that its own checkpoints take already."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.preflight.local import storage_bytes
from orchestrator.runlog.changes import PERIODS, PLANNED, change, with_changes
from orchestrator.runlog.folder import read_earlier_run
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.experiments import tiny_experiment
from tests.builders.run_folder import make_run
from trainers.contract.events import RunStarted
from trainers.contract.plan import SolverPlan, TrialPlan

EXPERIMENT = Experiment.model_validate(tiny_experiment())


def planned(experiment: Experiment) -> TrialPlan:
    (trial,) = expand(experiment, Hardware(num_cpus=2), "/runs/r", Path("/data"))
    return trial


@pytest.mark.parametrize(
    ("assignment", "field"),
    [
        ("storage.keep_checkpoints=1", "keep_checkpoints"),
        ("storage.checkpoint_period_iterations=2", "solver"),
        ("faults.timeouts.step=77", "timeouts"),
        ("faults.timeouts={step: 77}", "timeouts"),
        ("faults.on_storage_failure=continue", "survive_storage"),
        ("faults.max_failures=9", None),
        ("resources.cpus_per_worker=2", "cpus_per_worker"),
        ("resources.loader_workers=3", "loader_workers"),
        ("resources.evaluation={cpus: 1}", "evaluation_cpus"),
        ("resources.num_nodes=1", "num_nodes"),
        ("resources.min_workers=1", "min_workers"),
        ("resources.price_per_accelerator_hour=2.5", "price_per_accelerator_hour"),
        ("resources.price_per_kwh=0.3", "price_per_kwh"),
        ("resources.carbon_grams_per_kwh=380", "carbon_grams_per_kwh"),
        ("trials.concurrent=auto", "own_nodes"),
        ("tracking.uri=sqlite:///other.db", None),
        ("tracking.log_model=true", None),
    ],
)
def test_what_changes_reaches_a_trial_that_was_begun_and_nothing_else_does(assignment: str, field: str | None) -> None:
    begun = dataclasses.replace(planned(EXPERIMENT), seed=7, cpus_per_worker=5)
    changed, changes = change(EXPERIMENT, [assignment])
    assert list(changes) == [key for key in changes if key.startswith(assignment.split("=")[0])] and changes
    now, plan = planned(changed), with_changes(begun, planned(changed), changes)
    others = {f.name for f in dataclasses.fields(plan) if getattr(plan, f.name) != getattr(begun, f.name)}
    assert others == ({field} if field else set())
    if field:
        assert getattr(plan, field) == getattr(now, field)


@pytest.mark.parametrize(
    ("before", "assignments", "period"),
    [
        ({}, ["storage.checkpoint_period=auto"], (2, True)),
        ({"checkpoint_period": "auto"}, ["storage.checkpoint_period=null"], (5000, False)),
        (
            {"checkpoint_period_iterations": 4},
            ["storage={checkpoint_period_iterations: null, checkpoint_period: auto}"],
            (2, True),
        ),
    ],
)
def test_a_trial_that_was_begun_takes_another_kind_of_checkpoint_period(
    before: dict[str, object], assignments: list[str], period: tuple[int, bool]
) -> None:
    experiment = Experiment.model_validate(tiny_experiment(storage=before))
    changed, changes = change(experiment, assignments)
    begun = planned(experiment)
    plan = with_changes(begun, planned(changed), changes)
    solver = dataclasses.replace(begun.solver, checkpoint_period=period[0], auto_checkpoints=period[1])
    assert plan == dataclasses.replace(begun, solver=solver)


def test_every_field_that_a_key_changes_is_one_of_a_plan() -> None:
    fields = {field.name for field in dataclasses.fields(TrialPlan)}
    assert {field for made in PLANNED.values() for field in made} <= fields
    assert set(PERIODS) <= {field.name for field in dataclasses.fields(SolverPlan)}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "trials.seeds=[1]",
            "trials.seeds: it may not change .*: storage, tracking, faults, resources, trials.concurrent and trials",
        ),
        ("model.overrides.SOLVER.BASE_LR=1", "SOLVER.BASE_LR: it may not change"),
        ("name=other", "--set name: it may not change"),
        ("storage.path=/elsewhere", "--set storage.path: .* the run stays in its folder"),
        ("storage={path: /elsewhere}", "--set storage.path: .* the run stays in its folder"),
        ("storage.checkpoints=/elsewhere", "--set storage.checkpoints: .* a link"),
        ("resources.device=cuda", "--set resources.device: .* named after it"),
        ("storage.keep_checkpoint=1", "storage.keep_checkpoint: unknown key; did you mean 'keep_checkpoints'"),
        ("storage.keep_checkpoints=0", "storage.keep_checkpoints: .* greater than or equal to 1"),
        ("storage", "write it as KEY=VALUE"),
    ],
)
def test_what_may_not_change_is_refused_by_name(assignment: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        change(EXPERIMENT, [assignment])


def test_a_change_is_in_the_log_for_every_later_start(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = read_earlier_run(run, ["storage.keep_checkpoints=1", "tracking.uri=http://me:secret@mlflow:5000"])
    assert first.new_changes == {"storage.keep_checkpoints": 1, "tracking.uri": "http://mlflow:5000"}
    start = dataclasses.replace(
        first.started, attempt=1, experiment=first.experiment.model_dump(mode="json"), changes=first.new_changes
    )
    Outbox(run / FILE_NAME).append(start)
    later = read_earlier_run(run, ["faults.max_failures=7"])
    assert later.experiment.storage.keep_checkpoints == 1 and later.experiment.faults.max_failures == 7
    assert later.new_changes == {"faults.max_failures": 7}
    assert later.changes == {**first.new_changes, **later.new_changes}
    old = [event for event, _ in Outbox(run / FILE_NAME).read() if isinstance(event, RunStarted)]
    assert old[0].changes == {}


def test_checkpoints_that_a_run_has_need_no_room_again(tmp_path: Path) -> None:
    trial = dataclasses.replace(planned(EXPERIMENT), checkpoint_dir=str(tmp_path / "checkpoints"))
    needed = storage_bytes(EXPERIMENT, [trial])
    one = needed / 4  # two that are kept, the best, and one being written
    folder = tmp_path / "checkpoints" / "iter_0000004"
    folder.mkdir(parents=True)
    with (folder / "state-0.pt").open("wb") as file:
        file.truncate(int(2 * one))
    assert storage_bytes(EXPERIMENT, [trial]) == pytest.approx(2 * one, abs=1)
    with (folder / "state-0.pt").open("wb") as file:
        file.truncate(int(9 * one))
    assert storage_bytes(EXPERIMENT, [trial]) == pytest.approx(one), "one is written before another is deleted"
    assert storage_bytes(EXPERIMENT, [dataclasses.replace(trial, checkpoint_dir="s3://bucket/t")]) == needed
