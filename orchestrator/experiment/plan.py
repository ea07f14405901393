"""From an experiment to its trials: which there are, and each one's batch, learning rate and iterations.

Scaling to a world size is detectron2's own rule (`DefaultTrainer.auto_scale_workers`), applied only here: the worker
is given a finished schedule.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from datetime import UTC, datetime
from itertools import pairwise, product
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from orchestrator.data.layout import Split, coco_layout
from orchestrator.experiment.config_keys import usable_value
from orchestrator.experiment.detectron_config import config_for_workers, given_setting
from orchestrator.experiment.epochs import epoch_images
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.gpus import list_gpus
from trainers.contract.plan import DatasetPlan, Scaling, SolverPlan, TrialPlan
from trainers.recipes import RECIPES, Recipe

ZOO_WORLD_SIZE = 8
"""GPUs that the model zoo's batch sizes and learning rates are written for (detectron2, MODEL_ZOO.md)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hardware:
    """What the cluster offers, as far as plans depend on it."""

    num_gpus: int = 0
    num_cpus: int = 1

    @classmethod
    def local(cls) -> Hardware:
        """What this machine offers."""
        return cls(len(list_gpus()), os.cpu_count() or 1)


def new_run_dir(experiment: Experiment, output: Path | None) -> Path:
    """The folder of a run that begins: the given one, else `storage.path`/EXPERIMENT/UTC-TIME."""
    if output is not None:
        return output.expanduser().absolute()
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    return (Path(experiment.storage.path).expanduser() / experiment.name / stamp).absolute()


def generated_root(experiment: Experiment) -> Path:
    """Folder of the generated data set: shared by all runs of the same parameters, on the same storage as the runs."""
    data = experiment.data.generated
    values = data.model_dump_json() if data else ""
    name = hashlib.sha256(values.encode()).hexdigest()[:12]
    return (Path(experiment.storage.path).expanduser() / ".generated" / name).absolute()


def dataset_plans(experiment: Experiment, generated_root: Path) -> tuple[DatasetPlan, DatasetPlan]:
    """Training and validation set of an experiment, with absolute paths; nothing is read."""
    data = experiment.data
    if data.coco is not None:
        pair, name = data.coco, data.coco.name
        train = Split(pair.train_annotations, pair.train_images)
        val = Split(pair.val_annotations, pair.val_images)
    elif data.coco2017:
        root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "coco"
        with_keypoints = usable_value(experiment, "MODEL.KEYPOINT_ON")
        layout = coco_layout(root, "person_keypoints" if with_keypoints else "instances")
        name, (train, val) = "coco_2017", layout
    else:
        name, (train, val) = "generated", coco_layout(generated_root)

    def plan(part: str, split: Split) -> DatasetPlan:
        annotations, images = (str(path.expanduser().absolute()) for path in (split.annotations, split.images))
        return DatasetPlan(f"{name}_{part}", annotations, images)

    return plan("train", train), plan("val", val)


def scaled_solver(
    experiment: Experiment, world_size: int, scaling: Scaling, num_train_images: int | None
) -> SolverPlan:
    """The schedule of one world size, by detectron2's `auto_scale_workers` for weak scaling.

    Where no reference world size is given, numbers of the experiment's own are for the smallest of its world sizes, and
    those of the model zoo for 8; with a batch of its own, all are its own. With `trials.batch_per_worker`, all but
    overrides are for the config's batch. `protocol.iterations` is never scaled. An epoch has `num_train_images`.

    Raises:
        SpecError: A batch does not divide among the workers, or a value of the schedule cannot be used.
    """
    protocol, per_worker = experiment.protocol, experiment.trials.batch_per_worker
    batch = _global_batch(experiment, world_size, scaling)

    def is_own(*names: str) -> bool:
        if per_worker:
            return any(f"SOLVER.{name}" in experiment.model.overrides for name in names)
        return any(_is_own(experiment, f"SOLVER.{name}") for name in (*names, "IMS_PER_BATCH"))

    def scale(own: bool) -> float:
        if per_worker and not own:
            return batch / float(usable_value(experiment, "SOLVER.IMS_PER_BATCH"))
        return world_size / _reference(experiment, own=own) if scaling == "weak" else 1.0

    def iterations(number: int, own: bool) -> int:
        return round(number / scale(own))

    def period(number: int | None) -> int:
        """A period that the experiment gives, 0 for none; it goes with the iterations."""
        scaled = number if protocol.iterations or not number else max(1, iterations(number, own=True))
        return scaled or 0

    own_schedule = protocol.iterations is not None or is_own("MAX_ITER", "STEPS", "WARMUP_ITERS")
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
        checkpoint_period = max(1, iterations(number, is_own("CHECKPOINT_PERIOD"))) if number else 0
    max_iter = protocol.iterations or iterations(usable_value(experiment, "SOLVER.MAX_ITER"), own_schedule)
    steps = (iterations(step, own_schedule) for step in usable_value(experiment, "SOLVER.STEPS"))
    at_end = protocol.kind != "throughput" if protocol.evaluate_at_end is None else protocol.evaluate_at_end
    solver = SolverPlan(
        global_batch_size=batch,
        base_lr=usable_value(experiment, "SOLVER.BASE_LR") * scale(is_own("BASE_LR")),
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


def _is_own(experiment: Experiment, key: str) -> bool:
    """Whether the experiment, or a YAML file of its own, gives a key; not the model zoo."""
    setting = given_setting(experiment, key)
    return setting is not None and not setting.in_zoo


def _reference(experiment: Experiment, *, own: bool) -> int:
    """The number of workers that a number is for: `own` ones of the experiment, or the model zoo's."""
    trials = experiment.trials
    given: int | None = trials.reference_world_size or usable_value(experiment, "SOLVER.REFERENCE_WORLD_SIZE")
    return given or (min(trials.world_sizes) if own else ZOO_WORLD_SIZE)


def _global_batch(experiment: Experiment, world_size: int, scaling: Scaling) -> int:
    if experiment.trials.batch_per_worker:
        return experiment.trials.batch_per_worker * world_size
    batch: int = usable_value(experiment, "SOLVER.IMS_PER_BATCH")
    if scaling == "weak":
        reference = _reference(experiment, own=_is_own(experiment, "SOLVER.IMS_PER_BATCH"))
        if batch % reference:
            raise SpecError(
                f"SOLVER.IMS_PER_BATCH {batch} does not divide among the {reference} workers that it is for, and weak "
                "scaling keeps a whole batch per worker; set trials.reference_world_size, or trials.scaling=strong"
            )
        batch = batch // reference * world_size
    if batch % world_size:
        raise SpecError(
            f"trials.world_sizes: a batch of {batch} does not divide among {world_size} workers; "
            f"set model.overrides.SOLVER.IMS_PER_BATCH to a multiple of {world_size}, or take other world sizes"
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


def _recipe(experiment: Experiment, name: str) -> Recipe:
    switches = experiment.trials.switches
    known = {field.name for field in dataclasses.fields(Recipe)}
    if unknown := sorted(set(switches) - known):
        raise SpecError(f"trials.switches: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    try:
        return TypeAdapter(Recipe).validate_python({**dataclasses.asdict(RECIPES[name]), **switches})
    except ValidationError as error:
        found = error.errors()[0]
        raise SpecError(f"trials.switches.{found['loc'][0]}: {found['msg']} (given: {found['input']!r})") from error


def expand(experiment: Experiment, hardware: Hardware, run_dir: str, generated_root: Path) -> list[TrialPlan]:
    """The trials of an experiment, in the order they are run: by recipe, world size and seed.

    `hardware` decides `device: auto` and the CPUs per worker. `run_dir` is absolute.

    Raises:
        SpecError: A trial cannot be planned (a batch that does not divide, an unknown switch or model config).
    """
    train, val = dataset_plans(experiment, generated_root)
    num_train_images = epoch_images(experiment, train.annotations)
    resources, trials, protocol = experiment.resources, experiment.trials, experiment.protocol
    device = resources.device if resources.device != "auto" else ("cuda" if hardware.num_gpus else "cpu")
    cpus = resources.cpus_per_worker
    if cpus is None:
        # 10 CPUs feed one GPU's loaders; more than a node's fair share cannot be reserved.
        cpus = max(1, min(10, hardware.num_cpus // max(hardware.num_gpus, 1))) if device == "cuda" else 1
    loader_workers, most_loader_workers = resources.loader_workers or 0, 0
    if resources.loader_workers is None and _is_own(experiment, "DATALOADER.NUM_WORKERS"):
        loader_workers = usable_value(experiment, "DATALOADER.NUM_WORKERS")
    elif resources.loader_workers is None and device == "cuda":
        loader_workers = usable_value(experiment, "DATALOADER.NUM_WORKERS")
        most_loader_workers = cpus - 1  # one is for the training process itself
    scalings: tuple[Scaling, ...] = ("weak", "strong") if trials.scaling == "both" else (trials.scaling,)
    checkpoints = experiment.storage.checkpoints
    checkpoint_root = under(checkpoints, f"{experiment.name}/{Path(run_dir).name}") if checkpoints else run_dir
    plans = []
    for recipe, scaling, world_size, seed in product(trials.recipes, scalings, trials.world_sizes, trials.seeds):
        name = f"{recipe}-{world_size}x{device}"
        name += f"-{scaling}" if len(scalings) > 1 else ""
        name += f"-seed{seed}" if len(trials.seeds) > 1 else ""
        plans.append(
            TrialPlan(
                experiment=experiment.name,
                name=name,
                world_size=world_size,
                num_nodes=resources.num_nodes,
                min_workers=resources.min_workers,
                recipe_name=recipe,
                recipe=_recipe(experiment, recipe),
                seed=seed,
                scaling=scaling,
                protocol=protocol.kind,
                config_file=config_for_workers(experiment.model.config),
                overrides=experiment.model.overrides,
                weights=start_weights(experiment),
                weights_sha256=experiment.model.weights_sha256,
                train=train,
                val=val,
                num_classes=experiment.data.generated.num_classes if experiment.data.generated else None,
                solver=scaled_solver(experiment, world_size, scaling, num_train_images),
                throughput_warmup_iters=protocol.warmup_iterations,
                target_box_ap=protocol.target_box_ap,
                target_mask_ap=protocol.target_mask_ap,
                metric=protocol.metric,
                target=protocol.target,
                validation_loss=protocol.validation_loss,
                stop_at_target=protocol.on_target == "stop",
                device=device,
                cpus_per_worker=cpus,
                loader_workers=loader_workers,
                most_loader_workers=most_loader_workers,
                log_period=experiment.log_period_iterations,
                trial_dir=f"{run_dir}/{name}",
                checkpoint_dir=under(checkpoint_root, f"{name}/checkpoints"),
                keep_checkpoints=experiment.storage.keep_checkpoints,
                timeouts=experiment.faults.timeouts.model_dump(),
                survive_storage=experiment.faults.on_storage_failure == "continue",
                mtbf_hours=experiment.faults.mtbf_hours,
                price_per_accelerator_hour=resources.price_per_accelerator_hour,
                price_per_kwh=resources.price_per_kwh,
                carbon_grams_per_kwh=resources.carbon_grams_per_kwh,
            )
        )
    return plans


def under(uri: str, path: str) -> str:
    """A place under a folder's path or URI; a URI's options (`s3://bucket?endpoint_override=…`) stay at its end."""
    folder, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{folder.rstrip('/')}/{path}{mark}{options}"


def start_weights(experiment: Experiment) -> str:
    """Start weights, `model.weights` or else `MODEL.WEIGHTS`: an address or an absolute path; "" for random ones."""
    given = experiment.model.weights
    name: str = usable_value(experiment, "MODEL.WEIGHTS") if given is None else given
    return str(Path(name).expanduser().absolute()) if name and "://" not in name else name
