"""What the log of another program says of a trial's settings: the counterpart of a `TrialPlan`, which has no gaps."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from pydantic.dataclasses import dataclass

from trainers.contract.plan import ProtocolKind, Scaling, TrialPlan


@dataclass(frozen=True, slots=True)
class LoggedDataset:
    """A data set as far as a log names it; the field as in `DatasetPlan`."""

    name: str | None


@dataclass(frozen=True, slots=True)
class LoggedSolver:
    """The schedule as far as a log prints it; fields as in `SolverPlan`."""

    global_batch_size: int | None
    base_lr: float | None
    max_iter: int | None
    steps: tuple[int, ...] | None
    warmup_iters: int | None
    eval_period: int | None
    checkpoint_period: int | None


@dataclass(frozen=True, slots=True)
class LoggedPlan:
    """The settings of a replayed trial; what its log does not hold is None. Fields as in `TrialPlan`."""

    name: str
    source: str
    """Absolute path of the log."""
    world_size: int
    """Number of workers; 1 where the log does not say, which its notes do."""
    num_nodes: int | None
    recipe_name: str
    precision: Literal["fp32", "amp"] | None
    seed: int | None
    scaling: Scaling
    """`weak` or `strong`: what the runs that were replayed together kept."""
    protocol: ProtocolKind | None
    weights: str | None
    train: LoggedDataset
    val: LoggedDataset
    solver: LoggedSolver
    throughput_warmup_iters: int
    """Iterations left out of the drift curve and of the shares of the step time."""
    target_box_ap: float | None
    target_mask_ap: float | None
    device: Literal["cuda", "cpu"] | None
    price_per_accelerator_hour: float | None = None
    price_per_kwh: float | None = None
    carbon_grams_per_kwh: float | None = None
    mtbf_hours: float | None = None
    metric: str = "box_ap"
    target: float | None = None


Plan = TrialPlan | LoggedPlan
"""The settings of a trial, of this program or of another."""


def plan_from_dict(values: dict[str, Any]) -> Plan:
    """The plan in a `TrialStarted` event, also after a round trip through JSON.

    Raises:
        KeyError: It lacks a field.
        TypeError: It has a field that no plan has, or a value of another type.
        pydantic.ValidationError: The same, in what the log of another program says.
    """
    if "source" in values:
        return LoggedPlan(**values)
    TrialPlan.from_dict(values)  # takes no unknown field
    try:
        return msgspec.convert(values, TrialPlan)
    except msgspec.ValidationError as error:
        raise TypeError(str(error)) from error
