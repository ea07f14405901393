"""The figures of a record under their names in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from orchestrator.figures.catalog import FIGURES
from trainers.contract.events import Event, LoopFinished, StepsDone, TrialEnded

IN_LISTS = ("evaluations.", "scaling.", "windows.", "benchmark.")
"""Beginnings of the keys of figures in MLflow that are not in the record of a trial by itself."""

PUBLISHED = (
    "images_per_second", "time_to_train_seconds", "mlperf_seconds", "evaluations.box_ap", "evaluations.mask_ap",
)  # fmt: skip
"""Figures that a published row has under the names of a trial's."""


def metrics(record: Any, prefix: str = "") -> dict[str, float | None]:
    """The figures of a record under their names in MLflow.

    Args:
        record: A trial's record, an `Evaluated` event, a `JointWindow`, a `ScalingRow`, a
            `BenchmarkResult` or a `ReferenceRow`.
        prefix: What it is: "" for a trial, one of `IN_LISTS`, or `references.`.
    """
    values: dict[str, float | None] = {}
    for key, row in FIGURES.items():
        group = next((start for start in IN_LISTS if key.startswith(start)), "")
        if row.mlflow is None or not (key in PUBLISHED if prefix == "references." else group == prefix):
            continue
        name = key.removeprefix(group)
        if name.endswith(".*"):
            parts = getattr(record, name.removesuffix(".*"))
            values |= {row.mlflow.replace("*", part): value for part, value in parts.items()}
        elif hasattr(record, name.partition(".")[0]):  # an event has its APs among its figures only
            values[row.mlflow] = attrgetter(name)(record)
    return values


def summary_step(events: Sequence[Event]) -> int:
    """The step of a trial's figures in MLflow, which shows those of the highest step: of its latest end.

    A trial that was resumed may end at the iteration at which it ended before, or at an earlier one.

    Args:
        events: Its events up to this end.
    """
    done = (e.iteration for e in events if isinstance(e, StepsDone | LoopFinished) and e.rank == 0)
    return max(done, default=0) + sum(isinstance(event, TrialEnded) for event in events) - 1
