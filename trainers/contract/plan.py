"""The plan of a trial, which the driver passes to its workers. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trainers.recipes import Recipe

Device = Literal["cuda", "cpu"]
Scaling = Literal["weak", "strong"]
ProtocolKind = Literal["throughput", "time_to_train", "benchmark"]

PREFETCHED_BATCHES = 4
"""Batches that each loader process holds ready."""

ADDED_CONFIG_KEYS: dict[str, Any] = {"DATALOADER.RANDOM_SUBSET_RATIO": 1.0}
"""Keys that detectron2 reads and its defaults lack, with their defaults here."""

SAMPLES_FILE = "sample_detections.json"
"""In a trial's folder, of versions before `evaluation_details`: `image_ids` of a few validation images, and their
`detections` of the last evaluation in COCO's results format."""


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """One COCO-format data set by its name in detectron2; absolute paths."""

    name: str
    annotations: str
    images: str
    """Folder that `file_name` is relative to."""


@dataclass(frozen=True, slots=True)
class SolverPlan:
    """The schedule after scaling to the trial's world size."""

    global_batch_size: int
    """Images per iteration over all workers; divisible by the world size times `TrialPlan.batches_per_step`."""
    base_lr: float
    """Learning rate after warm-up."""
    max_iter: int
    steps: tuple[int, ...]
    """Iterations at which the learning rate drops."""
    warmup_iters: int
    eval_period: int
    """Iterations between evaluations; 0 for none before the end."""
    evaluate_at_end: bool
    """Whether the last iteration is followed by an evaluation."""
    checkpoint_period: int
    """Iterations between checkpoints; 0 for none."""
    auto_checkpoints: bool = False
    """Whether the workers set another period after each checkpoint, so that `checkpoint_period` is the first one."""

    @property
    def evaluates(self) -> bool:
        """Whether there is an evaluation, however late."""
        return self.eval_period > 0 or self.evaluate_at_end


@dataclass(frozen=True, slots=True)
class Predicted:
    """The throughput that was predicted for a trial before it ran, with the ends of its 95 % interval."""

    images_per_second: float
    low: float
    high: float
    device_name: str
    """Model name of the device that it was predicted for; "" where that is not known."""


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """Everything a worker needs to train one trial, and everything `--dry-run` prints of it."""

    experiment: str
    name: str
    """Name of the trial, unique within the run and fit for a path."""
    world_size: int
    """Number of workers, one per accelerator."""
    num_nodes: int | None
    """Number of hosts the workers spread over equally; None for the fewest that take them equally."""
    recipe_name: str
    recipe: Recipe
    """Its switches, with the experiment's own changes applied."""
    seed: int
    """Seed of the weights, the training order and the augmentations."""
    scaling: Scaling
    """`weak` (batch per worker fixed) or `strong` (global batch fixed)."""
    protocol: ProtocolKind
    config_file: str
    """Model zoo config, relative to detectron2's `configs/`, or an absolute path to a YAML file."""
    overrides: dict[str, Any]
    """detectron2 keys (dotted) and their values, applied over the config file."""
    weights: str | None
    """`detectron2://…`, an absolute path, or "" for random weights; None keeps the config file's."""
    weights_sha256: str | None
    """Hash a weight file must have; None for not checked."""
    train: DatasetPlan
    val: DatasetPlan
    num_classes: int | None
    """Number of categories of the data; None keeps the model config's."""
    solver: SolverPlan
    throughput_warmup_iters: int
    """Iterations left out of the throughput window."""
    target_box_ap: float | None
    """Box AP (and mask AP) at which the run counts as trained; None for no target."""
    target_mask_ap: float | None
    stop_at_target: bool
    """Whether training ends when all targets are met."""
    device: Device
    cpus_per_worker: int
    """CPUs a worker reserves; its threads are pinned to that number."""
    loader_workers: int
    """Loader processes per worker at the start; 0 loads in the training process."""
    log_period: int
    """Iterations between progress events, also the window of device synchronisation."""
    trial_dir: str
    """Absolute path of the trial's folder: logs, detections; the same for all workers."""
    checkpoint_dir: str
    """Absolute path or URI of the folder for its checkpoints."""
    keep_checkpoints: int
    """How many of the newest checkpoints are kept besides the best."""
    timeouts: dict[str, float] = field(default_factory=dict)
    """Seconds a section may take before its worker counts as stuck; `heartbeat`: without a sign of life."""
    survive_storage: bool = False
    """Whether training goes on when a checkpoint cannot be written."""
    mtbf_hours: float | None = None
    """Mean time between failures of the trial, given or measured; None where there is neither."""
    price_per_accelerator_hour: float | None = None
    """What one accelerator costs for an hour, in any currency; None where not known."""
    price_per_kwh: float | None = None
    """What a kilowatt-hour costs, in any currency; None where not known."""
    carbon_grams_per_kwh: float | None = None
    """Grams of CO2 equivalent for a kilowatt-hour; None where not known."""
    min_workers: int | None = None
    """Fewest workers it may run with while there is no room for all; None for no fewer than `world_size`."""
    resize_after_seconds: float = 60.0
    """How long room must be missing before it runs with fewer workers, and be there before it takes more."""
    own_nodes: bool = False
    """Whether it takes no node that another trial uses, since trials may be under way at the same time."""
    excluded_hosts: tuple[str, ...] = ()
    """Addresses of nodes that it does not use, since preflight found them slow."""
    most_loader_workers: int = 0
    """As many as it may become once the speed of loader and step is known; 0 to leave it."""
    evaluation_gpus: int = 0
    """GPUs that are reserved for evaluations, one for each process that evaluates; 0 for none."""
    evaluation_cpus: int = 0
    """CPUs that are reserved for the process that evaluates on them; 0 for none."""
    metric: str = "box_ap"
    """What the best checkpoint is chosen by: one of `contract.targets`' metrics."""
    target: float | None = None
    """Value of the metric at which the run counts as trained, besides the other targets; None for no target."""
    validation_loss: bool = False
    """Whether evaluations compute the losses on the validation images."""
    accumulate: int = 1
    """Batches of a planned worker in a step, whose gradients add up."""
    patience: int | None = None
    """Evaluations without an improvement of the metric after which training ends; None for never."""
    min_improvement: float = 0.0
    """By how much an evaluation must be better than the last improvement to be one."""
    ema_decay: float | None = None
    """What an update keeps of the average of the weights; None for no average."""
    ema_both: bool = False
    """Whether the weights are evaluated, too, where there is an average of them."""
    keep_best: bool = False
    """Whether each evaluation is followed by a checkpoint, so that the best is among them."""
    predicted: Predicted | None = None
    """What was predicted for it; None for nothing."""
    stands_for: int = 1
    """Planned workers whose batches each worker trains: more than 1 while the trial runs with fewer than planned."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialPlan:
        """A plan from what `dataclasses.asdict` made of it, also after a round trip through JSON."""
        solver = values["solver"]
        return cls(
            **{
                **values,
                "recipe": Recipe(**values["recipe"]),
                "train": DatasetPlan(**values["train"]),
                "val": DatasetPlan(**values["val"]),
                "excluded_hosts": tuple(values.get("excluded_hosts", ())),
                "solver": SolverPlan(**{**solver, "steps": tuple(solver["steps"])}),
                "predicted": Predicted(**values["predicted"]) if values.get("predicted") else None,
            }
        )

    @property
    def evaluates_concurrently(self) -> bool:
        """Whether evaluations before the last are made in other processes, while training goes on."""
        return bool(self.recipe.overlapped_evaluation or self.evaluation_gpus or self.evaluation_cpus)

    @property
    def planned_workers(self) -> int:
        """Workers that the trial was planned with: they decide which images come in which batch, however many run."""
        return self.world_size * self.stands_for

    @property
    def batches_per_step(self) -> int:
        """Forward passes of one worker in a step."""
        return self.accumulate * self.stands_for

    @property
    def batch_per_worker(self) -> int:
        """Images of one forward pass on one worker; a step has `batches_per_step` of them."""
        return self.solver.global_batch_size // (self.world_size * self.batches_per_step)
