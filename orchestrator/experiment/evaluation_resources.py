"""What evaluations are made on: devices that are reserved for them, CPUs to spare, or the workers' own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from orchestrator.experiment.part import Part

if TYPE_CHECKING:
    from trainers.contract.plan import SolverPlan
    from trainers.recipes import Recipe


class EvaluationResources(Part):
    """What is reserved for evaluations, anywhere on the cluster; training goes on while they are made there."""

    gpus: int | None = Field(None, ge=1)
    """GPUs, each with as many CPUs as a worker has; several share the images of an evaluation."""
    cpus: int | None = Field(None, ge=1)
    """CPUs of one host; where workers have GPUs, figures may differ from theirs by rounding."""

    @model_validator(mode="after")
    def _one_kind(self) -> EvaluationResources:
        if (self.gpus is None) == (self.cpus is None):
            raise ValueError("give gpus or cpus")
        return self


def evaluation_fields(
    given: EvaluationResources | None,
    switches: dict[str, Any],
    recipe: Recipe,
    solver: SolverPlan,
    device: str,
    spare_cpus: int,
    cpus: int,
) -> dict[str, Any]:
    """The fields of a trial's plan that say where its evaluations are made.

    A recipe that leaves it open (`overlapped_evaluation: null`, as `fast` does) evaluates concurrently where it costs
    training little: on what is reserved for it, or on CPUs if there are as many to spare as a worker has. On GPUs
    without any that are reserved, all workers evaluate between steps: a process on the GPU of one of them would slow
    down all, and take longer.

    Args:
        given: What the experiment reserves.
        switches: Those of the experiment, over the recipe's.
        recipe: With these.
        solver: The trial's periods.
        device: `cuda` or `cpu`, of the workers.
        spare_cpus: CPUs of the only host that the largest trial leaves; 0 where there are several hosts.
        cpus: Those of a worker.

    Raises:
        ValueError: What is reserved could not be used.
    """
    if given is None:
        concurrent = recipe.overlapped_evaluation
        if concurrent is None:
            concurrent = device == "cpu" and spare_cpus >= cpus
        return {"recipe": dataclasses.replace(recipe, overlapped_evaluation=concurrent)}
    if not 0 < solver.eval_period < solver.max_iter:
        raise ValueError("no evaluation comes before the last one, which all workers make; give them a shorter period")
    if switches.get("overlapped_evaluation") is False:
        raise ValueError("trials.switches.overlapped_evaluation: false leaves it unused; take away one of them")
    if given.gpus and device == "cpu":
        raise ValueError("the workers train on CPUs; give cpus, or resources.device: cuda")
    return {
        "recipe": dataclasses.replace(recipe, overlapped_evaluation=bool(recipe.overlapped_evaluation)),
        "evaluation_gpus": given.gpus or 0,
        "evaluation_cpus": given.cpus or 0,
    }
