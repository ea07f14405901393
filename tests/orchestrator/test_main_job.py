"""The main job through the real command: Ray Train, detectron2, COCO evaluation, MLflow in SQLite."""

import json
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from orchestrator.bundle.verify import verify
from orchestrator.figures.records import ExperimentResult
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.commands import run_command
from tests.builders.experiments import tiny_experiment, write_experiment
from trainers.contract.events import StepsDone
from trainers.evaluation_hook import EVALUATION_PENDING_KEY
from trainers.hooks import state_sha256

pytestmark = pytest.mark.train


@dataclass
class Done:
    folder: Path
    run_dir: Path
    stdout: str
    result: ExperimentResult
    runs: dict[str, Run]
    client: MlflowClient


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One run with 1 and with 2 workers, and a reference row."""
    folder = tmp_path_factory.mktemp("main_job")
    values = tiny_experiment(
        trials={"world_sizes": [1, 2], "scaling": "strong"},
        tracking={"log_model": True},
        reference_rows=[{"name": "published", "world_size": 8, "images_per_second": 55.26, "box_ap": 37.8}],
    )
    completed = run_command(write_experiment(folder, values), "--output", folder / "run", cwd=folder)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    result = ExperimentResult.model_validate_json((folder / "run" / "results.json").read_text(encoding="utf-8"))
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    return Done(folder, folder / "run", completed.stdout, result, runs, client)


def test_both_world_sizes_finish_with_figures(done: Done) -> None:
    assert done.result.status == "FINISHED"
    assert [trial.world_size for trial in done.result.trials] == [1, 2]
    for trial in done.result.trials:
        assert (trial.status, trial.iterations, trial.global_batch_size) == ("FINISHED", 8, 4)
        assert trial.images_per_second is not None and trial.images_per_second > 0
        assert trial.wall_images_per_second is not None
        assert trial.wall_images_per_second < trial.images_per_second
        assert [evaluation.iteration for evaluation in trial.evaluations] == [4, 8]
        assert all(evaluation.box_ap is not None and evaluation.mask_ap is not None for evaluation in trial.evaluations)
        assert trial.startup_seconds is not None and trial.startup_seconds > 0
        assert trial.device_name


def test_the_throughput_agrees_with_the_workers_own_logs(done: Done) -> None:
    for trial in done.result.trials:
        logs = sorted((done.run_dir / trial.name).glob("log.txt*"))
        assert len(logs) == trial.world_size
        closing = re.compile(r"Overall training speed: (\d+) iterations in \S+ \(([\d.]+) s / it\)")
        found = [closing.search(log.read_text(encoding="utf-8")) for log in logs]
        assert all(match and match[1] == "6" for match in found), "8 iterations less 2 of warm-up"
        slowest = max(float(match[2]) for match in found if match)
        assert trial.images_per_second == pytest.approx(4 / slowest, rel=0.02)


def test_strong_scaling_trains_the_same_images(done: Done) -> None:
    windows = [e for e, _ in Outbox(done.run_dir / FILE_NAME).read() if isinstance(e, StepsDone)]
    images = {trial.name: sum(w.num_images for w in windows if w.trial == trial.name) for trial in done.result.trials}
    assert set(images.values()) == {8 * 4}


def test_scaling_compares_with_one_worker(done: Done) -> None:
    one, two = done.result.scaling
    rates = [trial.images_per_second for trial in done.result.trials]
    assert one.speed_up == 1 and one.efficiency == 1
    assert rates[0] and rates[1]
    # The slowest worker of every window, not of the whole trial: at most twice its seconds with two workers.
    ratio = rates[1] / rates[0]
    assert 0.499 * ratio < two.speed_up < 1.001 * ratio
    assert two.efficiency == pytest.approx(two.speed_up / 2)


def test_the_command_ends_with_the_table_and_says_where_everything_is(done: Done) -> None:
    for words in ("reference-1xcpu", "reference-2xcpu", "published", "report", "make ui"):
        assert words in done.stdout
    assert "\x1b[" not in done.stdout, "no colour codes where there is no terminal"


def test_the_report_holds_table_reference_and_environment(done: Done) -> None:
    report = (done.run_dir / "report.md").read_text(encoding="utf-8")
    for words in ("reference-1xcpu", "55.26", "torch", "command"):
        assert words in report


def test_mlflow_holds_a_parent_and_a_child_per_trial(done: Done) -> None:
    parent = next(run for run in done.runs.values() if run.data.tags["kind"] == "experiment")
    for trial in done.result.trials:
        run = done.runs[trial.name]
        assert run.info.status == "FINISHED"
        assert run.info.run_id == trial.mlflow_run_id
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id == done.result.mlflow_run_id
        assert run.data.tags["world_size"] == str(trial.world_size)
        assert run.data.params["d2.SOLVER.IMS_PER_BATCH"] == "4"
        assert run.data.metrics["throughput/images_per_second"] == pytest.approx(trial.images_per_second)
        assert run.data.metrics["coco/box_ap"] == pytest.approx(trial.box_ap)
        artifacts = {file.path for file in done.client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "log.txt", "result.json"} <= artifacts
        assert {data.dataset.name for data in run.inputs.dataset_inputs} == {"generated_train", "generated_val"}
    assert parent.info.status == "FINISHED"
    assert done.runs["published"].data.metrics["coco/box_ap"] == 37.8


def test_mlflow_holds_the_curves_once(done: Done) -> None:
    for trial in done.result.trials:
        history = done.client.get_metric_history(str(trial.mlflow_run_id), "loss/total_loss")
        assert [point.step for point in history] == [2, 4, 6, 8]
        history = done.client.get_metric_history(str(trial.mlflow_run_id), "coco/box_ap")
        assert [point.step for point in history] == [4, 8]
        names = {name.split("/")[0] for name in done.runs[trial.name].data.metrics}
        assert {"loss", "throughput", "time", "coco", "system"} <= names


def test_a_logged_model_loads_as_its_readme_says_and_is_the_one_that_was_scored(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{done.folder / 'mlflow.db'}")
    trial = done.result.trials[0]
    (model,) = done.client.search_logged_models(
        [done.runs[trial.name].info.experiment_id], f"source_run_id = '{trial.mlflow_run_id}'"
    )
    folder = mlflow.artifacts.download_artifacts(f"models:/{model.model_id}", dst_path=str(tmp_path))
    code = textwrap.dedent(Path(folder, "README.md").read_text().split("\n\n", 1)[1].rsplit("\n\n", 1)[0])
    loaded = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    state = torch.load(Path(folder, "state.pt"), weights_only=True)
    only_in_checkpoints = ("ranks", EVALUATION_PENDING_KEY)
    assert state_sha256({k: v for k, v in state.items() if k not in only_in_checkpoints}) == trial.state_sha256
    (scored,) = (metric for metric in model.metrics if metric.key == "coco/box_ap")
    assert (scored.value, scored.step) == (pytest.approx(trial.box_ap), 8)
    assert (scored.run_id, scored.dataset_name) == (trial.mlflow_run_id, "generated_val")


def test_a_bundle_of_the_run_verifies(done: Done, tmp_path: Path) -> None:
    packed = run_command(done.run_dir, "--to", tmp_path / "b.zip", module="orchestrator.bundle", cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    verified = verify(tmp_path / "b.zip", tmp_path / "to")
    # Where somebody sets this machine's clock meanwhile, as the host of a virtual one may, stamps are not compared.
    clock_set = '"clock_changed"' in (done.run_dir / "events.jsonl").read_text()
    assert [each for each in verified.findings if not (clock_set and each.code == "log_unchecked")] == []
    assert verified.statements == ("files", "figures", "settings", "times", "logs")


def test_a_run_never_touches_an_older_one(done: Done) -> None:
    before = (done.run_dir / "results.json").read_bytes()
    again = run_command(done.folder / "tiny.yaml", "--output", done.run_dir, cwd=done.folder)
    assert again.returncode == 2
    assert "holds another run; name a new folder" in again.stderr
    assert (done.run_dir / "results.json").read_bytes() == before


def test_more_workers_than_cpus_is_said_at_once(tmp_path: Path) -> None:
    values = tiny_experiment(trials={"world_sizes": [64], "scaling": "weak", "reference_world_size": 1})
    completed = run_command(write_experiment(tmp_path, values), "--output", tmp_path / "run", cwd=tmp_path)
    assert completed.returncode == 2, completed.stdout + completed.stderr
    assert "64" in completed.stderr
    assert not (tmp_path / "run").exists()


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    values = tiny_experiment(protocol={"kind": "throughput", "iterations": 4, "warmup_iterations": 0})
    path = write_experiment(tmp_path, values)
    completed = run_command(path, "--output", tmp_path / "run", "--json", cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    (trial,) = json.loads(completed.stdout)["trials"]
    assert trial["evaluations"] == []
    assert (trial["box_ap"], trial["time_to_train_seconds"]) == (None, None)
    assert trial["iterations"] == 4
