"""The held-out check of a prediction: four workers on four hosts, from what one and two of them took."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.experiment.prediction_file import AskedSize, Prediction
from orchestrator.prediction.predict import predict
from tests.builders.hosts import Network, why_not
from tests.builders.stand_in import BATCH, run_workers

pytestmark = [pytest.mark.cluster, pytest.mark.soak]


def test_four_hosts_are_predicted_from_one_and_two_within_ten_percent(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Network() as network:
        trials = run_workers([network.add(f"host{n}", n, tmp_path) for n in (11, 12, 13, 14)], tmp_path)
    asked = AskedSize(world_size=4, global_batch_size=4 * BATCH, base_lr=0.01, iterations=50, convergence="")
    everything = Prediction(setup={}, recipe="reference", scaling="weak", asked=[asked])
    prediction = predict(everything, [trials[1], trials[2]])
    (predicted,) = prediction.sizes
    measured = trials[4].trial.images_per_second
    assert measured is not None
    print(f"predicted {predicted.images_per_second:.3f} ({predicted.images_per_second_low:.3f} to")
    print(f"{predicted.images_per_second_high:.3f}) images/s, measured {measured:.3f}; {predicted.part_seconds}")
    assert predicted.images_per_second == pytest.approx(measured, rel=0.10)
    assert min(predicted.part_seconds[part] for part in ("stragglers", "communication")) > 0.01, (
        "they were no part of it"
    )
