"""Checks that what was asked for is what ran: experiment, plans, detectron2's config, learning rates, data sets."""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.bundle.contents import BundledRun
from orchestrator.data.checks import OFFICIAL_COUNTS
from orchestrator.experiment.detectron_config import evaluate, printed_values
from orchestrator.experiment.environment import package_hashes
from orchestrator.experiment.spec import Experiment
from orchestrator.files import file_sha256
from orchestrator.findings import FindingList
from orchestrator.runlog.outbox import FILE_NAME
from trainers.contract.events import LoopStarted, StepsDone
from trainers.contract.plan import SolverPlan, TrialPlan

RATE_TOLERANCE = 1e-4
"""Relative; fvcore computes the schedule from shares of it."""

MAX_DRAWN_PIXELS = 100_000_000
"""A generated data set of up to so many pixels is drawn again: some ten seconds."""

PROTOCOL = (
    *("target_box_ap", "target_mask_ap", "metric", "target", "validation_loss"),
    *("patience", "min_improvement"),
)
"""Fields that a plan takes over from the protocol."""

DRAWN_WITH = ("numpy", "pycocotools", "opencv-python-headless")
"""Packages that decide a generated data set's annotations."""


def check_trial(run: BundledRun, plan: TrialPlan, findings: FindingList) -> None:
    """Checks a trial's plan against the experiment, and detectron2's config and learning rates against the plan."""
    place = f"{run.name}/{FILE_NAME}"
    started = run.started
    if started is not None:
        for what in _not_asked(Experiment.model_validate(started.experiment), plan):
            findings.error("settings_differ", place, plan.name, what, "The experiment says what was asked for")
    loops = [e for e in run.of(plan.name) if isinstance(e, LoopStarted) and e.config_yaml]
    for loop in loops:
        config = printed_values(loop.config_yaml.splitlines())
        for what in _not_in_config(plan, config):
            findings.error("settings_differ", place, plan.name, what, "The config of the worker is what ran")
    if loops:
        _check_rates(run, plan, printed_values(loops[0].config_yaml.splitlines()), findings)


def _not_asked(experiment: Experiment, plan: TrialPlan) -> Iterator[str]:
    """What of a plan the experiment does not say."""
    protocol, model = experiment.protocol, experiment.model
    pairs = {
        "experiment": (plan.experiment, experiment.name),
        "overrides": (plan.overrides, model.overrides),
        "weights_sha256": (plan.weights_sha256, model.weights_sha256),
        "stop_at_target": (plan.stop_at_target, protocol.on_target == "stop"),
        "accumulate": (plan.accumulate, experiment.trials.accumulate),
        **{name: (getattr(plan, name), getattr(protocol, name)) for name in PROTOCOL},
        "throughput_warmup_iters": (plan.throughput_warmup_iters, protocol.warmup_iterations),
        "max_iter": (plan.solver.max_iter, protocol.iterations or plan.solver.max_iter),
        **{f"recipe.{k}": (getattr(plan.recipe, k, None), v) for k, v in experiment.trials.switches.items()},
    }
    for name, (planned, asked) in pairs.items():
        if planned != asked and _plain(planned) != _plain(asked):
            yield f"its plan has {name} {planned!r:.100}, the experiment {asked!r:.100}"


def _not_in_config(plan: TrialPlan, config: dict[str, str]) -> Iterator[str]:
    """What of a plan the config of its workers does not have."""
    solver = plan.solver
    values: dict[str, Any] = {
        **{key: value for key, value in plan.overrides.items() if isinstance(value, str | int | float)},
        "SOLVER.BASE_LR": solver.base_lr,
        "SOLVER.MAX_ITER": solver.max_iter,
        "SOLVER.STEPS": solver.steps,
        "SOLVER.WARMUP_ITERS": solver.warmup_iters,
        "SOLVER.IMS_PER_BATCH": solver.global_batch_size,
        "TEST.EVAL_PERIOD": solver.eval_period,
        "SEED": plan.seed,
        "DATASETS.TRAIN": (plan.train.name,),
        "DATASETS.TEST": (plan.val.name,),
    }
    for key, value in values.items():
        if key in plan.overrides and key.startswith(("SOLVER.", "TEST.EVAL_PERIOD")) and value == plan.overrides[key]:
            continue  # the schedule is the plan's, which scales it
        found = config.get(key)
        if found is not None and _plain(evaluate(found)) != _plain(evaluate(value)):
            yield f"its plan has {key} {value!r:.100}, the config of its workers {found:.100}"


def _plain(value: Any) -> Any:
    """A value as it can be compared: a sequence of numbers and a text of them are the same to detectron2."""
    if isinstance(value, list | tuple):
        return _plain(value[0]) if len(value) == 1 else tuple(_plain(each) for each in value)
    return float(value) if isinstance(value, int | float) else value


def _check_rates(run: BundledRun, plan: TrialPlan, config: dict[str, str], findings: FindingList) -> None:
    """Compares the learning rate of every window's last step with the schedule."""
    kind = tuple(config.get(f"SOLVER.{name}") for name in ("LR_SCHEDULER_NAME", "WARMUP_METHOD", "RESCALE_INTERVAL"))
    if kind != ("WarmupMultiStepLR", "linear", "false"):
        what = f"the schedule {kind[0]} is not recomputed"
        findings.warning("rates_unchecked", f"{run.name}/{FILE_NAME}", plan.name, what, "Compare the curves by eye")
        return
    factor, gamma = (float(config.get(f"SOLVER.{name}", "nan")) for name in ("WARMUP_FACTOR", "GAMMA"))
    for event in run.of(plan.name):
        if isinstance(event, StepsDone) and event.learning_rate is not None:
            rate = _rate(plan.solver, event.iteration - 1, factor, gamma)
            if not abs(event.learning_rate - rate) <= RATE_TOLERANCE * rate:
                what = f"the learning rate at iteration {event.iteration} is {event.learning_rate:.6g}"
                hint = f"The plan's schedule has {rate:.6g} there"
                findings.error("rate_differs", f"{run.name}/{FILE_NAME}", plan.name, what, hint)
                return


def _rate(solver: SolverPlan, iteration: int, warmup_factor: float, gamma: float) -> float:
    """The learning rate of a step, counted from 0, by detectron2's WarmupMultiStepLR with linear warm-up (fvcore)."""
    drops, warmup = (
        [step for step in solver.steps if step <= solver.max_iter],
        min(solver.warmup_iters, solver.max_iter),
    )
    if iteration >= warmup:
        return solver.base_lr * gamma ** bisect_right(drops, iteration)
    start, end = solver.base_lr * warmup_factor, solver.base_lr * gamma ** bisect_right(drops, warmup)
    return start + (end - start) * iteration / warmup


def check_data(run: BundledRun, findings: FindingList) -> None:
    """Checks the fingerprints of the data sets against everything else that is known of them."""
    place, started = f"{run.name}/{FILE_NAME}", run.started
    if started is None:
        return
    if {"train", "val"} - started.datasets.keys():
        what = "no fingerprint of its data sets was recorded"
        findings.warning("data_unchecked", place, "", what, "Runs of older versions have none")
        return
    for part, field in (("train", "num_train_images"), ("val", "num_val_images")):
        known = started.datasets[part]["num_images"]
        for event in run.events:
            number = getattr(event, field) if isinstance(event, LoopStarted) else None
            if number is not None and (number > known if part == "train" else number != known):
                what = f"its workers read {number} images of the {part} set, whose fingerprint has {known}"
                findings.error("data_differ", place, event.trial, what, "It is another data set")
                break
    data = Experiment.model_validate(started.experiment).data
    if data.coco2017:
        for part, (images, _) in zip(("train", "val"), OFFICIAL_COUNTS.values(), strict=True):
            if started.datasets[part]["num_images"] != images:
                what = f"the {part} set has {started.datasets[part]['num_images']:,} images, COCO 2017's {images:,}"
                findings.error("data_differ", place, part, what, "It is another data set")
    if data.generated is not None:
        _draw_again(run, data.generated.model_dump(), findings)


def _draw_again(run: BundledRun, parameters: dict[str, Any], findings: FindingList) -> None:
    """Draws a generated data set again, where the packages are those of the run, and compares its annotations."""
    from orchestrator.data.generate import generate

    assert run.started is not None
    place, recorded, here = f"{run.name}/{FILE_NAME}", run.started.packages, package_hashes(DRAWN_WITH)
    pixels = (parameters["num_train"] + parameters["num_val"]) * parameters["size"] ** 2
    other = [name for name in DRAWN_WITH if recorded.get(name) != here.get(name)]
    if other or pixels > MAX_DRAWN_PIXELS:
        reason = f"its packages are not those of this machine: {', '.join(other)}" if other else "it is too large"
        what = f"the generated data set was not drawn again: {reason}"
        findings.warning("data_unchecked", place, "", what, "Install the versions of environment.json")
        return
    with tempfile.TemporaryDirectory(prefix="bundle-") as folder:
        drawn = generate(Path(folder, "data"), **parameters)
        for part, split in zip(("train", "val"), drawn, strict=True):
            if file_sha256(split.annotations) != run.started.datasets[part]["annotations_sha256"]:
                what = "its annotations are not those that the experiment generates"
                findings.error("data_differ", place, part, what, "It is another data set")


def same_data(runs: list[BundledRun], findings: FindingList) -> None:
    """Checks that all runs of a bundle were made on the same data sets."""
    known = [run for run in runs if run.started is not None and run.started.datasets]
    for run in known[1:]:
        if run.started and known[0].started and run.started.datasets != known[0].started.datasets:
            what = f"its data sets are not those of {known[0].name}"
            findings.warning("data_differ", f"{run.name}/{FILE_NAME}", "", what, "Their figures are not comparable")
