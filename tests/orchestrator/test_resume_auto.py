"""`--resume auto`: the same command begins a run, and goes on with it where the job is started again."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest

from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.runlog import lock
from orchestrator.runlog.folder import read_begun_run
from orchestrator.runlog.lock import only_driver
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.commands import run_command
from tests.builders.experiments import tiny_experiment, write_experiment
from trainers.contract.events import Event, RunEnded, RunStarted, TrialEnded


def parse(**changes: object) -> Experiment:
    return parse_experiment(tiny_experiment(**changes), where="tiny.yaml")


def begun(folder: Path, *ends: Event, **changes: object) -> Experiment:
    """A run of one trial, begun and ended so; returns its experiment with some sections changed."""
    driver = {"trial": "", "attempt": 0, "rank": -1, "time": 1.0}
    values = {"experiment": parse().model_dump(mode="json"), "run_id": "tiny/1", "tags": {}}
    folder.mkdir(exist_ok=True)
    Outbox(folder / FILE_NAME).append(RunStarted(**driver, **values), *ends)
    return parse(**changes)


ENDS = {"trial": "", "attempt": 0, "rank": -1, "time": 2.0}
FAILED = (
    TrialEnded(**{**ENDS, "trial": "t"}, status="FAILED", reason="bad_input: x.jpg"),
    RunEnded(**ENDS, status="FAILED"),
)


def test_a_job_that_is_started_again_begins_its_run_once_and_goes_on_with_it(tmp_path):
    assert read_begun_run(tmp_path / "none", parse()) is None
    (tmp_path / FILE_NAME).touch()
    assert read_begun_run(tmp_path, parse()) is None, "cut off before its first line"
    assert read_begun_run(tmp_path / ("n" * 300), parse()) is None, "a folder that cannot be"
    found = read_begun_run(tmp_path, begun(tmp_path))
    assert found and (found.started.run_id, found.changes, found.failed) == ("tiny/1", {}, "")


def test_a_job_waits_for_the_lock_of_a_host_that_was_lost_and_not_for_a_driver_here(tmp_path, monkeypatch):
    given = begun(tmp_path)
    monkeypatch.setattr(lock, "LOCK_TIMEOUT_SECONDS", 0.0)
    monkeypatch.setattr(lock, "TAKE_OVER_SECONDS", 600.0)
    with only_driver(tmp_path), pytest.raises(SpecError, match=r"process \d+ on .+ is still running it"):
        read_begun_run(tmp_path, given)
    with only_driver(tmp_path):
        (tmp_path / lock.OWNER).write_text('{"pid": 7, "host": "lost"}')
        job = Thread(target=lambda: found.append(read_begun_run(tmp_path, given)))
        found: list[object] = []
        job.start()
        job.join(0.5)
        assert job.is_alive() and not found, "the file server still holds its lock"
    job.join()
    assert found != [None]


def test_a_job_takes_over_what_its_file_says_now_of_where_and_how_safely(tmp_path):
    found = read_begun_run(tmp_path, begun(tmp_path, faults={"max_failures": 9}, tracking={"uri": "http://u:p@host"}))
    assert found and found.changes == {"faults.max_failures": 9, "tracking.uri": "http://host"}
    assert found.experiment.faults.max_failures == 9 and found.experiment.tracking.uri == "http://u:p@host"


def test_a_job_uses_the_password_that_its_command_gives_and_tells_of_no_change(tmp_path):
    begun(tmp_path)
    Outbox(tmp_path / FILE_NAME).append(
        RunStarted(
            trial="", attempt=1, rank=-1, time=2.0, run_id="tiny/1", tags={},
            experiment=parse(tracking={"uri": "http://host"}).model_dump(mode="json"),
        )
    )  # fmt: skip
    found = read_begun_run(tmp_path, parse(tracking={"uri": "http://u:p@host"}, description="said better"))
    assert found and (found.experiment.tracking.uri, found.changes) == ("http://u:p@host", {})


def test_a_job_may_take_back_what_it_had_reserved_for_evaluations(tmp_path):
    resources = {"device": "cpu", "cpus_per_worker": 1}
    begun(tmp_path)
    more = parse(resources={**resources, "evaluation": {"cpus": 1}})
    found = read_begun_run(tmp_path, more)
    assert found and found.experiment.resources == more.resources
    Outbox(tmp_path / FILE_NAME).append(
        RunStarted(
            trial="", attempt=1, rank=-1, time=2.0, run_id="tiny/1", tags={}, experiment=more.model_dump(mode="json")
        )
    )
    found = read_begun_run(tmp_path, parse(resources=resources))
    assert found and found.experiment.resources.evaluation is None


def test_a_job_does_not_go_on_with_the_run_of_another_experiment(tmp_path):
    with pytest.raises(SpecError, match=r"auto: .*another experiment: trials.seeds is \[0\] there and \[7\] here"):
        read_begun_run(tmp_path, begun(tmp_path, trials={"world_sizes": [1], "scaling": "strong", "seeds": [7]}))


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        (FAILED, "t: bad_input: x.jpg"),
        (FAILED[:1], ""),
        ((FAILED[0], RunEnded(**ENDS, status="FAILED", reason="the Ray cluster was lost")), ""),
        ((RunEnded(**ENDS, status="KILLED"),), ""),
    ],
    ids=["failed by itself", "its driver died", "lost its cluster", "stopped"],
)
def test_only_a_run_that_failed_by_itself_is_not_tried_again_by_itself(tmp_path, ends, reason):
    found = read_begun_run(tmp_path, begun(tmp_path, *ends))
    assert found and found.failed == reason


def test_a_job_that_is_to_go_on_by_itself_names_its_folder(tmp_path):
    done = run_command("--resume", "auto", cwd=tmp_path)
    assert done.returncode == 2 and "give --output FOLDER, the same at every start" in done.stderr
    begun(tmp_path / "run", *FAILED)
    done = run_command(
        write_experiment(tmp_path, tiny_experiment()), "--output", "run", "--resume", "auto", cwd=tmp_path
    )
    assert done.returncode == 1 and "bad_input: x.jpg) and would again" in done.stdout


@pytest.mark.parametrize("options", [(), ("--resume", "auto"), ("--dry-run",), ("--preflight",)])
def test_a_folder_that_cannot_be_is_refused_in_a_sentence(tmp_path, options):
    output = tmp_path / ("n" * 300)
    done = run_command(write_experiment(tmp_path, tiny_experiment()), "--output", output, *options, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error {output}: it cannot be read: File name too long: {output / 'results.json'}\n"
