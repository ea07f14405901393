"""`--predict` through the real command: a calibration on one and two workers, its prediction, MLflow and report."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.experiment.prediction_file import read_prediction
from orchestrator.figures.records import ExperimentResult
from tests.builders.commands import run_command
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment, write_experiment

pytestmark = pytest.mark.train


def test_a_calibration_ends_in_a_prediction_that_is_kept_tracked_and_shown(tmp_path: Path) -> None:
    overrides = {**TINY_OVERRIDES, "SOLVER.MAX_ITER": 800, "SOLVER.STEPS": [600]}
    values = tiny_experiment(
        model={"weights": "", "overrides": overrides}, trials={"world_sizes": [1], "scaling": "weak"},
        resources={"device": "cpu", "cpus_per_worker": 1, "price_per_accelerator_hour": 3.6},
    )  # fmt: skip
    file, run = write_experiment(tmp_path, values), tmp_path / "run"
    done = run_command(file, "--predict", "4,64", "--calibrate", "1,2", "--output", run, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = ExperimentResult.model_validate_json((run / "results.json").read_text(encoding="utf-8"))
    assert [(trial.world_size, trial.iterations, trial.evaluations) for trial in result.trials] == [
        (1, 62, []), (2, 62, []),
    ]  # fmt: skip
    prediction = read_prediction(run)
    assert prediction == result.prediction and prediction.calibrated_sizes == [1, 2]
    four, many = prediction.sizes
    assert (four.global_batch_size, four.iterations, many.global_batch_size, many.iterations) == (16, 200, 256, 12)
    assert 0 < four.images_per_second_low <= four.images_per_second <= four.images_per_second_high
    assert min(four.part_seconds.values()) >= 0 and four.part_seconds["communication"] > 0
    assert four.schedule_seconds == pytest.approx(200 * four.step_seconds)
    assert four.cost == pytest.approx(4 * 0.001 * four.schedule_seconds)
    assert four.simulated is not None and four.simulated.advised_checkpoint_seconds > 0
    shown = " ".join(done.stdout.split())
    assert "PREDICTED from 1, 2 workers" in shown and "SIMULATED training with failures" in shown
    assert "PREDICTED step, ms" in (run / "report.html").read_text(encoding="utf-8")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    tags = client.get_run(str(result.mlflow_run_id)).data.tags
    assert tags["prediction.4"].startswith(f"{four.images_per_second:.2f} images/s")
    assert "prediction.json" in [file.path for file in client.list_artifacts(str(result.mlflow_run_id))]

    again = run_command(run, "--sizes", "4,64", "--json", module="orchestrator.prediction", cwd=tmp_path)
    assert again.stdout.strip() == (run / "prediction.json").read_text(encoding="utf-8").strip()
    linked = run_command(
        run, "--sizes", "8", "--bandwidth", "0.001", "--gradients", "1", module="orchestrator.prediction", cwd=tmp_path
    )
    assert "SIMULATED links: ring, 0.001 GB/s, 10 µs, 1 MB of gradients" in " ".join(linked.stdout.split())
    unmatched = run_command(run, "--sizes", "2", module="orchestrator.prediction", cwd=tmp_path)
    assert unmatched.returncode == 2 and "up to 2 were measured" in unmatched.stderr
