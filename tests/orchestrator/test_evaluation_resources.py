"""Where evaluations are made: on what an experiment reserves, on CPUs to spare, or by the workers between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.spec import Experiment, SpecError
from tests.builders.experiments import tiny_experiment
from trainers.contract.plan import TrialPlan

PROTOCOL = {"iterations": 8, "eval_period_iterations": 4}


def plan(hardware: Hardware, *, recipe: str = "fast", protocol: dict[str, Any] = PROTOCOL, **changes: Any) -> TrialPlan:
    trials = {"world_sizes": [1], "recipes": [recipe], "switches": changes.pop("switches", {})}
    values = tiny_experiment(trials=trials, protocol=protocol)
    values["resources"] = {**values.get("resources", {}), "cpus_per_worker": 2, **changes}
    (found,) = expand(Experiment.model_validate(values), hardware, "/runs/x", Path("/data"))
    return found


@pytest.mark.parametrize(
    ("hardware", "recipe", "concurrent"),
    [
        (Hardware(num_cpus=4), "fast", True),
        (Hardware(num_cpus=3), "fast", False),  # a worker has two
        (Hardware(num_cpus=8, num_hosts=2), "fast", False),  # those to spare may be on the other host
        (Hardware(num_cpus=4), "reference", False),
    ],
)
def test_fast_evaluates_while_training_goes_on_where_cpus_are_to_spare(
    hardware: Hardware, recipe: str, *, concurrent: bool
) -> None:
    found = plan(hardware, recipe=recipe, device="cpu")
    assert (found.evaluates_concurrently, found.recipe.overlapped_evaluation) == (concurrent, concurrent)
    assert (found.evaluation_cpus, found.evaluation_gpus) == (0, 0)
    assert plan(hardware, recipe=recipe, device="cpu", switches={"overlapped_evaluation": True}).evaluates_concurrently
    off = plan(hardware, recipe=recipe, device="cpu", switches={"overlapped_evaluation": False})
    assert not off.evaluates_concurrently


def test_on_gpus_the_workers_evaluate_unless_something_is_reserved() -> None:
    gpus = Hardware(num_gpus=2, num_cpus=32)
    assert not plan(gpus, device="cuda").evaluates_concurrently
    for recipe in ("fast", "reference"):
        found = plan(gpus, recipe=recipe, device="cuda", evaluation={"gpus": 1})
        assert found.evaluates_concurrently and (found.evaluation_gpus, found.evaluation_cpus) == (1, 0)
        found = plan(gpus, recipe=recipe, device="cuda", evaluation={"cpus": 8})
        assert found.evaluates_concurrently and (found.evaluation_gpus, found.evaluation_cpus) == (0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"switches": {"overlapped_evaluation": False}, "evaluation": {"cpus": 1}}, "overlapped_evaluation: false"),
        ({"evaluation": {"gpus": 1}}, "the workers train on CPUs; give cpus"),
        ({"evaluation": {"cpus": 1}, "protocol": {"iterations": 8}}, "no evaluation comes before the last"),
        (
            {"evaluation": {"cpus": 1}, "protocol": {"iterations": 8, "eval_period_iterations": 8}},
            "no evaluation comes before the last",
        ),
    ],
)
def test_what_would_be_reserved_for_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f"resources.evaluation: .*{message}"):
        plan(Hardware(num_cpus=8), device="cpu", **changes)


@pytest.mark.parametrize("given", [{}, {"gpus": 1, "cpus": 1}, {"gpus": 0}, {"cpus": "all"}, {"tpus": 1}, "all", 3])
def test_what_is_reserved_is_a_number_of_gpus_or_of_cpus(given: object) -> None:
    with pytest.raises(ValidationError, match=r"resources\.evaluation"):
        Experiment.model_validate({**tiny_experiment(), "resources": {"evaluation": given}})
