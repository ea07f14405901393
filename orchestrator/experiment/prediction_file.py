"""The form of `prediction.json`: what `--predict` asked for, and what its calibration predicts; read by later runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.experiment.paths import local_path
from orchestrator.experiment.reading import flatten
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.files import is_folder
from trainers.contract.plan import Predicted, Scaling, SolverPlan, TrialPlan

FILE_NAME = "prediction.json"
"""In the folder of a run that calibrates a prediction."""

SCHEDULE_KEYS = (
    "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE", "TEST.EVAL_PERIOD",
)  # fmt: skip
"""Keys of detectron2 that change no step but by the batch, which is compared by itself."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class AskedSize(_Record):
    """A size to predict, with the schedule that the experiment has there."""

    world_size: int = Field(ge=1)
    """Workers."""
    global_batch_size: int = Field(ge=1)
    """Images of a step over all workers."""
    base_lr: float
    """Learning rate after its warm-up, by the experiment's own rule."""
    iterations: int = Field(ge=1)
    """Iterations of its schedule."""
    convergence: str
    """What MLPerf's reference convergence points say of the batch: known, between two points, not known to converge."""
    reference_lr: float | None = None
    """Learning rate of those points at this batch; null where they say nothing."""
    epochs_to_target: float | None = None
    """Epochs to box AP 37.7 and mask AP 33.9 by those points; null where they say nothing."""


class SimulatedRun(_Record):
    """SIMULATED: a whole training at a size, with failures and checkpoints; none of it was measured."""

    work_seconds: float
    """Steps without a failure: to the target where that is known, else of the schedule."""
    num_hosts: int
    mtbf_seconds: float
    """Mean time between failures of the whole training."""
    checkpoint_seconds: float
    """Stall of a checkpoint."""
    restart_seconds: float
    """From a failure to the next step."""
    advised_checkpoint_seconds: float
    """Interval of checkpoints that loses the least: sqrt(2 x stall x MTBF) (Young/Daly)."""
    wall_seconds: float
    """Mean over the simulated trainings."""
    wall_seconds_low: float
    """95 % of the simulated trainings took between these two."""
    wall_seconds_high: float
    num_failures: float
    """Mean over the simulated trainings."""
    goodput: float
    """`work_seconds` over the mean wall time, 0–1."""


class PredictedSize(AskedSize):
    """PREDICTED, not measured: one size; the ends of an interval hold 95 % of what the calibration's steps allow."""

    step_seconds: float
    """Mean step."""
    part_seconds: dict[str, float]
    """That step by part: `compute`, `data`, `stragglers` (waiting for the slowest worker), `communication` (what
    computation does not hide)."""
    images_per_second: float
    images_per_second_low: float
    """Lower end of its interval."""
    images_per_second_high: float
    """Upper end of its interval."""
    efficiency: float
    efficiency_low: float
    """Lower end of its interval."""
    efficiency_high: float
    """Upper end of its interval."""
    schedule_seconds: float
    """Steps of the experiment's schedule, without evaluations, checkpoints and start-up."""
    time_to_target_seconds: float | None = None
    time_to_target_seconds_low: float | None = None
    """Lower end of its interval."""
    time_to_target_seconds_high: float | None = None
    """Upper end of its interval."""
    cost: float | None = None
    """Price of the accelerators for the schedule; null without a price."""
    cost_to_target: float | None = None
    simulated: SimulatedRun | None = None
    """With failures; null where the cost of a checkpoint is not known."""


class Prediction(_Record):
    """What was asked for and, once the calibration has ended, what it predicts."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    setup: dict[str, Any]
    """What decides a step, by dotted key: of data, model, trials and resources."""
    recipe: str
    scaling: Scaling
    asked: list[AskedSize]
    mtbf_worker_hours: float | None = None
    """Mean time between failures of one worker and its share of a host, by `faults.mtbf_hours`; null: the default."""
    calibrated_sizes: list[int] = []
    """World sizes that were measured."""
    device: str | None = None
    device_name: str | None = None
    """Model name of the accelerators or processors that were measured."""
    links: str | None = None
    """SIMULATED links, for a person; null where communication is extrapolated from what was measured."""
    worst_relative_error: float | None = None
    """Largest deviation of the model from a step that was measured; no measure of how far a prediction is off."""
    sizes: list[PredictedSize] = []
    """Empty until it was measured, and where it could not be."""
    assumptions: list[str] = []
    """What the predictions rest on, for a person; or why there are none."""


def setup_of(experiment: Experiment) -> dict[str, Any]:
    """What decides the speed of a step, by dotted key; batch and world size are compared apart."""
    model, trials, resources = experiment.model, experiment.trials, experiment.resources
    values = {
        "data": experiment.data.model_dump(mode="json"),
        "model.config": model.config,
        "model.overrides": {key: value for key, value in model.overrides.items() if key not in SCHEDULE_KEYS},
        "trials.switches": trials.switches,
        "trials.accumulate": trials.accumulate,
        "resources.device": resources.device,
        "resources.cpus_per_worker": resources.cpus_per_worker,
        "resources.loader_workers": resources.loader_workers,
    }
    return dict(flatten(values))


def read_prediction(path: Path) -> Prediction:
    """Reads a prediction, from its file or the folder of its run.

    Raises:
        SpecError: It cannot be read, or is none that this version reads.
    """
    path = local_path(path, "prediction")
    path = path / FILE_NAME if is_folder(path) else path
    try:
        return Prediction.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise SpecError(
            f"prediction: {path}: there is none; `python -m orchestrator.run CONFIG --predict 64` makes one in its "
            "run folder, `python -m orchestrator.prediction RUN_FOLDER --sizes 64 --to FILE` from a run that has ended"
        ) from error
    except OSError as error:
        raise SpecError(f"prediction: {path}: it cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SpecError(f"prediction: {path}: no prediction that this version reads: {place} {first['msg']}") from error


def prediction_of(experiment: Experiment) -> Prediction | None:
    """The prediction that an experiment is to be compared with; None where it names none.

    Raises:
        SpecError: It cannot be read, was not completed, or is for another setup.
    """
    if experiment.prediction is None:
        return None
    found = read_prediction(Path(experiment.prediction))
    where = f"prediction: {experiment.prediction}"
    if not found.sizes:
        raise SpecError(f"{where}: its calibration has not ended; go on with it: --resume RUN_FOLDER")
    here = setup_of(experiment)
    if differing := sorted(key for key in {**here, **found.setup} if here.get(key) != found.setup.get(key)):
        key = differing[0]
        raise SpecError(
            f"{where}: it is for another setup: {key} is {found.setup.get(key)!r} there and {here.get(key)!r} here; "
            "predict this one with --predict, or set prediction=null"
        )
    return found


def check_used(prediction: Prediction | None, plans: Sequence[TrialPlan]) -> None:
    """Raises SpecError where trials are to be compared with a prediction that has none of them."""
    if prediction is None or not plans or any(plan.predicted for plan in plans):
        return
    known = ", ".join(f"{size.world_size} workers with batch {size.global_batch_size}" for size in prediction.sizes)
    asked = ", ".join(
        f"{plan.world_size} with batch {plan.solver.global_batch_size} ({plan.recipe_name}, {plan.scaling})"
        for plan in plans
    )
    setup = f"({prediction.recipe}, {prediction.scaling})"
    raise SpecError(f"prediction: it is for {known} {setup}, and for none of the trials here: {asked}")


def predicted(
    prediction: Prediction | None, recipe: str, scaling: Scaling, world_size: int, solver: SolverPlan
) -> Predicted | None:
    """What was predicted for a trial; None where nothing was for its recipe, scaling, workers and batch."""
    if prediction is None or (prediction.recipe, prediction.scaling) != (recipe, scaling):
        return None
    same = (world_size, solver.global_batch_size)
    size = next((each for each in prediction.sizes if (each.world_size, each.global_batch_size) == same), None)
    if size is None:
        return None
    return Predicted(
        images_per_second=size.images_per_second,
        low=size.images_per_second_low,
        high=size.images_per_second_high,
        device_name=prediction.device_name or "",
    )
