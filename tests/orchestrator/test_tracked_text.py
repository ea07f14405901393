"""Any text can be tracked: it is escaped or cut in one place, and runs are found again by it in a real store."""

from __future__ import annotations

import re
import shutil
import uuid
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient

from orchestrator.publish import track_folder
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from orchestrator.tracking.driver import Tracker
from orchestrator.tracking.mlflow_runs import MlflowRuns
from orchestrator.tracking.text import fit
from tests.builders.metric_rows import repeated_points
from tests.builders.run_folder import made_experiment, make_run
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.events import RunEnded, RunStarted, WorkerStarted

SIGNS = "'\"`\\%;-/*()$#?&=\x00\x01\n\t \ud800\udfffäß—’猫🙂<>|.,:_[]{}~^!@"
WORDS = ("NVIDIA's own figure", "'; DROP TABLE runs; --", "a\\", "' OR '1'='1", '"', "`", "", "%27", "x" * 9000)
TEXTS = st.one_of(
    st.text(st.sampled_from(SIGNS), max_size=20), st.text(st.characters(codec=None), max_size=300),
    st.sampled_from(WORDS),
)  # fmt: skip


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def runs(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> MlflowRuns:
    """A store that every example writes to."""
    folder = tmp_path_factory.mktemp("examples")
    uri = f"sqlite:///{shutil.copy(empty, folder / 'mlflow.db')}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("texts", artifact_location=(folder / "artifacts").as_uri())
    return MlflowRuns(uri, folder, {"experiment_id": experiment, "runs": {}})


@settings(max_examples=25)
@given(first=TEXTS, second=TEXTS)
@example(first="NVIDIA's own figure", second="NVIDIA%27s own figure")
@example(first="x" * 9000, second="x" * 9001)
@example(first="a\\", second="a")
def test_a_run_is_found_again_by_any_key_and_never_by_another_one(runs: MlflowRuns, first: str, second: str) -> None:
    one = runs._run(f"reference/{first}", first, 0.0, {"source": first})
    assert runs._run(f"reference/{first}", first, 0.0, {}) == one
    assert (runs._run(f"reference/{second}", second, 0.0, {}) == one) == (first == second)
    runs._tag(one, {"note": second, second: first})
    runs._params(one, {f"{first}{uuid.uuid4().hex}"[-250:]: second})  # a param cannot be changed
    runs._figures(one, {first: 1.0, second: 1.0})


@given(text=TEXTS)
def test_what_fits_stays_as_it_is_and_is_never_changed_a_second_time(text: str) -> None:
    for use in ("name", "key", "param", "tag"):
        assert fit(fit(text, use), use) == fit(text, use)
        fit(text, use).encode()
    assert not re.search(r"['\"`\\\x00-\x1f]", fit(text, "filter")) and len(fit(text, "filter")) <= 250


def test_ordinary_keys_are_those_of_older_versions() -> None:
    for key in ("reference/demo/seed, 1 x V100 (2020), fp16 – 8×", "demo/0a1b2c/reference-2xcpu-weak-seed7"):
        assert fit(key, "filter") == key


QUOTED = [
    {"name": "NVIDIA's own figure", "world_size": 8, "images_per_second": 60.0, "source": 'the vendor\'s "page"\x00'},
    {"name": "`--'; \\", "world_size": 1, "source": "s" * 9000},
    {"name": "NVIDIA's own figure", "world_size": 16, "images_per_second": 110.0},
]


def test_a_run_with_quotes_in_its_reference_rows_is_tracked_once(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty, tmp_path / "mlflow.db")
    run = make_run(tmp_path / "run", made_experiment(reference_rows=QUOTED, description='it\'s "all" `quoted`\\'))
    for name in ("tracking.json", "nothing.json"):  # the second time, everything is there already
        track_folder(run)
        (run / name).unlink(missing_ok=True)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = client.search_runs(["1"], "tags.kind = 'reference'")
    assert sorted(each.info.run_name for each in found) == sorted(
        [*(row["name"] for row in QUOTED[:2]), "NVIDIA's own figure (2)"]
    )
    assert {each.info.status for each in client.search_runs(["1"])} == {"FINISHED"}


def test_a_log_of_any_file_name_and_a_host_of_any_name_are_tracked(empty: Path, tmp_path: Path) -> None:
    shutil.copy(empty, tmp_path / "mlflow.db")
    made = TrialBuilder(plan(world_size=1, trial_dir=str(tmp_path / 'it\'s "a" trial #1?')))
    Path(made.trial.trial_dir).mkdir()
    Path(made.trial.trial_dir, "log.txt.it's #1?%41").write_text("a line\n")
    made.started()
    values = {
        "node_id": "n",
        "pid": 1,
        "local_rank": 0,
        "device_name": "it's 'a' \"CPU\"\x00",
        "device_memory_gib": None,
    }
    made.emit(WorkerStarted, 1.0, host="fe80::1%eth0'", versions={'it\'s/../a "package"': "1'"}, **values)
    made.loop(2.0)
    made.steps(4.0, 0, 1.0, 1.0, losses={"loss_it's": 1.0, "../loss": 2.0, "total_loss": 3.0})
    made.ended(6.0, "FAILED", "it's \x00 over")
    driver = {"trial": "", "attempt": 0, "rank": -1, "time": 1.0}
    outbox = Outbox(tmp_path / FILE_NAME)
    experiment = made_experiment().model_dump(mode="json")
    outbox.append(RunStarted(**driver, experiment=experiment, run_id="demo/it's", tags={"run.command": "echo 'it`s'"}))
    outbox.append(*made.events, RunEnded(**driver, status="FAILED"))
    tracker = Tracker(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert tracker.sync()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(tracker.run_ids()[made.trial.name])
    assert run.info.status == "FAILED" and run.data.tags["reason"] == "it's %00 over"
    assert run.data.metrics["loss/it_s"] == 1.0 and run.data.metrics["loss/total_loss"] == 3.0
    assert [file.path for file in client.list_artifacts(run.info.run_id) if file.path.startswith("log")]


def test_the_summary_of_an_end_with_fewer_iterations_is_the_latest(empty: Path, tmp_path: Path) -> None:
    """It failed after 4 iterations, was resumed from the beginning, and stopped after 2."""
    shutil.copy(empty, tmp_path / "mlflow.db")
    made = TrialBuilder(plan(world_size=1, trial_dir=str(tmp_path)))
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    made.steps(6.0, 0, 1.0, 1.0, 1.0, 1.0)
    made.ended(7.0, "FAILED", "the disk was full")
    made.restarted(100.0, 4)
    made.workers(101.0)
    made.loop(102.0)
    made.steps(104.0, 0, 1.0, 1.0)
    made.ended(105.0, "KILLED", "stopped by the user")
    driver = {"trial": "", "attempt": 0, "rank": -1, "time": 1.0}
    outbox = Outbox(tmp_path / FILE_NAME)
    outbox.append(RunStarted(**driver, experiment=made_experiment().model_dump(mode="json"), run_id="r", tags={}))
    outbox.append(*made.events, RunEnded(**driver, status="KILLED"))
    tracker = Tracker(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert tracker.sync()
    run = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(tracker.run_ids()[made.trial.name])
    assert run.data.metrics["throughput/wall_images_per_second"] == pytest.approx(2 * 4 / (104 - 2))


def test_a_resumed_run_has_every_metric_once_per_step(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty, tmp_path / "mlflow.db")
    run = make_run(tmp_path / "run")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert Tracker(run, uri).sync()
    outbox = Outbox(run / FILE_NAME)
    events = [event for event, _ in outbox.read()]
    started = next(event for event in events if isinstance(event, RunStarted))
    last = next(event for event in reversed(events) if event.trial)
    later = {"trial": last.trial, "attempt": last.attempt + 1, "time": last.time + 60}
    ended = type(last)(**{**vars(last), **later})
    # The driver is started again although nothing is left to train: trial and run end at the same iteration again.
    outbox.append(
        RunStarted(**{**vars(started), "attempt": 1}), ended, RunEnded(**{**vars(events[-1]), "time": ended.time})
    )
    assert Tracker(run, uri).sync()
    assert repeated_points(tmp_path / "mlflow.db") == []
    client = MlflowClient(uri)
    (trial_run,) = client.search_runs(["1"], f"attributes.run_name = '{last.trial}'")
    ends = client.get_metric_history(trial_run.info.run_id, "throughput/images_per_second")
    assert len(ends) == 2 and ends[1].step == ends[0].step + 1
    windows = client.get_metric_history(trial_run.info.run_id, "throughput/window_images_per_second")
    assert len(windows) > 10 and len({point.step for point in windows}) == len(windows)
