"""What a replayed log leaves: a record, a report, and a run in MLflow that holds what the log holds."""

import json
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from typer import Exit

from orchestrator.experiment.spec import SpecError
from orchestrator.replay.__main__ import main
from orchestrator.replay.record import experiment_result, replay, track, write
from orchestrator.runlog.folder import read_earlier_run
from orchestrator.tracking.driver import TrackingError
from tests.builders.commands import run_command
from tests.builders.logs import MadeLog, whole_run


def test_the_command_prints_a_record_that_can_be_read_back(tmp_path):
    log = whole_run().write(tmp_path / "log.txt")
    done = run_command(log, "--json", "--output", tmp_path / "out", module="orchestrator.replay", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["trials"][0]["time_to_train_seconds"] == 73
    assert json.loads((tmp_path / "out" / "results.json").read_text())["trials"] == record["trials"]
    assert "37.7" not in done.stdout.splitlines()[0]
    for name in ("report.md", "table.csv", "ai_rank.md"):
        assert (tmp_path / "out" / name).exists()


def test_the_command_refuses_what_is_no_log_with_exit_code_2(tmp_path):
    (tmp_path / "x.txt").write_text("hello\n")
    done = run_command("x.txt", module="orchestrator.replay", cwd=tmp_path)
    assert done.returncode == 2 and "not a detectron2 log" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["target_box_ap", "target_mask_ap"])
@pytest.mark.parametrize("ap", [-1.0, 100.5, float("nan"), float("inf")])
def test_a_target_that_is_no_ap_is_refused_with_exit_code_2(tmp_path, capsys, option, ap):
    with pytest.raises(Exit) as raised:
        main([whole_run().write(tmp_path / "log.txt")], **{option: ap})
    assert raised.value.exit_code == 2
    assert f"--{option.replace('_', '-')} is {ap:g}: AP is 0 to 100" in capsys.readouterr().err


def test_a_target_on_0_to_1_is_refused_with_the_one_that_is_meant(tmp_path, capsys):
    with pytest.raises(Exit) as raised:
        main([whole_run().write(tmp_path / "log.txt")], target_box_ap=0.377)
    assert raised.value.exit_code == 2
    assert "--target-box-ap is 0.377: AP is on 0 to 100 here. Is 37.7 meant?" in capsys.readouterr().err


def test_a_reference_run_is_tracked_once_with_its_curves(tmp_path):
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    log = whole_run().write(tmp_path / "log.txt")
    for name in ("first", "second"):
        replayed = replay([log])
        result = experiment_result("seen", replayed, [])
        write(result, replayed, tmp_path / name)
        track(result, replayed, tmp_path / name, store)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("seen")
    runs = client.search_runs([experiment.experiment_id])
    trials = [run for run in runs if run.data.tags["kind"] == "trial"]
    assert len(runs) == 2 and len(trials) == 1
    assert trials[0].data.tags["run.kind"] == "reference"
    assert trials[0].data.metrics["time/to_train_seconds"] == 73
    curve = client.get_metric_history(trials[0].info.run_id, "loss/total_loss")
    assert [point.step for point in curve] == [20, 40, 60, 80]
    aps = client.get_metric_history(trials[0].info.run_id, "coco/box_ap")
    assert [(point.step, point.value) for point in aps][:2] == [(40, 30.0), (80, 38.1234)]


@pytest.mark.parametrize(
    ("errors", "raised", "status"),
    [
        ([OSError] * 9, TrackingError, "FAILED"),
        ([KeyboardInterrupt], KeyboardInterrupt, "FINISHED"),
        ([KeyboardInterrupt, *[OSError] * 9], KeyboardInterrupt, "FAILED"),
    ],
)
def test_a_replay_that_cannot_be_tracked_or_is_cut_off_leaves_no_run_that_is_running(
    errors, raised, status, tmp_path, monkeypatch
):
    log_artifact, left = MlflowClient.log_artifact, list(errors)

    def fail_first(*args):
        if left:
            raise left.pop(0)("no room")
        log_artifact(*args)

    monkeypatch.setattr(MlflowClient, "log_artifact", fail_first)
    with pytest.raises(raised):
        _tracked(whole_run(), tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert {run.info.status for run in runs} == {status}


def _tracked(made: MadeLog, folder: Path) -> tuple[MlflowClient, Run]:
    return _tracked_file(made.write(folder / "log.txt"), folder)


def _tracked_file(log: Path, folder: Path) -> tuple[MlflowClient, Run]:
    """A log replayed into a store; the run of its only trial there."""
    store = f"sqlite:///{folder / 'mlflow.db'}"
    replayed = replay([log])
    result = experiment_result("seen", replayed, [])
    write(result, replayed, folder / "out")
    track(result, replayed, folder / "out", store)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("seen")
    (run,) = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
    return client, run


def test_a_log_without_rate_and_memory_has_neither_anywhere(tmp_path):
    client, run = _tracked(whole_run(gpu=False), tmp_path)
    assert "learning_rate" not in run.data.metrics and "memory/peak_gib" not in run.data.metrics
    assert run.data.metrics["throughput/images_per_second"] == 8.0
    assert [p.step for p in client.get_metric_history(run.info.run_id, "loss/total_loss")] == [20, 40, 60, 80]
    record = json.loads((tmp_path / "out" / "results.json").read_text())["trials"][0]
    assert record["peak_memory_gib"] is None and record["step_seconds"] == {"p50": None, "p95": None, "p99": None}
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Nothing to show: no learning rate is known." in html


def test_only_what_the_log_prints_is_sent_to_mlflow(tmp_path):
    _, run = _tracked(whole_run(), tmp_path)
    params, tags = run.data.params, run.data.tags
    assert (params["workers"], params["plan.solver.global_batch_size"], params["plan.seed"]) == ("2", "4", "11")
    assert "None" not in params.values()
    made_up = ("plan.recipe.", "plan.cpus_per_worker", "plan.loader_workers", "plan.config_file", "plan.num_classes")
    assert not [name for name in params if name.startswith(made_up)]
    assert tags["device_name"] == "Made GPU" and "host.0" not in tags and tags["device"] == "cuda"


def test_a_log_without_its_head_gives_mlflow_no_throughput_of_zero(tmp_path):
    made = MadeLog(gpu=False)
    made.iteration = 1000
    _, run = _tracked(made.progress().progress(), tmp_path)
    zeros = {name for name, value in run.data.metrics.items() if value == 0}
    assert zeros == {"time/downtime_seconds", "restarts"}
    assert "throughput/images_per_second" not in run.data.metrics and "device" not in run.data.tags


def test_metrics_json_gives_mlflow_ap_and_no_time(tmp_path):
    rows = [{"iteration": 19, "total_loss": 1.0}, {"iteration": 39, "total_loss": 0.9, "bbox/AP": 12.5}]
    log = tmp_path / "metrics.json"
    log.write_text("\n".join(map(json.dumps, rows)) + "\n")
    _, run = _tracked_file(log, tmp_path)
    assert run.data.metrics["coco/box_ap"] == 12.5
    assert {name for name in run.data.metrics if name.startswith("time/")} == {"time/downtime_seconds"}
    (trial,) = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert (trial / "ai_rank.log").read_text() == "" and not (trial / "mllog.txt").exists()
    assert "times are known" in (tmp_path / "out" / "report.html").read_text()


def test_a_replayed_run_is_not_resumed_and_the_command_that_tracks_it_is_named(tmp_path):
    _tracked(whole_run(), tmp_path)
    with pytest.raises(SpecError, match=r"replayed from a log .* --track` tracks the run of a log"):
        read_earlier_run(tmp_path / "out")


def test_a_replayed_run_that_was_not_tracked_names_the_command_too(tmp_path):
    replayed = replay([whole_run().write(tmp_path / "log.txt")])
    write(experiment_result("seen", replayed, []), replayed, tmp_path / "out")
    with pytest.raises(SpecError, match=r"no run was started .* --track` tracks the run of a log"):
        read_earlier_run(tmp_path / "out")


def test_what_cannot_be_written_is_one_line_with_exit_code_2(tmp_path):
    log = whole_run().write(tmp_path / "log.txt")
    (tmp_path / "file").write_text("")
    done = run_command(log, "--output", tmp_path / "file" / "out", module="orchestrator.replay", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error:")


def test_an_evaluation_that_found_nothing_has_no_ap_in_mlflow_table_and_record(tmp_path):
    rows = [{"iteration": 19, "total_loss": 1.0}, {"iteration": 39, "total_loss": 0.9, "bbox/AP": -1.0}]
    log = tmp_path / "metrics.json"
    log.write_text("\n".join(map(json.dumps, rows)) + "\n")
    _, run = _tracked_file(log, tmp_path)
    assert not [name for name in run.data.metrics if name.startswith("coco/")]
    assert "-1" not in (tmp_path / "out" / "table.csv").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["trials"][0]["box_ap"] is None


@pytest.mark.shared
def test_the_seeds_logs_give_the_published_figures(shared_data):
    logs = sorted((shared_data / "seed_logs").glob("*.log"))
    result = experiment_result("seed", replay(logs), [])
    one, eight = result.trials
    assert round(one.images_per_second, 2) == 9.66
    assert round(eight.images_per_second, 2) == 55.27
    assert round(eight.wall_images_per_second, 2) == 52.44
    assert eight.time_to_box_target_seconds == 22898 and eight.time_to_train_seconds == 22922
    assert eight.scored_iteration == 75000
    assert (round(eight.scored_box_ap, 2), round(eight.scored_mask_ap, 2)) == (37.83, 34.48)
    assert eight.evaluations[-1].iteration == 90000
    assert (round(eight.box_ap, 2), round(eight.mask_ap, 2)) == (38.64, 35.29)
    stalls = [e.seconds for e in eight.evaluations]
    assert len(stalls) == 13 and round(sum(stalls) / 13) == 109
    assert (one.startup_seconds, eight.startup_seconds) == (49, 64)
    assert round(100 * eight.data_wait_share, 1) == 7.1
    assert round(100 * result.scaling[1].efficiency, 1) == 71.5
    assert one.notes == eight.notes == []
