"""From an experiment to its trials: which there are, and each one's batch, learning rate and iterations.

Scaling to a world size is detectron2's own rule (`DefaultTrainer.auto_scale_workers`), applied only here: the worker
is given a finished schedule.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from orchestrator.data.layout import Split, coco_layout
from orchestrator.experiment.detectron_config import default_values, model_value, zoo_path
from orchestrator.experiment.spec import Data, Experiment, SpecError
from trainers.contract.plan import DatasetPlan, Scaling, SolverPlan, TrialPlan
from trainers.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

ZOO_WORLD_SIZE = 8
"""GPUs that the model zoo's batch sizes and learning rates are written for (detectron2, MODEL_ZOO.md)."""

COCO2017_TRAIN_IMAGES = 117_266
"""Images of COCO 2017's training set that have at least one object: what detectron2 trains on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hardware:
    """What the cluster offers, as far as plans depend on it."""

    num_gpus: int = 0
    num_cpus: int = 1

    @classmethod
    def local(cls) -> Hardware:
        """What this machine offers."""
        import pynvml

        try:
            pynvml.nvmlInit()
            num_gpus = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError:
            num_gpus = 0
        return cls(num_gpus, os.cpu_count() or 1)


def generated_root(experiment: Experiment) -> Path:
    """Folder of the generated data set: shared by all runs of the same parameters, on the same storage as the runs."""
    data = experiment.data.generated
    values = data.model_dump_json() if data else ""
    name = hashlib.sha256(values.encode()).hexdigest()[:12]
    return (Path(experiment.storage.path).expanduser() / ".generated" / name).absolute()


def dataset_plans(data: Data, generated_root: Path) -> tuple[DatasetPlan, DatasetPlan]:
    """Training and validation set of an experiment, with absolute paths; nothing is read."""
    if data.coco is not None:
        pair, name = data.coco, data.coco.name
        train = Split(pair.train_annotations, pair.train_images)
        val = Split(pair.val_annotations, pair.val_images)
    elif data.coco2017:
        root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "coco"
        name, (train, val) = "coco_2017", coco_layout(root)
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

    `num_train_images` (per epoch) is needed where the evaluation period is given in epochs.

    Raises:
        SpecError: A batch does not divide among the workers.
    """
    protocol, trials = experiment.protocol, experiment.trials
    reference = trials.reference_world_size or _integer(experiment, "SOLVER.REFERENCE_WORLD_SIZE") or ZOO_WORLD_SIZE
    batch = _integer(experiment, "SOLVER.IMS_PER_BATCH")
    scale = world_size / reference if scaling == "weak" else 1.0
    if scaling == "weak" and batch % reference:
        raise SpecError(
            f"SOLVER.IMS_PER_BATCH {batch} does not divide by trials.reference_world_size {reference}: "
            "weak scaling keeps a whole batch per worker"
        )
    global_batch = round(batch * scale)
    if global_batch % world_size:
        raise SpecError(
            f"trials.world_sizes: a batch of {global_batch} does not divide among {world_size} workers; "
            f"set model.overrides.SOLVER.IMS_PER_BATCH to a multiple of {world_size}, or take other world sizes"
        )

    def scaled(iterations: int) -> int:
        return round(iterations / scale)

    max_iter = protocol.iterations or _integer(experiment, "SOLVER.MAX_ITER")
    # A throughput trial runs the same iterations at every size, so that the sizes are compared over the same work.
    if protocol.iterations is None or protocol.kind != "throughput":
        max_iter = scaled(max_iter)
    eval_period = 0
    if protocol.eval_period_iterations:
        eval_period = max(1, scaled(protocol.eval_period_iterations))
    elif protocol.eval_period_epochs:
        if not num_train_images:
            raise SpecError("protocol.eval_period_epochs: the number of training images is not known; give iterations")
        eval_period = max(1, round(protocol.eval_period_epochs * num_train_images / global_batch))
    checkpoints = experiment.storage.checkpoint_period_iterations
    if checkpoints is None:
        checkpoints = _integer(experiment, "SOLVER.CHECKPOINT_PERIOD")
    at_end = protocol.evaluate_at_end
    return SolverPlan(
        global_batch_size=global_batch,
        base_lr=_convert(float, experiment, "SOLVER.BASE_LR") * scale,
        max_iter=max_iter,
        steps=_convert(lambda steps: tuple(map(scaled, steps)), experiment, "SOLVER.STEPS"),
        warmup_iters=scaled(_integer(experiment, "SOLVER.WARMUP_ITERS")),
        eval_period=eval_period,
        evaluate_at_end=at_end if at_end is not None else protocol.kind == "time_to_train",
        checkpoint_period=max(1, scaled(checkpoints)) if checkpoints else 0,
    )


def _integer(experiment: Experiment, key: str) -> int:
    return _convert(int, experiment, key)


def _convert(to: Callable[[Any], T], experiment: Experiment, key: str) -> T:
    value = model_value(experiment, key)
    try:
        return to(value)
    except (TypeError, ValueError):
        example = default_values().get(key)
        raise SpecError(f"model.overrides.{key}: {value!r} is not a value for it; one is {example!r}") from None


def _num_train_images(experiment: Experiment, annotations: str) -> int | None:
    data = experiment.data
    if experiment.protocol.eval_period_epochs is None:
        return None
    if data.generated is not None:
        return data.generated.num_train
    if data.coco2017:
        return COCO2017_TRAIN_IMAGES
    try:
        loaded = json.loads(Path(annotations).read_bytes())
        return len({annotation["image_id"] for annotation in loaded["annotations"] if not annotation.get("iscrowd")})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{annotations}: cannot count its images for eval_period_epochs: {error}") from error


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
    train, val = dataset_plans(experiment.data, generated_root)
    num_train_images = _num_train_images(experiment, train.annotations)
    resources, trials, protocol = experiment.resources, experiment.trials, experiment.protocol
    device = resources.device if resources.device != "auto" else ("cuda" if hardware.num_gpus else "cpu")
    cpus = resources.cpus_per_worker
    if cpus is None:
        # 10 CPUs feed one GPU's loaders; more than a node's fair share cannot be reserved.
        cpus = max(1, min(10, hardware.num_cpus // max(hardware.num_gpus, 1))) if device == "cuda" else 1
    loader_workers, most_loader_workers = resources.loader_workers or 0, 0
    if resources.loader_workers is None and device == "cuda":
        loader_workers = _integer(experiment, "DATALOADER.NUM_WORKERS")
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
                config_file=_config_file(experiment.model.config),
                overrides=experiment.model.overrides,
                weights=_weights(experiment.model.weights),
                weights_sha256=experiment.model.weights_sha256,
                train=train,
                val=val,
                num_classes=experiment.data.generated.num_classes if experiment.data.generated else None,
                solver=scaled_solver(experiment, world_size, scaling, num_train_images),
                throughput_warmup_iters=protocol.warmup_iterations,
                target_box_ap=protocol.target_box_ap,
                target_mask_ap=protocol.target_mask_ap,
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
                price_per_accelerator_hour=resources.price_per_accelerator_hour,
            )
        )
    return plans


def under(uri: str, path: str) -> str:
    """A place under a folder's path or URI; a URI's options (`s3://bucket?endpoint_override=…`) stay at its end."""
    folder, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{folder.rstrip('/')}/{path}{mark}{options}"


def _config_file(config: str) -> str:
    """A model zoo name as it is (each node has its own copy), a path made absolute."""
    path = zoo_path(config)
    return config if "model_zoo" in path.parts else str(path)


def _weights(weights: str | None) -> str | None:
    return str(Path(weights).expanduser().absolute()) if weights and "://" not in weights else weights
