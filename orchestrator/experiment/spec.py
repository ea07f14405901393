"""The fields of an experiment file: meaning, unit, allowed values and default of each.

One YAML file is one experiment. The JSON Schema that editors complete from is made of this module (`make schema`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from orchestrator.experiment.data_source import Data
from orchestrator.experiment.evaluation_resources import EvaluationResources
from orchestrator.experiment.part import Name, Part
from orchestrator.experiment.protocol import Protocol
from orchestrator.experiment.trials import Trials
from trainers.contract.events import FailureKind

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEFAULT_CONFIG = CONFIGS / "demo.yaml"

BENCHMARK_SEEDS = 5
"""Runs of a score of Mask R-CNN (MLPerf Training rules, "Benchmark Results")."""

MIN_BENCHMARK_SEEDS = 3
"""Fewer leave no score without the fastest and the slowest."""


class SpecError(ValueError):
    """The experiment file or a `--set` is wrong; the message says what, where and how to fix it."""


class Model(Part):
    """The detector: a model zoo config and changes to it."""

    config: str = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    """A YAML file's path, or a config of detectron2's model zoo: COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml."""
    overrides: dict[str, Any] = Field({})
    """detectron2's own dotted keys and their values, for example `MODEL.RESNETS.DEPTH: 18`. Each is honoured or
    refused (docs/settings.md)."""
    weights: str | None = None
    """Start weights: `detectron2://…`, `https://…` (fetched once), a path, or "" for random ones; null keeps the
    config's."""
    weights_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 that the file must have; null: not checked, unless its name carries one (detectron2's model zoo)."""


class Resources(Part):
    """What the workers run on."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` uses GPUs where the cluster has any."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPUs each worker reserves and computes with; null: 1 without GPUs, else a GPU's share of the CPUs, 10 at most."""
    loader_workers: int | None = Field(None, ge=0)
    """Loader processes per worker; null: `DATALOADER.NUM_WORKERS` where you give it; else 0 on CPUs; on GPUs first the
    model zoo's (4), then as many as the measured speed of mapper and step requires and the worker's CPUs allow."""
    num_nodes: int | None = Field(None, ge=1)
    """Hosts over which the workers of a trial are spread equally; null: the fewest hosts that allow it."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest workers with which a trial may run while there is no room for all, at its start and after a failure: the
    most that divide its workers and lie equally on hosts. It takes more once there is room. Steps, batch and learning
    rate stay the same (docs/cluster.md). null: it waits for room."""
    resize_after_seconds: float | None = Field(None, ge=1)
    """With `min_workers`: how long room must be missing before a trial runs with fewer workers, and be there before it
    is started again with more; null: 60."""
    exclude_slow_nodes: bool = False
    """Leave out nodes of a cluster that preflight finds slower than the others (docs/acceptance.md); false: warn."""
    evaluation: EvaluationResources | None = None
    """What is reserved for evaluations before the last, which are then made while training goes on; null: nothing."""
    network_interface: str | None = Field(None, pattern=r"^[=^]?[A-Za-z0-9_.:,-]+$")
    """Network interface between hosts (`ens5`), for NCCL and gloo on every host; null: as set in their environment."""
    price_per_accelerator_hour: float | None = Field(None, ge=0)
    """Price of one accelerator for an hour, in any currency; table, report and MLflow then show costs."""
    price_per_kwh: float | None = Field(None, ge=0)
    """Price of a kilowatt-hour, in any currency; the energy that is measured then has a cost."""
    carbon_grams_per_kwh: float | None = Field(None, ge=0)
    """Grams of CO2 equivalent for a kilowatt-hour from the grid here; the energy that is measured then has them."""
    address: str | None = None
    """Ray cluster to join: `host:6379`, or `auto` for the one on this machine. null: the one this job runs in, else a
    local one that is started and ended with the run."""
    dashboard: bool = False
    """Bring up Ray's dashboard where a cluster is started for this run; a cluster that is joined has its own."""

    @model_validator(mode="after")
    def _resizes(self) -> Resources:
        if self.resize_after_seconds is not None and self.min_workers is None:
            raise ValueError("resize_after_seconds has no effect without min_workers: give both, or neither")
        return self


class Tracking(Part):
    """Where runs are tracked."""

    uri: str | None = None
    """MLflow tracking URI; null: `$MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db` here."""
    offline: bool = False
    """Continue without a tracking server that cannot be reached, and record everything for a replay."""
    log_model: Literal[False, True, "last", "best"] = False
    """Log a checkpoint as an MLflow model: the last one (`true`, `last`), or the one of the best evaluation by
    `protocol.metric` (`best`; each evaluation is then followed by a checkpoint)."""


class Storage(Part):
    """Where results and checkpoints are written, and how many are kept."""

    path: str = "runs"
    """Folder for run folders; with several nodes, one that all of them share."""
    checkpoints: str | None = None
    """Folder or URI (`s3://bucket/prefix`) for checkpoints; null: in the run's folder."""
    checkpoint_period_iterations: int | None = Field(None, ge=0)
    """Iterations between checkpoints, scaled as `eval_period_iterations` is; 0: the last only; null: the config's."""
    checkpoint_period: Literal["auto"] | None = None
    """`auto`: the workers set the period so that stalls and lost work together cost the least (Young/Daly), from the
    measured stall and step time and `faults.mtbf_hours`; null: `checkpoint_period_iterations`."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept, besides the best."""

    @model_validator(mode="after")
    def _one_period(self) -> Storage:
        if self.checkpoint_period == "auto" and self.checkpoint_period_iterations is not None:
            raise ValueError("checkpoint_period: auto sets the period itself; leave checkpoint_period_iterations null")
        return self


class Timeouts(Part):
    """Seconds without progress after which a worker counts as stuck, by section of the training loop."""

    setup: float = Field(1800, gt=0)
    """From the start of the training function to the first batch; and, each by itself, the waits before it: for room in
    the cluster, for the group of workers to start, and for a standby that is still starting."""
    step: float = Field(300, gt=0)
    """One training step."""
    evaluation: float = Field(3600, gt=0)
    """One evaluation."""
    checkpoint: float = Field(900, gt=0)
    """Taking or restoring one checkpoint."""
    report: float = Field(300, gt=0)
    """Anything else."""
    heartbeat: float = Field(60, gt=0)
    """Time without a heartbeat of a worker's process; one is sent every second."""


class Faults(Part):
    """How failures are handled."""

    max_failures: int = Field(3, ge=0)
    """Consecutive restarts without a new checkpoint after which a trial is given up."""
    restart_on: list[FailureKind] = Field(["worker_lost", "communication", "stuck", "out_of_memory", "unknown"])
    """Failures after which the workers are restarted from the newest checkpoint; any other ends the trial at once.
    `out_of_memory` and `unknown` also end it when they occur twice at the same iteration."""
    on_storage_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written: end the trial, or keep the older ones and try again at the next."""
    mtbf_hours: float | None = Field(None, gt=0)
    """Mean time between failures of a whole trial, in hours, for `storage.checkpoint_period: auto` and the report's
    advice; null: measured once a trial has failed, and 154 days over the number of hosts before (docs/faults.md)."""
    standby: Literal["auto", True, False] = "auto"
    """Whether a second group of workers, which has imported everything, waits next to the one that trains on CPUs, to
    take over within seconds when that one is lost. It costs 0.75 GiB of memory, 0.5 GiB for each worker, and the CPU
    time of a start. `auto`: where another failure is as likely as not before the end of a trial of kind
    `time_to_train`, by `mtbf_hours` or the trial's own failures (docs/faults.md)."""
    timeouts: Timeouts = Timeouts()
    """When a worker counts as stuck."""

    @model_validator(mode="after")
    def _standby_is_needed(self) -> Faults:
        if self.standby is True and not (self.restart_on and self.max_failures):
            raise ValueError(
                "standby: true has no effect where no failure is followed by a restart: set max_failures to 1 or more "
                "and name failures in restart_on, or leave standby at auto"
            )
        return self


class ReferenceRow(Part):
    """A published figure shown next to the measured ones."""

    name: str
    """What it is, with its hardware."""
    world_size: int = Field(ge=1)
    """Accelerators."""
    training_world_size: int | None = Field(None, ge=1)
    """Those of them that train, where others evaluate; null: all."""
    accelerator: str | None = None
    """Their model name."""
    precision: str | None = None
    """What they computed in: `fp32`, `tf32`, `amp`, `bf16`."""
    global_batch_size: int | None = Field(None, ge=1)
    """Images per iteration."""
    images_per_second: float | None = Field(None, gt=0)
    """Throughput."""
    time_to_train_seconds: float | None = Field(None, gt=0)
    """Time to train, by the seed's clock or one like it."""
    mlperf_seconds: float | None = Field(None, gt=0)
    """Time to train by MLPerf's clock and score."""
    box_ap: float | None = Field(None, ge=0, le=100)
    """Box AP (0–100)."""
    mask_ap: float | None = Field(None, ge=0, le=100)
    """Mask AP (0–100)."""
    source: str = ""
    """Where the figure comes from."""


class Experiment(Part):
    """One experiment: the model, its data, the scales it is trained at, and what is measured."""

    name: Name
    """Name of the experiment: folder under `storage.path` and experiment in MLflow."""
    description: str = ""
    """One line for readers."""
    data: Data
    """What is trained and evaluated on."""
    model: Model = Model()
    """The detector."""
    trials: Trials = Trials()
    """World sizes, recipes, seeds."""
    protocol: Protocol = Protocol()
    """What is measured, for how long, and against which target."""
    resources: Resources = Resources()
    """What the workers run on: device, CPUs, loader processes, hosts."""
    tracking: Tracking = Tracking()
    """MLflow."""
    storage: Storage = Storage()
    """Results and checkpoints."""
    faults: Faults = Faults()
    """Restarts and time-outs."""
    log_period_iterations: int = Field(20, ge=1)
    """Iterations between progress events, as in detectron2."""
    reference_rows: list[ReferenceRow] = Field([])
    """Published figures to show next to the measured ones."""
    reference_files: list[str] = Field([])
    """Files with more of them (`references/mlperf.yaml`), each with nothing but `reference_rows`."""
    prediction: str | None = None
    """What `--predict` left (its run's folder, or `prediction.json`): trials at a size that was predicted are shown
    next to their prediction. Refused where it was made for another model, data set or recipe switches."""

    @model_validator(mode="before")
    @classmethod
    def _seeds_of_a_benchmark(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        protocol, trials = (values.get(name) or {} for name in ("protocol", "trials"))
        if isinstance(protocol, dict) and protocol.get("kind") == "benchmark" and isinstance(trials, dict):
            return {**values, "trials": {"seeds": list(range(BENCHMARK_SEEDS)), **trials}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if self.trials.batch_per_worker and "SOLVER.IMS_PER_BATCH" in self.model.overrides:
            raise ValueError("give trials.batch_per_worker or model.overrides.SOLVER.IMS_PER_BATCH, not both")
        if self.faults.standby is True and self.protocol.kind == "throughput":
            raise ValueError(
                "faults.standby: true starts processes while protocol.kind throughput measures steps; set it to auto, "
                "which starts none there, or false"
            )
        if self.faults.standby is True and self.resources.device == "cuda":
            raise ValueError("faults.standby: true is for CPUs so far; set it to auto or false")
        if self.tracking.log_model == "best" and not self.protocol.evaluates:
            raise ValueError("tracking.log_model: best needs an evaluation: give protocol.evaluate_at_end: true")
        if self.trials.concurrent != 1 and self.resources.evaluation:
            raise ValueError(
                "resources.evaluation reserves on any host, also where another trial trains: set trials.concurrent to 1"
            )
        return self

    @model_validator(mode="after")
    def _one_setup(self) -> Experiment:
        if self.protocol.kind == "benchmark" and (problems := self._benchmark_problems()):
            raise ValueError(
                f"protocol.kind benchmark scores seeds of one setup by their targets: {'; '.join(problems)}"
            )
        return self

    def _benchmark_problems(self) -> list[str]:
        """What contradicts a benchmark: a line with the field and the fix for each."""
        trials, protocol, fewest = self.trials, self.protocol, self.resources.min_workers
        targets = (protocol.target_box_ap, protocol.target_mask_ap, protocol.target)
        unevaluated = protocol.evaluate_at_end is False and not (
            protocol.eval_period_iterations or protocol.eval_period_epochs
        )
        found = {
            f"trials.world_sizes must hold one, not {trials.world_sizes}": len(trials.world_sizes) > 1,
            f"trials.recipes must hold one, not {trials.recipes}": len(trials.recipes) > 1,
            "trials.scaling must be weak or strong, not both": trials.scaling == "both",
            f"trials.seeds must hold {BENCHMARK_SEEDS}, or at least {MIN_BENCHMARK_SEEDS}, not {trials.seeds}":
                len(trials.seeds) < MIN_BENCHMARK_SEEDS,
            "give protocol.target_box_ap, target_mask_ap or target": all(target is None for target in targets),
            "give protocol.eval_period_iterations or eval_period_epochs, as nothing is evaluated without": unevaluated,
            "resources.min_workers must be null: with fewer workers it is another system":
                fewest is not None and fewest < max(trials.world_sizes),
        }  # fmt: skip
        return [problem for problem, is_there in found.items() if is_there]


def experiment_schema() -> dict[str, Any]:
    """JSON Schema of the experiment file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema()}


if __name__ == "__main__":
    import json

    print(json.dumps(experiment_schema(), indent=2))
