"""A run that is gone on with stays on the device, with the trials and with the data that it was begun with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.drive import Request, plan_trials
from orchestrator.experiment.plan import Hardware, draw_data, expand, generated_root
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import Experiment
from orchestrator.prediction.predict import keep
from orchestrator.preflight.earlier import check_earlier_data
from orchestrator.preflight.local import check_this_machine
from orchestrator.runlog.folder import read_earlier_run
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.commands import run_command
from tests.builders.experiments import tiny_experiment
from tests.builders.predictions import made_prediction
from trainers.contract.events import RunStarted, TrialEnded, TrialStarted
from trainers.contract.plan import TrialPlan

CPU, GPU = Hardware(num_cpus=8), Hardware(num_gpus=1, num_cpus=8)


def made(folder: Path, prediction: Path | None = None, **trials: Any) -> Experiment:
    """Two trials on whatever there is."""
    values = tiny_experiment(
        resources={"device": "auto", "cpus_per_worker": 1},
        storage={"path": str(folder), "checkpoint_period_iterations": 4},
        tracking={"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    )
    values |= {"prediction": str(prediction)} if prediction else {}
    return parse_experiment({**values, "trials": {**values["trials"], "seeds": [0, 1], **trials}}, where="made")


def begin(
    folder: Path, hardware: Hardware, datasets: dict[str, Any] | None = None, num_finished: int = 1, **changes: Any
) -> Path:
    """A run of which so many trials are finished, and no other was begun."""
    experiment, run = made(folder, **changes), folder / "run"
    run.mkdir()
    driver = {"attempt": 0, "rank": -1, "time": 1_790_000_000.0}
    values = {"experiment": experiment.model_dump(mode="json"), "run_id": "tiny/1", "tags": {}}
    Outbox(run / FILE_NAME).append(RunStarted(trial="", **driver, **values, datasets=datasets or {}))
    finish(run, *planned(experiment, hardware, run)[:num_finished])
    return run


def finish(run: Path, *plans: TrialPlan) -> None:
    for plan in plans:
        driver = {"trial": plan.name, "attempt": 0, "rank": -1, "time": 1_790_000_000.0}
        started = TrialStarted(**driver, plan=dataclasses.asdict(plan))
        Outbox(run / FILE_NAME).append(started, TrialEnded(**driver, status="FINISHED", reason=""))


def planned(experiment: Experiment, hardware: Hardware, run: Path) -> list[TrialPlan]:
    return expand(experiment, hardware, str(run), generated_root(experiment))


def resumed_plans(run: Path, hardware: Hardware, *assignments: str) -> list[TrialPlan]:
    """The trials with which the run would go on."""
    earlier = read_earlier_run(run, assignments)
    request = Request(earlier.experiment, run, earlier, Console(), False, None, False, False)
    return plan_trials(request, hardware)


def resumed(run: Path, hardware: Hardware) -> list[str]:
    return [plan.name for plan in resumed_plans(run, hardware)]


@pytest.mark.parametrize(("before", "now", "device"), [(GPU, CPU, "cuda"), (CPU, GPU, "cpu")])
def test_a_run_stays_on_the_device_that_it_was_begun_on(
    tmp_path: Path, before: Hardware, now: Hardware, device: str
) -> None:
    run = begin(tmp_path, before)
    assert resumed(run, now) == [f"reference-1x{device}-seed{seed}" for seed in (0, 1)]


def test_a_run_without_a_trial_yet_takes_the_device_that_is_there(tmp_path: Path) -> None:
    run = begin(tmp_path, GPU, num_finished=0)
    assert resumed(run, CPU) == ["reference-1xcpu-seed0", "reference-1xcpu-seed1"]


def test_a_trial_that_was_begun_and_is_not_planned_any_more_remains_in_the_run(tmp_path: Path) -> None:
    run = begin(tmp_path, GPU)
    (other,) = planned(made(tmp_path, seeds=[7]), CPU, run)
    other = dataclasses.replace(other, name="named-otherwise", trial_dir=str(run / "named-otherwise"))
    Outbox(run / FILE_NAME).append(
        TrialStarted(trial=other.name, attempt=0, rank=-1, time=1_790_000_001.0, plan=dataclasses.asdict(other))
    )
    assert resumed(run, CPU) == ["reference-1xcuda-seed0", "reference-1xcuda-seed1", "named-otherwise"]


def test_a_run_that_is_compared_with_a_prediction_stays_so(tmp_path: Path) -> None:
    sizes = {"world_sizes": [2], "scaling": "strong"}
    keep(made_prediction(made(tmp_path, **sizes)), tmp_path)
    run = begin(tmp_path, GPU, prediction=tmp_path, **sizes)
    plans = resumed_plans(run, CPU)
    assert [plan.name for plan in plans] == ["reference-2xcuda-seed0", "reference-2xcuda-seed1"]
    assert all(plan.predicted for plan in plans)


def test_trials_of_a_second_device_count_and_change_with_the_others(tmp_path: Path) -> None:
    run = begin(tmp_path, GPU)
    on_gpus, on_cpus = (planned(made(tmp_path), hardware, run) for hardware in (GPU, CPU))
    finish(run, on_cpus[0])  # as version 0.2 went on where there were no GPUs
    assert not read_earlier_run(run).is_complete
    plans = resumed_plans(run, CPU, "storage.keep_checkpoints=9")
    assert [plan.name for plan in plans] == [*(plan.name for plan in on_gpus), on_cpus[0].name]
    assert [plan.keep_checkpoints for plan in plans] == [9, 9, 9]
    finish(run, on_gpus[1])
    assert read_earlier_run(run).is_complete


def test_a_run_that_was_begun_on_gpus_is_refused_where_there_are_none(tmp_path: Path) -> None:
    run = begin(tmp_path, GPU)
    done = run_command("--resume", run, "--preflight", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "trial reference-1xcuda-seed1: asks for 1 GPUs, this machine has 0" in done.stderr
    assert "begin a new run" in done.stderr and "resources.device=cpu" not in done.stderr


def test_a_new_run_without_gpus_can_be_set_to_cpus(tmp_path: Path) -> None:
    experiment = made(tmp_path)
    draw_data(experiment)
    asked = planned(experiment, Hardware(num_gpus=1000, num_cpus=8), tmp_path / "run")
    many = [dataclasses.replace(plan, world_size=1000) for plan in asked]
    hints = [each.hint for each in check_this_machine(experiment, many) if each.code == "too_few_gpus"]
    assert len(hints) == 2 and all(hint.endswith("or set resources.device=cpu") for hint in hints)


def fingerprint(sha256: str, num_images: int) -> dict[str, Any]:
    return {"annotations_sha256": sha256, "num_images": num_images}


def test_a_run_is_not_resumed_on_other_data_than_it_was_begun_on(tmp_path: Path) -> None:
    other = {"train": fingerprint("0" * 64, 999), "val": fingerprint("1" * 64, 77)}
    done = run_command("--resume", begin(tmp_path, CPU, other), "--preflight", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    for part, images in (("train", "16 images instead of 999"), ("val", "4 images instead of 77")):
        (line,) = [line for line in done.stderr.splitlines() if f"begun with another {part} set" in line]
        assert line.startswith("error [other_data]") and images in line


@pytest.mark.parametrize(
    ("known", "found", "num_finished", "refused"),
    [
        ({"train": fingerprint("a", 3)}, {"train": fingerprint("b", 3)}, 1, ["train"]),
        ({"train": fingerprint("a", 3)}, {"train": fingerprint("a", 3), "val": fingerprint("c", 3)}, 1, []),
        ({"train": fingerprint("a", 3)}, {}, 1, []),
        ({}, {"train": fingerprint("b", 3)}, 1, []),
        ({"train": fingerprint("a", 3)}, {"train": fingerprint("b", 3)}, 2, []),
    ],
    ids=["same number of other images", "no record of val", "cannot be read", "no record", "nothing left to train"],
)
def test_only_data_that_are_known_to_be_others_are_refused_where_something_is_left_to_train(
    tmp_path: Path, known: dict[str, Any], found: dict[str, Any], num_finished: int, refused: list[str]
) -> None:
    run = begin(tmp_path, CPU, known, num_finished)
    plans = planned(made(tmp_path), CPU, run)
    findings = check_earlier_data(read_earlier_run(run), plans, found)
    assert [(each.level, each.code) for each in findings] == [("error", "other_data")] * len(refused)
    assert [each.id for each in findings] == refused


def test_another_validation_set_is_refused_only_where_a_trial_that_is_left_evaluates(tmp_path: Path) -> None:
    run = begin(tmp_path, CPU, {"val": fingerprint("a", 3)})
    earlier, now = read_earlier_run(run), {"val": fingerprint("b", 3)}
    done, left = planned(made(tmp_path), CPU, run)
    for period, at_end, refused in ((0, False, 0), (4, False, 1), (0, True, 1)):
        solver = dataclasses.replace(left.solver, eval_period=period, evaluate_at_end=at_end)
        plans = [done, dataclasses.replace(left, solver=solver)]
        assert len(check_earlier_data(earlier, plans, now)) == refused


def test_the_first_record_of_the_data_counts(tmp_path: Path) -> None:
    run = begin(tmp_path, CPU)
    started = read_earlier_run(run).started
    later = [{"train": fingerprint("a", 3)}, {"train": fingerprint("b", 3), "val": fingerprint("c", 3)}]
    for attempt, datasets in enumerate(later, start=1):
        Outbox(run / FILE_NAME).append(dataclasses.replace(started, attempt=attempt, datasets=datasets))
    assert read_earlier_run(run).datasets == {"train": fingerprint("a", 3), "val": fingerprint("c", 3)}
