"""Figures under the names of their MLflow metrics, as the catalogue has them."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.records import TrialResult
from orchestrator.figures.scaling_records import ScalingRow
from orchestrator.figures.steps import JointWindow
from trainers.contract.events import Evaluated

HEADLINE = tuple(
    FIGURES[key]
    for key in (
        "images_per_second", "time_to_train_seconds", "evaluations.box_ap", "evaluations.mask_ap",
        "scaling.efficiency", "scaling.speed_up", "cost", "cost_to_target",
    )
)  # fmt: skip
"""What distinguishes trials: the first five are columns of MLflow's table of runs, all are explained in its note."""

SHOWN_COLUMNS = ("params.`workers`", *(f"metrics.`{row.mlflow}`" for row in HEADLINE[:5]), "tags.`device_name`")
"""Columns of MLflow's table of runs, in its own notation."""

_OF_LISTS = ("evaluations.", "scaling.", "windows.")
"""Beginnings of the keys of figures that a trial has many of."""

_OF_WINDOWS = ("images_per_second", "step_seconds.p50", "step_seconds.p95", "peak_memory_gib")
"""Figures of a trial that are measured along the run as well."""


def window_metrics(window: JointWindow) -> dict[str, float | None]:
    """The metrics of a window of steps."""
    figures = {_name(key): FIGURES[key].of(window) for key in _OF_WINDOWS}
    losses = {name.removeprefix("loss_"): value for name, value in window.losses.items()}
    return {
        **_named("windows.losses.*", losses),
        **figures,
        _name("windows.learning_rate"): window.learning_rate,
        _name("windows.data_seconds"): window.data_seconds,
    }


def evaluation_metrics(event: Evaluated) -> dict[str, float | None]:
    """The metrics of an evaluation: COCO's figures, and its seconds by part."""
    figures = _named("evaluations.figures.*", event.figures)
    return {
        **figures,
        **_named("evaluations.part_seconds.*", event.part_seconds),
        _name("evaluations.seconds"): event.seconds,
    }


def trial_metrics(result: TrialResult) -> dict[str, float | None]:
    """The metrics of an ended trial."""
    rows = (row for row in FIGURES.values() if not row.key.startswith(_OF_LISTS))
    return {row.mlflow: row.of(result) for row in rows if row.mlflow}


def scaling_metrics(row: ScalingRow) -> dict[str, float | None]:
    """The metrics of a trial against the smallest world size."""
    return {_name("scaling.efficiency"): row.efficiency, _name("scaling.speed_up"): row.speed_up}


def reference_metrics(row: ReferenceRow) -> dict[str, float | None]:
    """The metrics of a published figure."""
    return {
        _name("images_per_second"): row.images_per_second,
        _name("time_to_train_seconds"): row.time_to_train_seconds,
        _name("evaluations.box_ap"): row.box_ap,
        _name("evaluations.mask_ap"): row.mask_ap,
    }


def _name(key: str) -> str:
    name = FIGURES[key].mlflow
    if name is None:
        raise KeyError(f"{key} has no metric in MLflow")
    return name


def _named(key: str, values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {_name(key).replace("*", name): value for name, value in values.items()}
