"""A run's folder read back: also one of release 0.1, whose files are written out here as that release wrote them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import drive
from orchestrator.drive import Request
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.figures.trial import trial_result
from orchestrator.runlog.folder import EarlierRun, check_unused, read_earlier_run, read_run_folder
from orchestrator.runlog.lock import LockError, only_driver
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.checkpoints import save, store
from tests.builders.commands import ROOT
from tests.builders.experiments import tiny_experiment
from trainers.contract.events import LoopFinished, RunEnded, StepsDone, WorkerStarted

DRIVER = {"trial": "", "attempt": 0, "rank": -1, "time": 2000.0}

RECIPE = (
    '{"precision":"fp32","tf32":false,"channels_last":false,"compile":false,"winograd":false,"sparse_pooling":false,'
    '"mapper":"detectron2","packed_masks":false,"cached_annotations":false,"batched_clipping":false,'
    '"fused_optimizer":false,"kept_memory":false,"quiet_heads":false,"batched_proposals":false,'
    '"gradient_views":false,"pinned_loader":false,"batched_encoding":false,"evaluation_batch":1,'
    '"overlapped_evaluation":false,"scorer":"pycocotools"}'
)
PLAN = (
    '{"experiment":"old","name":"t","world_size":2,"num_nodes":null,"recipe_name":"plain","recipe":' + RECIPE + ","
    '"seed":0,"scaling":"weak","protocol":"throughput","config_file":"","overrides":{},"weights":null,'
    '"weights_sha256":null,"train":{"name":"unknown","annotations":"","images":""},'
    '"val":{"name":"unknown","annotations":"","images":""},"num_classes":null,"solver":{"global_batch_size":4,'
    '"base_lr":0.01,"max_iter":40,"steps":[60,70],"warmup_iters":10,"eval_period":0,"evaluate_at_end":true,'
    '"checkpoint_period":0},"throughput_warmup_iters":20,"target_box_ap":null,"target_mask_ap":null,'
    '"stop_at_target":false,"device":"cpu","cpus_per_worker":1,"loader_workers":0,"log_period":20,'
    '"trial_dir":"FOLDER/t","checkpoint_dir":"","keep_checkpoints":1,"timeouts":{},"survive_storage":false,'
    '"price_per_accelerator_hour":null,"min_workers":null,"most_loader_workers":0}'
)
EVENTS = f"""\
{{"kind":"run_started","trial":"","attempt":0,"rank":-1,"time":1000.0,"experiment":{{"name":"old","data":\
{{"generated":{{"num_train":8,"num_val":8,"size":96}}}}}},"run_id":"old/1","tags":{{}}}}
{{"kind":"trial_started","trial":"t","attempt":0,"rank":-1,"time":1000.0,"plan":{PLAN}}}
{{"kind":"worker_started","trial":"t","attempt":0,"rank":0,"time":1000.0,"host":"unknown","node_id":"","pid":0,\
"local_rank":0,"device_name":"CPU","device_memory_gib":null,"versions":{{"torch":"1.9.0"}},"host_processor":"",\
"host_cores":null,"host_memory_gib":null,"operating_system":"","world_size":0}}
{{"kind":"loop_started","trial":"t","attempt":0,"rank":0,"time":1010.0,"iteration":0,"num_train_images":40,\
"num_val_images":0,"setup_seconds":10.0,"config_yaml":"","restored_from":""}}
{{"kind":"steps_done","trial":"t","attempt":0,"rank":0,"time":1020.0,"first_iteration":0,"iteration":20,\
"num_images":80,"seconds":10.0,"step_seconds":[],"data_seconds":[],"part_seconds":{{"data":1.0}},\
"losses":{{"total_loss":1.5}},"learning_rate":0.0,"peak_memory_gib":0.0,"step_part_seconds":{{}},"num_ranks":2}}
{{"kind":"steps_done","trial":"t","attempt":0,"rank":0,"time":1030.0,"first_iteration":20,"iteration":40,\
"num_images":80,"seconds":10.0,"step_seconds":[],"data_seconds":[],"part_seconds":{{"data":1.0}},\
"losses":{{"total_loss":1.5}},"learning_rate":0.0,"peak_memory_gib":0.0,"step_part_seconds":{{}},"num_ranks":2}}
{{"kind":"log_replayed","trial":"t","attempt":0,"rank":-1,"time":1030.0,"step_seconds":0.5,"step_iterations":38,\
"total_seconds":64.0,"unknown":["peak_memory_gib","seed","state_sha256","checkpoint_seconds","num_val_images"],\
"notes":[]}}
{{"kind":"loop_finished","trial":"t","attempt":0,"rank":0,"time":1030.0,"iteration":40,"reason":"max_iter",\
"state_sha256":""}}
{{"kind":"trial_ended","trial":"t","attempt":0,"rank":-1,"time":1030.0,"status":"FINISHED","reason":""}}
"""
"""A log replayed by release 0.1, which filled in what the log does not have."""

RESULTS = """\
{"schema_version": 1, "experiment": "old", "description": "", "status": "FINISHED",
 "started": "2026-01-01T00:00:00+00:00", "trials": [{"name": "t", "world_size": 2, "status": "FINISHED",
 "rate_curve": [{"first_iteration": 20, "iteration": 40, "num_images": 80.0, "seconds": 10.0,
 "images_per_second": 8.0}], "rate_curve_source": "timestamps", "images_per_second": 8.0}]}
"""


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    (tmp_path / FILE_NAME).write_text(EVENTS.replace("FOLDER", str(tmp_path)))
    (tmp_path / "results.json").write_text(RESULTS)
    return tmp_path


def test_what_an_old_log_did_not_have_is_none_and_never_0(old_folder):
    (trial,) = read_run_folder(old_folder).trials
    steps = [e for e in trial.events if isinstance(e, StepsDone)]
    assert [(e.learning_rate, e.peak_memory_gib) for e in steps] == [(None, None)] * 2
    assert [e.world_size for e in trial.events if isinstance(e, WorkerStarted)] == [None]
    assert [e.state_sha256 for e in trial.events if isinstance(e, LoopFinished)] == [None]
    assert trial.plan is not None
    result = trial_result(trial.plan, trial.events)
    assert (result.seed, result.peak_memory_gib, result.state_sha256, result.num_val_images) == (None,) * 4
    assert result.checkpoint_seconds is None and result.num_train_images == 40
    assert result.images_per_second == pytest.approx(4 / 0.5)
    assert result.wall_images_per_second == pytest.approx(40 * 4 / 64)
    assert result.throughput_warmup_iters == 2


def test_an_old_results_file_is_read_as_it_was_written(old_folder):
    result = read_run_folder(old_folder).result
    assert result.trials[0].images_per_second == 8.0
    assert result.trials[0].rate_curve[0].images_per_second == 8.0
    result.write(old_folder / "results.json")
    assert read_run_folder(old_folder).result == result
    assert '"images_per_second": 8.0' in (old_folder / "results.json").read_text()


def test_a_results_file_of_a_later_version_is_refused_by_name(old_folder):
    (old_folder / "results.json").write_text(RESULTS.replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(ValueError, match="not results that this version reads"):
        read_run_folder(old_folder)


def test_a_run_that_was_interrupted_is_found_again(old_folder):
    run = read_earlier_run(old_folder)
    assert (run.experiment.name, run.started.run_id, run.num_starts, run.ended) == ("old", "old/1", 1, False)
    assert run.finished == {"t"} and run.plans["t"].world_size == 2


def test_a_run_that_was_moved_is_not_resumed(old_folder, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "run"
    old_folder.rename(moved)
    with pytest.raises(SpecError, match="move it back there"):
        read_earlier_run(moved)
    assert read_run_folder(moved).trials[0].folder == moved / "t"


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ('"num_classes":null,', ""),
        ('"num_classes":null,', '"num_classes":null,"of_a_later_version":1,'),
        ('"winograd":false,', '"of_a_later_version":false,'),
        ('"max_iter":40,', ""),
        ('"train":{', '"train":5,"was":{'),
        ('"max_iter":40,', '"max_iter":"40",'),
        ('"experiment":"old",', '"source":"/log.txt",'),
        (f'"plan":{PLAN}', '"plan":5'),
    ],
)
def test_a_plan_that_this_version_does_not_read_is_refused_in_a_line(old_folder, written, instead):
    text = (old_folder / FILE_NAME).read_text()
    written = written.replace("FOLDER", str(old_folder))
    assert written in text
    (old_folder / FILE_NAME).write_text(text.replace(written, instead))
    with pytest.raises(SpecError, match=r"events.jsonl: not plans that this version reads.+\(\w+Error: [^\n]+\)$"):
        read_earlier_run(old_folder)
    with pytest.raises(ValueError, match=r"events.jsonl: not plans that this version reads.+\(\w+Error: [^\n]+\)$"):
        read_run_folder(old_folder)


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    with pytest.raises(SpecError, match="no run was started in this folder"):
        read_earlier_run(tmp_path)


def test_a_second_driver_is_refused_with_the_process_of_the_first(tmp_path):
    with (
        only_driver(tmp_path),
        pytest.raises(SpecError, match=f"process {os.getpid()} on .* is still running it"),
        only_driver(tmp_path),
    ):
        pass
    with only_driver(tmp_path):
        pass


def folder_in_use(
    run_dir: Path, earlier: EarlierRun | None, monkeypatch: pytest.MonkeyPatch, use: Callable[[], object]
):
    """Drives a run, while somebody else uses its folder during the checks."""

    def preflight(*_: object, **__: object) -> tuple[list[object], list[object], dict[str, object]]:
        use()
        return [], [], {}

    monkeypatch.setattr(drive, "_preflight", preflight)
    monkeypatch.setattr(drive, "_execute", lambda *_: 0)
    experiment = Experiment.model_validate(tiny_experiment())
    request = Request(experiment, run_dir, earlier, Console(), True, None, False, False)
    return drive.run(request, lambda *_: None)


def test_a_run_that_others_began_during_the_checks_is_not_written_into(old_folder, tmp_path_factory, monkeypatch):
    new = tmp_path_factory.mktemp("new")
    assert folder_in_use(new / "unused", None, monkeypatch, lambda: None) == 0
    begin = partial(shutil.copy, old_folder / FILE_NAME, new)
    with pytest.raises(SpecError, match=r"--output .* holds another run"):
        folder_in_use(new, None, monkeypatch, begin)


def test_a_run_whose_events_are_gone_leaves_no_checkpoints_to_a_new_one(old_folder, tmp_path):
    save(store(tmp_path / "t" / "checkpoints"), 4)
    check_unused(tmp_path, read_earlier_run(old_folder))
    (tmp_path / "results.json").unlink()
    for leave in ((tmp_path / FILE_NAME).touch, lambda: (tmp_path / FILE_NAME).write_bytes(b"{"), lambda: None):
        (tmp_path / FILE_NAME).unlink(missing_ok=True)
        leave()
        with pytest.raises(SpecError, match=rf"--output {tmp_path}: holds the checkpoints of another run .*t/checkpo"):
            check_unused(tmp_path, None)
    shutil.rmtree(tmp_path / "t" / "checkpoints" / "iter_0000004")
    check_unused(tmp_path, None)


def test_a_run_that_others_went_on_with_during_the_checks_is_not_gone_on_with(old_folder, monkeypatch):
    earlier = read_earlier_run(old_folder)
    assert folder_in_use(old_folder, earlier, monkeypatch, lambda: None) == 0
    go_on = partial(Outbox(old_folder / FILE_NAME).append, RunEnded(**DRIVER, status="FINISHED"))
    with pytest.raises(SpecError, match="another process has gone on with the run meanwhile; give the command again"):
        folder_in_use(old_folder, earlier, monkeypatch, go_on)
    assert folder_in_use(old_folder, read_earlier_run(old_folder), monkeypatch, lambda: None) == 0


@pytest.mark.parametrize(("number", "words"), [(errno.ENOLCK, "No locks available"), (errno.ENOSYS, "not implemented")])
def test_a_file_system_without_locks_is_refused_with_its_reason(number, words, tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(LockError, match=rf"cannot be locked: .*{words}"), only_driver(tmp_path):
        pass


def test_the_lock_of_a_driver_that_died_is_free(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from orchestrator.runlog.lock import LockError, only_driver\n"
        "with only_driver(Path(sys.argv[1])): os._exit(3)"
    )
    died = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=False)
    assert died.returncode == 3
    with only_driver(tmp_path):
        pass
