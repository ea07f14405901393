"""Faults of a worker: what is started again ends as if nothing had happened, what is not says why."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.experiment.spec import Faults, Timeouts
from orchestrator.figures.trial import trial_result
from tests.builders.fault_bench import ITERATIONS, Bench, Outcome, experiment
from tests.builders.training import MODELS
from tests.builders.waiting import wait_for
from trainers.contract.events import (
    CheckpointSaved,
    CheckpointSkipped,
    Event,
    LoopFinished,
    LoopStarted,
    StepsDone,
    TrialRestarted,
    WorkerFailed,
    WorkerStarted,
)
from trainers.faults import Fault

pytestmark = pytest.mark.train

STEP_SECONDS, HEARTBEAT_SECONDS = 40, 30
"""Far longer than a healthy worker takes on a busy machine."""


def alone(**changes: Any) -> dict[str, Any]:
    """The experiment with one worker, for what needs no second: it starts sooner."""
    return experiment(trials={"world_sizes": [1], "scaling": "strong"}, **changes)


def assert_as_undisturbed(outcome: Outcome, undisturbed: Outcome) -> None:
    """The invariants: the same weights bit for bit, the same AP, the same metric rows, each of them once."""
    assert outcome.ended.status == "FINISHED", outcome.ended.reason
    assert outcome.state == undisturbed.state
    assert outcome.scores == undisturbed.scores
    assert outcome.rows == undisturbed.rows
    assert set(outcome.rows.values()) == {1}


def restarts(outcome: Outcome) -> list[tuple[str, int]]:
    return [(event.failure, event.attempt) for event in outcome.of(TrialRestarted)]


def test_an_undisturbed_trial_reports_every_window_and_ends_at_once(undisturbed: Outcome) -> None:
    windows = {(event.rank, event.first_iteration, event.iteration) for event in undisturbed.of(StepsDone)}
    assert windows == {(rank, start, start + 3) for rank in (0, 1) for start in range(0, ITERATIONS, 3)}
    assert restarts(undisturbed) == []


@pytest.fixture(scope="module")
def disturbed(bench: Bench) -> Outcome:
    """One trial that meets three faults, one in each attempt but the last: starting workers is what takes long."""
    faults = (
        Fault("kill", rank=1, iteration=4, attempt=0),
        Fault("stall", rank=1, iteration=7, attempt=1),
        Fault("freeze", rank=0, iteration=10, attempt=2),
    )
    outcome = bench.run(*faults, timeouts=Timeouts(step=STEP_SECONDS, heartbeat=HEARTBEAT_SECONDS).model_dump())
    assert [fault["kind"] for fault in outcome.fired] == ["kill", "stall", "freeze"]
    return outcome


@pytest.mark.soak
def test_a_trial_that_met_three_faults_ends_as_if_it_had_met_none(disturbed: Outcome, undisturbed: Outcome) -> None:
    assert_as_undisturbed(disturbed, undisturbed)
    assert restarts(disturbed) == [("worker_lost", 1), ("stuck", 2), ("stuck", 3)]


@pytest.mark.soak
def test_a_killed_worker_is_replaced_and_what_that_cost_is_reported(disturbed: Outcome) -> None:
    restart = trial_result(disturbed.plan, disturbed.events).restarts[0]
    assert restart.message.startswith("rank 1: its process died")
    loop = next(event for event in disturbed.of(LoopStarted) if (event.attempt, event.rank) == (1, 0))
    # It died at 4, last heard of up to a second before, and goes on from 3 if that checkpoint had become valid by then.
    assert loop.iteration in (0, 3) and 0 <= restart.lost_iterations <= 4 - loop.iteration
    assert restart.downtime_seconds is not None and restart.downtime_seconds > 0
    assert disturbed.tags["restart.1"].startswith("worker_lost: rank 1")
    assert f"{restart.lost_iterations} iterations lost" in disturbed.tags["restart.1"]
    # From the last heartbeat before the kill, not from when the kill was noticed.
    step = next(event for event in disturbed.of(StepsDone) if (event.attempt, event.rank) == (1, 0))
    truth = loop.time + step.step_seconds[0] - disturbed.fired[0]["time"]
    assert restart.recovery_seconds is not None and truth <= restart.recovery_seconds < truth + HEARTBEAT_SECONDS
    parts = restart.recovery_part_seconds
    assert sum(parts.values()) == pytest.approx(restart.recovery_seconds, abs=0.1)
    assert {"detection", "processes", "process_group", "imports", "first_step"} <= set(parts)
    print(f"\nkilled worker: {truth:.1f} s to the end of the next step, {restart.recovery_seconds:.1f} s by the run")


@pytest.mark.soak
def test_a_stuck_training_thread_is_found_and_not_those_that_wait_for_it(disturbed: Outcome) -> None:
    (stuck,) = (event for event in disturbed.of(WorkerFailed) if event.failure == "stuck" and event.attempt == 1)
    assert (stuck.rank, stuck.iteration) == (1, 7) and "step (forward) of iteration 7 has taken" in stuck.message
    assert stuck.time - disturbed.fired[1]["time"] < 2 * STEP_SECONDS
    assert stuck.message.endswith("; what all ranks were doing is in stuck-attempt1-rank*")
    folder = Path(disturbed.plan.trial_dir)
    assert "in _happen" in (folder / "stuck-attempt1-rank1.txt").read_text(), "the rank that is stuck"
    assert "in enter" not in (folder / "stuck-attempt1-rank0.txt").read_text(), "the one that waits for it"


@pytest.mark.soak
def test_a_frozen_process_is_noticed_within_twice_the_time_out(disturbed: Outcome) -> None:
    (stuck,) = (event for event in disturbed.of(WorkerFailed) if event.failure == "stuck" and event.attempt == 2)
    assert stuck.rank == 0 and "no sign of life" in stuck.message
    assert stuck.time - disturbed.fired[2]["time"] < 2 * HEARTBEAT_SECONDS
    answer = (Path(disturbed.plan.trial_dir) / "stuck-attempt2-rank0.txt").read_text()
    assert answer.splitlines()[1].endswith(", stopped"), "a frozen process cannot say more"


@pytest.mark.soak
def test_workers_lost_at_set_up_are_named_and_counted_by_max_failures_alone(bench: Bench) -> None:
    killed: list[int] = []

    def kill(process: psutil.Process) -> None:
        process.kill()
        killed.append(process.pid)

    def kill_while_ray_starts_them() -> None:
        # Ray names a process after what it does: workers import torch first, then they join the process group.
        earlier: set[psutil.Process] = set()  # of the attempt before, some of which may live on for a moment

        def importing() -> list[bool]:
            return ["init_train_context" in title for process, title in _workers().items() if process not in earlier]

        wait_for(lambda: importing() == [True, True])
        earlier |= _workers().keys()
        kill(max(earlier, key=lambda process: process.pid))
        wait_for(lambda: importing() == [True, True])
        wait_for(lambda: importing() == [False, False])
        kill(max(_workers().keys() - earlier, key=lambda process: process.pid))

    def kill_in_the_training_function(event: Event) -> None:
        if isinstance(event, WorkerStarted) and event.rank == 1 and event.pid and len(killed) == 2:
            kill(psutil.Process(event.pid))

    thread = threading.Thread(target=kill_while_ray_starts_them)
    thread.start()
    outcome = bench.run(policy=Faults(max_failures=2), listeners=[kill_in_the_training_function])
    thread.join()
    assert len(killed) == 3
    assert restarts(outcome) == [("worker_lost", 1), ("worker_lost", 2)]
    lost = [event for event in outcome.of(WorkerFailed) if event.failure == "worker_lost"]
    assert [event.attempt for event in lost] == [0, 1, 2] and {event.rank for event in lost} <= {0, 1}
    last = "worker_lost (rank 1, iteration 0, setup): its process died"
    assert outcome.ended.reason.startswith(f"3 failures in a row without a new checkpoint; the last: {last}")


def _workers() -> dict[psutil.Process, str]:
    """The living worker processes of Ray Train, and what they do."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in (title := " ".join(process.cmdline())):
                found[process] = title
    return found


def test_nan_on_one_rank_stops_all_together_and_names_its_images(bench: Bench) -> None:
    # RetinaNet computes a loss of such images; Mask R-CNN's proposals refuse them (see tests/trainers/test_resume.py).
    values = experiment(model=MODELS["retinanet"])
    outcome = bench.run(Fault("nan", rank=1, iteration=7, attempt=None), values=values)
    assert outcome.fired
    assert outcome.ended.status == "FAILED" and restarts(outcome) == []
    assert "rank 1, iteration 7" in outcome.ended.reason and ".jpg" in outcome.ended.reason
    failures = outcome.of(WorkerFailed)
    assert {event.rank for event in failures} == {0, 1} and {event.failure for event in failures} == {"not_finite"}
    # That of 6 is being written at 7, and counts where it had become valid by then.
    assert max(event.iteration for event in outcome.of(CheckpointSaved)) in (3, 6), "a checkpoint of NaN was kept"
    assert (outcome.tags["failure"], outcome.tags["failure.iteration"]) == ("not_finite", "7")


def test_a_crash_at_the_same_iteration_twice_ends_the_trial_and_names_the_images(bench: Bench) -> None:
    outcome = bench.run(Fault("raise", rank=0, iteration=4, attempt=None), values=alone())
    assert [fault["attempt"] for fault in outcome.fired] == [None, None]
    assert outcome.ended.status == "FAILED" and restarts(outcome) == [("unknown", 1)]
    assert outcome.ended.reason.startswith("twice at the same place: unknown (rank 0, iteration 4, step)")
    assert outcome.ended.reason.count(".jpg") == 4


@pytest.mark.soak
def test_a_rank_that_is_stuck_between_steps_is_named_with_what_it_is_at(bench: Bench, undisturbed: Outcome) -> None:
    places = (("report", 3), ("evaluation", 6), ("checkpoint", 9))
    faults = [Fault("stall", 1, iteration, attempt, section) for attempt, (section, iteration) in enumerate(places)]
    timeouts = Timeouts(report=STEP_SECONDS, evaluation=STEP_SECONDS, checkpoint=STEP_SECONDS)
    outcome = bench.run(*faults, timeouts=timeouts.model_dump())
    assert len(outcome.fired) == 3
    assert_as_undisturbed(outcome, undisturbed)
    # Between steps, whoever waits for it is at the same place and is named too.
    stuck = [event for event in outcome.of(WorkerFailed) if (event.failure, event.rank) == ("stuck", 1)]
    assert tuple((event.section, event.iteration) for event in stuck) == places


@pytest.mark.soak
def test_what_the_workers_emit_is_not_lost_with_the_actor_that_takes_it(bench: Bench, undisturbed: Outcome) -> None:
    killed: list[int] = []

    def kill_the_actor(event: Event) -> None:
        if isinstance(event, StepsDone) and event.iteration == 6 and not killed:
            # Ray names a process after the actor in it.
            family = psutil.Process().children(recursive=True)
            killed.extend(process.pid for process in family if "Telemetry" in "".join(process.cmdline()))
            os.kill(killed[0], signal.SIGKILL)

    outcome = bench.run(listeners=[kill_the_actor])
    assert len(killed) == 1
    assert_as_undisturbed(outcome, undisturbed)
    assert restarts(outcome) == [("communication", 1)]


def test_an_image_that_cannot_be_read_ends_the_trial_at_once_and_is_named(bench: Bench, tmp_path: Path) -> None:
    from orchestrator.data.generate import generate

    values = alone(resources={"device": "cpu", "cpus_per_worker": 1, "loader_workers": 1})
    generate(tmp_path, **values["data"]["generated"])
    victim = sorted(tmp_path.rglob("train*/*.jpg"))[5]
    victim.write_bytes(victim.read_bytes()[:200])
    outcome = bench.run(values=values, root=tmp_path)
    assert outcome.ended.status == "FAILED" and restarts(outcome) == []
    assert outcome.ended.reason.startswith("bad_input") and str(victim) in outcome.ended.reason


@pytest.mark.soak
def test_out_of_memory_at_the_same_place_twice_ends_the_trial(bench: Bench) -> None:
    outcome = bench.run(Fault("out_of_memory", rank=1, iteration=2, attempt=None))
    assert len(outcome.fired) == 2
    assert outcome.ended.reason.startswith("twice at the same place: out_of_memory (rank 1, iteration 2, step)")


def test_storage_that_fails_ends_the_trial_with_its_words(bench: Bench, tmp_path: Path) -> None:
    blocked = tmp_path / "a_file"
    blocked.write_text("not a folder")
    outcome = bench.run(values=alone(), checkpoint_dir=str(blocked / "checkpoints"))
    assert outcome.ended.status == "FAILED" and outcome.ended.reason.startswith("storage")
    assert str(blocked) in outcome.ended.reason


@pytest.mark.soak
def test_failures_without_progress_are_limited(bench: Bench) -> None:
    faults = [Fault("kill", rank=0, iteration=iteration, attempt=iteration) for iteration in (0, 1)]
    outcome = bench.run(*faults, policy=Faults(max_failures=1))
    assert len(outcome.fired) == 2
    assert "2 failures in a row without a new checkpoint" in outcome.ended.reason
    assert not outcome.of(LoopFinished)


def test_a_checkpoint_that_is_damaged_meanwhile_is_skipped_with_a_word(bench: Bench, undisturbed: Outcome) -> None:
    damaged: list[Path] = []

    def flip(event: Event) -> None:
        if isinstance(event, TrialRestarted):
            newest = max(bench.run_dir.rglob("manifest.json")).parent
            (state,) = newest.glob("state-*.pt")
            content = state.read_bytes()
            state.write_bytes(content[:-100] + bytes(byte ^ 0x10 for byte in content[-100:]))
            damaged.append(newest)

    outcome = bench.run(Fault("kill", rank=1, iteration=10), listeners=[flip])
    assert [fault["kind"] for fault in outcome.fired] == ["kill"] and len(damaged) == 1
    assert_as_undisturbed(outcome, undisturbed)
    (skipped,) = outcome.of(CheckpointSkipped)
    assert skipped.path == str(damaged[0])
    (note,) = trial_result(outcome.plan, outcome.events).notes
    assert str(damaged[0]) in note and "SHA-256" in note
