"""What an experiment of kind benchmark may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import Experiment, SpecError
from tests.builders.experiments import tiny_experiment


def _spec(protocol: dict[str, Any], **sections: Any) -> Experiment:
    return parse_experiment(tiny_experiment(protocol={"kind": "benchmark", **protocol}, **sections), "x")


def test_a_benchmark_has_five_seeds_unless_it_gives_others() -> None:
    assert _spec({"target_box_ap": 1}).trials.seeds == [0, 1, 2, 3, 4]
    assert _spec({"target_box_ap": 1}, trials={"seeds": [7, 8, 9]}).trials.seeds == [7, 8, 9]
    with pytest.raises(SpecError, match=r"trials\.seeds"):
        _spec({"target_box_ap": 1}, trials={"seeds": None})
    with pytest.raises(SpecError, match="protocol"):
        parse_experiment({**tiny_experiment(), "protocol": ["benchmark"]}, "x")


@pytest.mark.parametrize(
    ("protocol", "sections", "message"),
    [
        ({}, {}, "give protocol.target_box_ap, target_mask_ap or target"),
        ({"target_box_ap": 1}, {"trials": {"world_sizes": [1, 2]}}, r"world_sizes must hold one, not \[1, 2\]"),
        ({"target_box_ap": 1}, {"trials": {"recipes": ["fast", "plain"]}}, "recipes must hold one"),
        ({"target_box_ap": 1}, {"trials": {"scaling": "both"}}, "scaling must be weak or strong"),
        ({"target_box_ap": 1}, {"trials": {"seeds": [1, 2]}}, "seeds must hold 5, or at least 3"),
        ({"target_box_ap": 1, "evaluate_at_end": False}, {}, "nothing is evaluated"),
        ({"target_box_ap": 1}, {"trials": {"world_sizes": [2]}, "resources": {"min_workers": 1}}, "another system"),
    ],
)
def test_what_contradicts_a_benchmark_is_refused(
    protocol: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        _spec(protocol, **sections)
