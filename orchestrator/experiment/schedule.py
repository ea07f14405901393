"""From an experiment to the batch, learning rate and iterations of a world size.

Scaling is detectron2's own rule (`DefaultTrainer.auto_scale_workers`), applied only here: the worker is given a
finished schedule. A worker that adds up the gradients of several batches counts as so many workers.
"""

from __future__ import annotations

from itertools import pairwise

from orchestrator.experiment.config_keys import usable_value
from orchestrator.experiment.detectron_config import given_setting
from orchestrator.experiment.spec import Experiment, SpecError
from trainers.contract.plan import Scaling, SolverPlan

ZOO_WORLD_SIZE = 8
"""GPUs that the model zoo's batch sizes and learning rates are written for (detectron2, MODEL_ZOO.md)."""


def scaled_solver(
    experiment: Experiment, world_size: int, scaling: Scaling, num_train_images: int | None
) -> SolverPlan:
    """The schedule of one world size, by detectron2's `auto_scale_workers` for weak scaling.

    Where no reference world size is given, numbers of the experiment's own are for the smallest of its world sizes with
    its `trials.accumulate`, and those of the model zoo for 8; with a batch of its own, all are its own. With
    `trials.batch_per_worker`, all but overrides are for the config's batch. `protocol.iterations` is never scaled. An
    epoch has `num_train_images`.

    Raises:
        SpecError: A batch does not divide among the workers, or a value of the schedule cannot be used.
    """
    protocol, per_worker = experiment.protocol, experiment.trials.batch_per_worker
    workers = world_size * experiment.trials.accumulate
    batch = _global_batch(experiment, world_size, scaling)

    def any_own(*names: str) -> bool:
        if per_worker:
            return any(f"SOLVER.{name}" in experiment.model.overrides for name in names)
        return any(is_own(experiment, f"SOLVER.{name}") for name in (*names, "IMS_PER_BATCH"))

    def scale(own: bool) -> float:
        if per_worker and not own:
            return batch / float(usable_value(experiment, "SOLVER.IMS_PER_BATCH"))
        return workers / _reference(experiment, own=own) if scaling == "weak" else 1.0

    def iterations(number: int, own: bool) -> int:
        return round(number / scale(own))

    def period(number: int | None) -> int:
        """A period that the experiment gives, 0 for none; it goes with the iterations."""
        scaled = number if protocol.iterations or not number else max(1, iterations(number, own=True))
        return scaled or 0

    own_schedule = protocol.iterations is not None or any_own("MAX_ITER", "STEPS", "WARMUP_ITERS")
    eval_period = period(protocol.eval_period_iterations)
    if protocol.eval_period_epochs:
        if not num_train_images:
            raise SpecError("protocol.eval_period_epochs: the number of training images is not known; give iterations")
        eval_period = max(1, round(protocol.eval_period_epochs * num_train_images / batch))
    auto_checkpoints = experiment.storage.checkpoint_period == "auto"
    checkpoint_period = period(experiment.storage.checkpoint_period_iterations)
    if auto_checkpoints:
        checkpoint_period = experiment.log_period_iterations  # the first one is there to measure its cost
    elif experiment.storage.checkpoint_period_iterations is None:
        number: int = usable_value(experiment, "SOLVER.CHECKPOINT_PERIOD")
        checkpoint_period = max(1, iterations(number, any_own("CHECKPOINT_PERIOD"))) if number else 0
    max_iter = protocol.iterations or iterations(usable_value(experiment, "SOLVER.MAX_ITER"), own_schedule)
    steps = (iterations(step, own_schedule) for step in usable_value(experiment, "SOLVER.STEPS"))
    at_end = protocol.kind != "throughput" if protocol.evaluate_at_end is None else protocol.evaluate_at_end
    solver = SolverPlan(
        global_batch_size=batch,
        base_lr=usable_value(experiment, "SOLVER.BASE_LR") * scale(any_own("BASE_LR")),
        max_iter=max_iter,
        steps=tuple(step for step in steps if step != max_iter),  # one at the end would change nothing
        warmup_iters=iterations(usable_value(experiment, "SOLVER.WARMUP_ITERS"), own_schedule),
        eval_period=eval_period,
        evaluate_at_end=at_end,
        checkpoint_period=checkpoint_period,
        auto_checkpoints=auto_checkpoints,
    )
    _check_schedule(experiment, solver, world_size)
    return solver


def is_own(experiment: Experiment, key: str) -> bool:
    """Whether the experiment, or a YAML file of its own, gives a key; not the model zoo."""
    setting = given_setting(experiment, key)
    return setting is not None and not setting.in_zoo


def _reference(experiment: Experiment, *, own: bool) -> int:
    """The workers, each as often as it accumulates, that a number is for: an `own` one, or the model zoo's."""
    trials = experiment.trials
    given: int | None = trials.reference_world_size or usable_value(experiment, "SOLVER.REFERENCE_WORLD_SIZE")
    return given or (min(trials.world_sizes) * trials.accumulate if own else ZOO_WORLD_SIZE)


def _global_batch(experiment: Experiment, world_size: int, scaling: Scaling) -> int:
    trials = experiment.trials
    workers, each, others = world_size * trials.accumulate, "", ""
    if trials.accumulate > 1:
        each, others = f" x {trials.accumulate} batches", " or another trials.accumulate"
    if trials.batch_per_worker:
        return trials.batch_per_worker * workers
    batch: int = usable_value(experiment, "SOLVER.IMS_PER_BATCH")
    if scaling == "weak":
        reference = _reference(experiment, own=is_own(experiment, "SOLVER.IMS_PER_BATCH"))
        if batch % reference:
            raise SpecError(
                f"SOLVER.IMS_PER_BATCH {batch} does not divide among the {reference} workers that it is for, and weak "
                "scaling keeps a whole batch per worker; set trials.reference_world_size, or trials.scaling=strong"
            )
        batch = batch // reference * workers
    if batch % workers:
        raise SpecError(
            f"trials.world_sizes: a batch of {batch} does not divide among {world_size} workers{each}; "
            f"set model.overrides.SOLVER.IMS_PER_BATCH to a multiple of {workers}, or take other world sizes{others}"
        )
    return batch


def _check_schedule(experiment: Experiment, solver: SolverPlan, world_size: int) -> None:
    """Refuses what detectron2's schedulers refuse once they are built, after minutes."""
    where = f"the plan for world size {world_size}"
    if solver.max_iter < 1:
        raise SpecError(f"SOLVER.MAX_ITER is 0 in {where}: scaled to it, nothing is left; take smaller world sizes")
    scheduler = usable_value(experiment, "SOLVER.LR_SCHEDULER_NAME")
    if scheduler == "WarmupCosineLR":
        end = usable_value(experiment, "SOLVER.BASE_LR_END")
        if not 0 <= end <= solver.base_lr or not solver.base_lr:
            raise SpecError(f"SOLVER.BASE_LR_END {end} is not between 0 and the learning rate, {solver.base_lr}")
    elif scheduler == "WarmupMultiStepLR":
        steps = [step for step in solver.steps if step < solver.max_iter]
        if any(first >= second for first, second in pairwise((0, *steps))):
            raise SpecError(f"SOLVER.STEPS {solver.steps} of {where} do not ascend from 1")
