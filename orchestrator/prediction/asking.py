"""What `--predict` asks for: the sizes, their schedules, and the short experiment that calibrates the prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.experiment.epochs import epoch_images
from orchestrator.experiment.plan import Hardware, dataset_plans, generated_root
from orchestrator.experiment.prediction_file import (
    FILE_NAME,
    SCHEDULE_KEYS,
    AskedSize,
    Prediction,
    read_prediction,
    setup_of,
)
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.schedule import scaled_solver
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.prediction.convergence import Convergence, convergence, knows, largest_known_batch
from trainers.contract.plan import SolverPlan

DEFAULT_SIZES = (1, 2, 8)
"""World sizes of a calibration, as far as there is room: one worker alone, the fewest that wait, a full host."""

NUM_STEPS = 60
"""Steps of a calibration's trial after its warm-up."""

MAX_WORLD_SIZE = 1_000_000
"""Larger ones are a slip."""


def parse_sizes(text: str, option: str) -> list[int]:
    """World sizes from an option's text, `64,128`, in ascending order.

    Raises:
        SpecError: It holds anything but whole numbers from 1, or one of them twice.
    """
    sizes = []
    for word in text.split(","):
        if not (word.strip().isascii() and word.strip().isdigit()) or not 1 <= int(word) <= MAX_WORLD_SIZE:
            example = f"{option} 64,128"
            what = "numbers of workers from 1, separated by commas"
            raise SpecError(f"{option} {text}: {word.strip()!r} is none of {what}, as in {example}")
        sizes.append(int(word))
    if len(set(sizes)) < len(sizes):
        raise SpecError(f"{option} {text}: it holds a number twice")
    return sorted(sizes)


def ask(experiment: Experiment, sizes: Sequence[int], option: str = "--predict") -> Prediction:
    """What is asked for: the schedule of each size by the experiment's own rule, and what is known of its batch.

    Args:
        experiment: What is predicted.
        sizes: World sizes to predict.
        option: Where they were given, for messages.

    Raises:
        SpecError: The experiment is not of one setup, or has no schedule at a size.
    """
    trials, faults = experiment.trials, experiment.faults
    several: dict[str, Sequence[object]] = {"trials.seeds": trials.seeds, "trials.recipes": trials.recipes}
    for field, values in several.items():
        if len(values) > 1:
            hint = f"--set {field}=[{values[0]}]"
            hint += " --set protocol.kind=time_to_train" if experiment.protocol.kind == "benchmark" else ""
            raise SpecError(f"--predict: a prediction is of one setup, and {field} has {len(values)}: add {hint}")
    if trials.scaling == "both":
        raise SpecError(
            "--predict: a prediction is of one setup, and trials.scaling is both: add --set trials.scaling=weak"
        )
    unknown = knows(experiment)
    asked = []
    for size in sizes:
        solver = _solver(experiment, size, option)
        known = Convergence(unknown) if unknown else _convergence(solver.global_batch_size, size)
        asked.append(
            AskedSize(
                world_size=size,
                global_batch_size=solver.global_batch_size,
                base_lr=solver.base_lr,
                iterations=solver.max_iter,
                convergence=known.text,
                reference_lr=known.base_lr,
                epochs_to_target=known.epochs,
            )
        )
    return Prediction(
        setup=setup_of(experiment),
        recipe=trials.recipes[0],
        scaling=trials.scaling,
        asked=asked,
        mtbf_worker_hours=faults.mtbf_hours * max(trials.world_sizes) if faults.mtbf_hours else None,
    )


def calibration(
    experiment: Experiment, asked: Prediction, given: Sequence[int] | None, hardware: Hardware | None
) -> Experiment:
    """The experiment that calibrates a prediction: a few short trials for speed at small sizes, nothing evaluated.

    Args:
        experiment: What is predicted.
        asked: What was asked for.
        given: World sizes of the trials; None for those of `DEFAULT_SIZES` for which there is room.
        hardware: What there is room on; None where it is not known yet.

    Raises:
        SpecError: Fewer than two sizes remain, one is not below all that are asked for, or the experiment has no
            schedule there.
    """
    smallest = min(each.world_size for each in asked.asked)
    sizes = list(given) if given else _sizes_with_room(experiment, smallest, hardware)
    if len(sizes) < 2:
        why = "it takes two smaller sizes to tell computation from communication"
        if smallest <= DEFAULT_SIZES[1]:
            raise SpecError(f"--predict {smallest}: {why}; ask for {DEFAULT_SIZES[1] + 1} workers or more")
        if given:
            raise SpecError(f"--calibrate {sizes[0]}: {why}; give two or more, such as --calibrate 1,2")
        raise SpecError(
            f"--predict: {why}, and here is room for {', '.join(map(str, sizes)) or 'none'} of "
            f"{', '.join(map(str, DEFAULT_SIZES))}; choose them with --calibrate"
        )
    if smallest <= sizes[-1]:
        raise SpecError(
            f"--predict {smallest}: the calibration measures up to {sizes[-1]} workers, and only larger sizes are "
            "predicted; choose smaller ones with --calibrate"
        )
    first = _solver(experiment, sizes[0], "--calibrate")
    values: dict[str, Any] = experiment.model_dump(mode="json")
    overrides = {key: value for key, value in experiment.model.overrides.items() if key not in SCHEDULE_KEYS}
    if "SOLVER.WARMUP_ITERS" in experiment.model.overrides:
        overrides["SOLVER.WARMUP_ITERS"] = first.warmup_iters
    overrides |= {
        "SOLVER.IMS_PER_BATCH": first.global_batch_size, "SOLVER.BASE_LR": first.base_lr,
        "SOLVER.MAX_ITER": first.max_iter,
    }  # fmt: skip
    warmup = experiment.protocol.warmup_iterations
    predicted = ", ".join(str(each.world_size) for each in asked.asked)
    values |= {
        "description": f"Calibration of a prediction for {predicted} workers. {experiment.description}".rstrip(),
        "model": {**values["model"], "overrides": overrides},
        "prediction": None,
        "protocol": {
            "kind": "throughput", "iterations": warmup + NUM_STEPS, "warmup_iterations": warmup,
            "evaluate_at_end": False,
        },
    }  # fmt: skip
    reference = sizes[0] * experiment.trials.accumulate if asked.scaling == "weak" else None
    values["trials"] |= {"world_sizes": sizes, "batch_per_worker": None, "reference_world_size": reference}
    values["trials"] |= {"concurrent": 1, "allow_shared_nodes": False}
    values["resources"] |= {"evaluation": None, "min_workers": None, "resize_after_seconds": None}
    values["faults"]["standby"] = "auto"
    values["tracking"]["log_model"] = False
    values["storage"] |= {"checkpoint_period_iterations": 0, "checkpoint_period": None}
    return parse_experiment(values, where="--predict")


def asked_lines(prediction: Prediction) -> Iterator[str]:
    """What is to be predicted, before anything was measured: a line for each size."""
    for size in prediction.asked:
        yield (
            f"To predict: {size.world_size} workers, batch {size.global_batch_size}, LR {size.base_lr:g}, "
            f"{size.iterations:,} iterations; {size.convergence}"
        )


def ask_of_run(folder: Path, values: dict[str, Any], sizes: Sequence[int]) -> Prediction:
    """What is asked of a run that has ended: of its first recipe, kind of scaling and seed.

    Args:
        folder: The run's folder; where it is a calibration's, its `prediction.json` has the schedule.
        values: The run's experiment.
        sizes: World sizes to predict.

    Raises:
        SpecError: As `ask`.
    """
    trials = values["trials"]
    first = {name: trials[name][:1] for name in ("seeds", "recipes")}
    if trials["scaling"] == "both":
        first["scaling"] = "weak"
    protocol = {**values["protocol"], "kind": "time_to_train"}  # it takes one seed, and each setting of all kinds
    experiment = parse_experiment({**values, "trials": {**trials, **first}, "protocol": protocol}, where=str(folder))
    if not (folder / FILE_NAME).exists():
        return ask(experiment, sizes, "--sizes")
    earlier = read_prediction(folder)
    whole = protocol | {"iterations": None}
    experiment = parse_experiment({**experiment.model_dump(mode="json"), "protocol": whole}, where=str(folder))
    known = earlier.asked[0]
    if _solver(experiment, known.world_size, "--sizes").max_iter != known.iterations:  # the same at every size
        whole |= {"iterations": known.iterations}
        experiment = parse_experiment({**experiment.model_dump(mode="json"), "protocol": whole}, where=str(folder))
    return earlier.model_copy(update={"asked": ask(experiment, sizes, "--sizes").asked})


def _sizes_with_room(experiment: Experiment, smallest: int, hardware: Hardware | None) -> list[int]:
    """The sizes of a calibration that fit on the hardware, lie below all that are asked for, and can be planned."""
    sizes = [size for size in DEFAULT_SIZES if size < smallest and _can_be_planned(experiment, size)]
    resources = experiment.resources
    if hardware is None or (resources.device == "cuda" and not hardware.num_gpus):
        return sizes  # preflight says if there is no room
    on_gpus = resources.device == "cuda" or (resources.device == "auto" and hardware.num_gpus > 0)
    room = hardware.num_gpus if on_gpus else hardware.num_cpus // (resources.cpus_per_worker or 1)
    return [size for size in sizes if size <= room]


def _can_be_planned(experiment: Experiment, size: int) -> bool:
    try:
        _solver(experiment, size, "--calibrate")
    except SpecError:
        return False
    return True


def _solver(experiment: Experiment, size: int, option: str) -> SolverPlan:
    scaling = experiment.trials.scaling
    assert scaling != "both"
    train, _ = dataset_plans(experiment, generated_root(experiment))
    try:
        return scaled_solver(experiment, size, scaling, epoch_images(experiment, train.annotations))
    except SpecError as error:
        raise SpecError(f"{option} {size}: {error}") from error


def _convergence(batch: int, world_size: int) -> Convergence:
    """What is known of a batch, and beyond what is known the batch that would be."""
    known = convergence(batch)
    if known.epochs is not None:
        return known
    largest = largest_known_batch(world_size)
    if largest is None:
        return Convergence(f"{known.text}, less than an image for each of {world_size} workers")
    return Convergence(
        f"{known.text}; the largest for {world_size} workers is {largest} ({largest // world_size} each)"
    )
