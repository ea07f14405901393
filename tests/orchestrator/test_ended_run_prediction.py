"""What is asked where a run that has ended is predicted from: whatever its settings were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.experiment.reading import load_experiment, parse_experiment
from orchestrator.experiment.spec import CONFIGS
from orchestrator.prediction.asking import ask, ask_of_run
from tests.builders.experiments import tiny_experiment

BENCHMARK = CONFIGS / "demo_benchmark.yaml"


@pytest.mark.parametrize(
    "changes",
    [
        {"tracking": {"log_model": "best"}},
        {"protocol": {"ema": {}}},
        {"protocol": {"validation_loss": True}},
        {"protocol": {"target": 30, "metric": "mask_ap"}},
        {"protocol": {"kind": "throughput", "iterations": 8}},
        {"faults": {"standby": True}},
    ],
    ids=str,
)
def test_a_run_without_a_period_of_evaluations_may_have_had_any_setting(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    values = tiny_experiment(**{"protocol": {"kind": "time_to_train"}, **changes})
    run = parse_experiment(values, where="tiny")
    (asked,) = ask_of_run(tmp_path, run.model_dump(mode="json"), [4]).asked
    assert (asked.world_size, asked.global_batch_size, asked.iterations) == (4, 4, 8)


def test_a_benchmark_is_predicted_for_its_first_seed(tmp_path: Path) -> None:
    single = load_experiment(BENCHMARK, ["trials.seeds=[0]", "protocol.kind=time_to_train"])
    assert ask_of_run(tmp_path, load_experiment(BENCHMARK).model_dump(mode="json"), [4]) == ask(single, [4])
