"""A prediction as a file holds it, with made-up figures."""

from __future__ import annotations

from typing import Any

from orchestrator.experiment.prediction_file import PredictedSize, Prediction, setup_of
from orchestrator.experiment.spec import Experiment


def made_prediction(experiment: Experiment, **fields: Any) -> Prediction:
    """A prediction of 100 images/s for 2 workers with batch 4."""
    size = PredictedSize(
        world_size=2, global_batch_size=4, base_lr=0.005, iterations=8, convergence="not known", step_seconds=0.04,
        part_seconds={"compute": 0.02, "data": 0.01, "stragglers": 0.006, "communication": 0.004},
        images_per_second=100.0, images_per_second_low=90.0, images_per_second_high=110.0, efficiency=0.8,
        efficiency_low=0.7, efficiency_high=0.9, schedule_seconds=0.32,
    )  # fmt: skip
    values: dict[str, Any] = {
        "setup": setup_of(experiment), "recipe": "reference", "scaling": "strong", "asked": [size], "sizes": [size],
        "calibrated_sizes": [1], "device_name": "Test CPU", "assumptions": ["nothing was measured"],
    }  # fmt: skip
    return Prediction(**{**values, **fields})
