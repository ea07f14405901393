"""What MLflow is told: the names of all metrics, and a trial's figures under them.

The trap it protects against: two names for one figure, so that a compare view shows half of the runs in either.
"""

from __future__ import annotations

from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.windows import JointWindow
from trainers.contract.events import Evaluated

HEADLINE = {
    "throughput/images_per_second": "images/s of all workers together, warm-up, evaluation and checkpoints left out",
    "time/to_train_seconds": "seconds to the evaluation that first met the target, on a clock that never pauses",
    "coco/box_ap": "box AP, 0–100; along the run, its last value is that of the last evaluation",
    "coco/mask_ap": "mask AP, 0–100",
    "scaling/efficiency": "throughput over that of the smallest world size, per worker; 1 is ideal",
    "scaling/speed_up": "throughput over that of the smallest world size",
    "cost/total": "price of the accelerators for the whole trial",
    "cost/to_target": "price of the accelerators for the time to train",
}
"""The metrics that tell trials apart, and what each means."""

SHOWN_COLUMNS = ("params.`workers`", *(f"metrics.`{name}`" for name in list(HEADLINE)[:5]), "tags.`device_name`")
"""Columns of MLflow's own table of runs, in its own notation."""

MLFLOW_UI = "http://localhost:5000"
"""Where `make ui` serves a store that has no server of its own."""

VIEW_KEY = "benchmark"
"""Of the view of MLflow's table of runs that shows them; kept with the experiment, as its "Share" button keeps one."""


def window_metrics(window: JointWindow) -> dict[str, float | None]:
    """The metrics of a window of steps."""
    losses: dict[str, float | None] = {f"loss/{name.removeprefix('loss_')}": v for name, v in window.losses.items()}
    return losses | {
        "learning_rate": window.learning_rate,
        "throughput/images_per_second": window.images_per_second,
        "time/step_seconds_p50": window.step_seconds_p50,
        "time/step_seconds_p95": window.step_seconds_p95,
        "time/data_seconds": window.data_seconds,
        "memory/peak_gib": window.peak_memory_gib,
    }


def evaluation_metrics(event: Evaluated) -> dict[str, float | None]:
    """The metrics of an evaluation: COCO's figures, and its seconds by part."""
    figures = {f"coco/{name}": value for name, value in event.figures.items()}
    parts = {f"time/evaluation_{part}_seconds": seconds for part, seconds in event.part_seconds.items()}
    return {**figures, **parts, "time/evaluation_seconds": event.seconds}


def summary(result: TrialResult) -> dict[str, float | None]:
    """The figures of an ended trial."""
    return {
        "throughput/images_per_second": result.images_per_second,
        "throughput/wall_images_per_second": result.wall_images_per_second,
        "time/to_train_seconds": result.time_to_train_seconds,
        "time/to_box_target_seconds": result.time_to_box_target_seconds,
        "time/mlperf_seconds": result.mlperf_seconds,
        "time/schedule_seconds": result.schedule_seconds,
        "time/startup_seconds": result.startup_seconds,
        "time/downtime_seconds": result.downtime_seconds,
        "time/step_seconds_p50": result.step_seconds.p50,
        "time/step_seconds_p95": result.step_seconds.p95,
        "coco/final_box_ap": result.box_ap,
        "coco/final_mask_ap": result.mask_ap,
        "coco/best_box_ap": result.best_box_ap,
        "coco/best_mask_ap": result.best_mask_ap,
        "cost/total": result.cost,
        "cost/to_target": result.cost_to_target,
        "memory/peak_gib": result.peak_memory_gib,
        "restarts": result.num_restarts,
    }


def reference_metrics(row: ReferenceRow) -> dict[str, float | None]:
    """A published figure under the same names."""
    return {
        "throughput/images_per_second": row.images_per_second,
        "time/to_train_seconds": row.time_to_train_seconds,
        "coco/box_ap": row.box_ap,
        "coco/mask_ap": row.mask_ap,
    }


def table_address(base: str, experiment_id: str) -> str:
    """Where MLflow shows the experiment's runs in that view."""
    return f"{base}/experiments/{experiment_id}/runs?viewStateShareKey={VIEW_KEY}&workflowType=machine_learning"


def mlflow_base(result: ExperimentResult) -> str:
    """What the addresses of MLflow's pages begin with: the tracking server's, or that of `make ui`."""
    uri = result.mlflow_tracking_uri or ""
    return f"{uri.rstrip('/') if uri.startswith(('http://', 'https://')) else MLFLOW_UI}/#"
