"""From an experiment to its trials: which there are, on what they run, and where they leave what."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from orchestrator.data.layout import Split, coco_layout
from orchestrator.experiment.config_keys import usable_value
from orchestrator.experiment.detectron_config import config_for_workers
from orchestrator.experiment.elastic import check_resizing, resize_fields
from orchestrator.experiment.epochs import epoch_images
from orchestrator.experiment.evaluation_resources import evaluation_fields
from orchestrator.experiment.limits import refuse_bools
from orchestrator.experiment.paths import absolute
from orchestrator.experiment.prediction_file import check_used, predicted, prediction_of
from orchestrator.experiment.schedule import is_own, scaled_solver
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.findings import root_cause
from orchestrator.gpus import list_gpus
from trainers.contract.cpus import num_usable_cpus
from trainers.contract.plan import DatasetPlan, Device, Scaling, TrialPlan
from trainers.recipes import RECIPES, Recipe


@dataclasses.dataclass(frozen=True, slots=True)
class Hardware:
    """What the cluster offers, as far as plans depend on it."""

    num_gpus: int = 0
    num_cpus: int = 1
    num_hosts: int = 1

    @classmethod
    def local(cls) -> Hardware:
        """What this machine offers."""
        return cls(len(list_gpus()), num_usable_cpus())


def generated_root(experiment: Experiment) -> Path:
    """Folder of the generated data set: shared by all runs of the same parameters, on the same storage as the runs."""
    data = experiment.data.generated
    values = data.model_dump_json() if data else ""
    name = hashlib.sha256(values.encode()).hexdigest()[:12]
    return absolute(experiment.storage.path, "storage.path") / ".generated" / name


def draw_data(experiment: Experiment) -> None:
    """Draws the generated data set of an experiment that has one, unless it is there already.

    Raises:
        SpecError: It cannot be written below `storage.path`.
    """
    if experiment.data.generated is None:
        return
    from orchestrator.data.generate import generate  # brings OpenCV

    try:
        generate(generated_root(experiment), **experiment.data.generated.model_dump())
    except OSError as error:
        raise SpecError(f"data.generated cannot be drawn below storage.path: {root_cause(error)}") from error


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
        annotations, images = (str(absolute(path, "data")) for path in (split.annotations, split.images))
        return DatasetPlan(f"{name}_{part}", annotations, images)

    return plan("train", train), plan("val", val)


def _recipe(experiment: Experiment, name: str) -> Recipe:
    switches = experiment.trials.switches
    known = {field.name for field in dataclasses.fields(Recipe)}
    if unknown := sorted(set(switches) - known):
        raise SpecError(f"trials.switches: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    kinds = get_type_hints(Recipe)
    for switch, value in switches.items():
        try:
            refuse_bools(value, kinds[switch])
        except ValueError as error:
            raise SpecError(f"trials.switches.{switch}: {error} (given: {value!r})") from error
    try:
        return TypeAdapter(Recipe).validate_python({**dataclasses.asdict(RECIPES[name]), **switches})
    except ValidationError as error:
        found = error.errors()[0]
        raise SpecError(f"trials.switches.{found['loc'][0]}: {found['msg']} (given: {found['input']!r})") from error


def expand(
    experiment: Experiment, hardware: Hardware, run_dir: str, generated_root: Path, device: Device | None = None
) -> list[TrialPlan]:
    """The trials of an experiment, in the order they are run: by recipe, world size and seed.

    `hardware` decides `device: auto`, unless `device` does, and the CPUs per worker. `run_dir` is absolute.

    Raises:
        SpecError: A trial cannot be planned (a batch that does not divide, an unknown switch or model config), or the
            experiment is to be compared with a prediction of another setup.
    """
    prediction = prediction_of(experiment)
    train, val = dataset_plans(experiment, generated_root)
    num_train_images = epoch_images(experiment, train.annotations)
    resources, trials, protocol = experiment.resources, experiment.trials, experiment.protocol
    if device is None:
        device = resources.device if resources.device != "auto" else ("cuda" if hardware.num_gpus else "cpu")
    cpus = resources.cpus_per_worker
    if cpus is None:
        # 10 CPUs feed one GPU's loaders; more than a node's fair share cannot be reserved.
        cpus = max(1, min(10, hardware.num_cpus // max(hardware.num_gpus, 1))) if device == "cuda" else 1
    loader_workers, most_loader_workers = resources.loader_workers or 0, 0
    if resources.loader_workers is None and is_own(experiment, "DATALOADER.NUM_WORKERS"):
        loader_workers = usable_value(experiment, "DATALOADER.NUM_WORKERS")
    elif resources.loader_workers is None and device == "cuda":
        loader_workers = usable_value(experiment, "DATALOADER.NUM_WORKERS")
        most_loader_workers = cpus - 1  # one is for the training process itself
    scalings: tuple[Scaling, ...] = ("weak", "strong") if trials.scaling == "both" else (trials.scaling,)
    checkpoints = _address_or_path(experiment.storage.checkpoints or "", "storage.checkpoints")
    checkpoint_root = under(checkpoints, f"{experiment.name}/{Path(run_dir).name}") if checkpoints else run_dir
    # The largest trial decides for all, so that sizes that are compared evaluate alike.
    alone = hardware.num_hosts == 1 and not trials.allow_shared_nodes
    spare_cpus = hardware.num_cpus - max(trials.world_sizes) * cpus if alone else 0
    plans = []
    for recipe, scaling, world_size, seed in product(trials.recipes, scalings, trials.world_sizes, trials.seeds):
        name = f"{recipe}-{world_size}x{device}"
        name += f"-{scaling}" if len(scalings) > 1 else ""
        name += f"-seed{seed}" if len(trials.seeds) > 1 else ""
        solver = scaled_solver(experiment, world_size, scaling, num_train_images)
        plans.append(
            TrialPlan(
                experiment=experiment.name,
                name=name,
                world_size=world_size,
                num_nodes=resources.num_nodes,
                **resize_fields(resources),
                own_nodes=trials.concurrent != 1 and not trials.allow_shared_nodes,
                recipe_name=recipe,
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
                solver=solver,
                **_evaluation_fields(experiment, recipe, solver, device, spare_cpus, cpus),
                throughput_warmup_iters=protocol.warmup_iterations,
                target_box_ap=protocol.target_box_ap,
                target_mask_ap=protocol.target_mask_ap,
                metric=protocol.metric,
                target=protocol.target,
                validation_loss=protocol.validation_loss,
                accumulate=trials.accumulate,
                patience=protocol.patience,
                min_improvement=protocol.min_improvement,
                ema_decay=protocol.ema.decay if protocol.ema else None,
                ema_both=protocol.ema is not None and protocol.ema.evaluate == "both",
                keep_best=protocol.patience is not None or experiment.tracking.log_model == "best",
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
                predicted=predicted(prediction, recipe, scaling, world_size, solver),
            )
        )
    check_resizing(experiment, plans)
    check_used(prediction, plans)
    return plans


def _evaluation_fields(experiment: Experiment, name: str, *given: Any) -> dict[str, Any]:
    reserved, switches, recipe = experiment.resources.evaluation, experiment.trials.switches, _recipe(experiment, name)
    try:
        return evaluation_fields(reserved, switches, recipe, *given)
    except ValueError as error:
        raise SpecError(f"resources.evaluation: {error}") from error


def under(uri: str, path: str) -> str:
    """A place under a folder's path or URI; a URI's options (`s3://bucket?endpoint_override=…`) stay at its end."""
    folder, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{folder.rstrip('/')}/{path}{mark}{options}"


def start_weights(experiment: Experiment) -> str:
    """Start weights, `model.weights` or else `MODEL.WEIGHTS`: an address or an absolute path; "" for random ones."""
    given = experiment.model.weights
    name: str = usable_value(experiment, "MODEL.WEIGHTS") if given is None else given
    return _address_or_path(name, "model.weights")


def _address_or_path(name: str, place: str) -> str:
    is_address = "://" in name and not name.startswith("file:///")
    return name if is_address or not name else str(absolute(name, place))
