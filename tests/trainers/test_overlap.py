"""A concurrent evaluation finds the same as one that training waits for, and ends with its training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.ours import write_plan
from tests.builders.training import last, plan_of, train
from tests.builders.waiting import wait_for
from trainers import mask_rcnn
from trainers.canary import find_port
from trainers.contract import clock
from trainers.contract.channel import Channel, Placement
from trainers.contract.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    LoopFinished,
    LoopStarted,
    StepsDone,
    WorkerFailed,
    event_from_json,
)
from trainers.contract.plan import TrialPlan
from trainers.evaluation_server import EvaluatingProcess, EvaluationServer, answer, num_bytes, views
from trainers.loading import BadInputError
from trainers.overlap import Job, Overlap
from trainers.rank import Rank

pytestmark = pytest.mark.train


def evaluating_plan(folder: Path, name: str, overlapped: bool = True, **solver: int) -> TrialPlan:
    """Evaluates every 4 of 12 iterations; all detections count, so that there are some after a few steps."""
    plan = plan_of(folder, "mask_rcnn")
    return dataclasses.replace(
        plan,
        recipe=dataclasses.replace(plan.recipe, overlapped_evaluation=overlapped),
        overrides={**plan.overrides, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0},
        validation_loss=True,
        solver=dataclasses.replace(plan.solver, **{"eval_period": 4, **solver}),
        trial_dir=str(folder / name),
        checkpoint_dir=str(folder / name / "checkpoints"),
    )


def figures(events: list[Event]) -> dict[int, dict[str, Any]]:
    """Figures and losses by iteration, each of which comes once."""
    found = [event for event in events if isinstance(event, Evaluated)]
    assert len({event.iteration for event in found}) == len(found)
    return {event.iteration: event.figures | event.validation_losses for event in found}


def evaluating(process: psutil.Process) -> list[psutil.Process]:
    """The processes that evaluate for a training process."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def train_with(plan: TrialPlan, act: Callable[[Event], None]) -> list[Event]:
    """Trains in this process; `act` is called with every event, and training waits for it."""
    events: list[Event] = []

    def push(event: Event) -> None:
        events.append(event)
        act(event)

    channel = Channel(push=push, beat=lambda heartbeat: "run")
    try:
        Rank(plan, 0, Placement(0, 1, 0, 1, "here"), channel).train(0.0)
    except Exception:  # noqa: BLE001 - whatever ended training was reported as an event
        assert last(events, WorkerFailed)
    return events


def test_a_concurrent_evaluation_finds_the_same_at_the_same_iterations_and_changes_nothing_else(tmp_path: Path) -> None:
    processes: set[int] = set()

    def kill_once(event: Event) -> None:
        if isinstance(event, StepsDone | Evaluated):
            found = evaluating(psutil.Process())
            processes.update(process.pid for process in found)
            if event.iteration == 2:
                found[0].kill()

    waiting = train(evaluating_plan(tmp_path, "waiting", overlapped=False))
    plan = evaluating_plan(tmp_path, "concurrent")
    concurrent = train(plan, act=kill_once)
    assert len(processes) == 2 and not evaluating(psutil.Process())

    expected, found = figures(waiting), figures(concurrent)
    assert list(found) == list(expected) == [4, 8, 12]
    for iteration in expected:
        assert found[iteration] == pytest.approx(expected[iteration], abs=1e-9)
    # After so few steps figures may all be 0; losses are not, and change with the weights.
    assert len({losses["total_loss"] for losses in found.values()}) == 3
    assert last(concurrent, LoopFinished).state_sha256 == last(waiting, LoopFinished).state_sha256

    by_iteration = {event.iteration: event for event in concurrent if isinstance(event, Evaluated)}
    assert [event.overlapped for event in by_iteration.values()] == [True, True, False]
    assert [event.num_lost for event in by_iteration.values()] == [1, 0, 0]
    assert by_iteration[12].stall_seconds == by_iteration[12].seconds
    stored = Path(plan.checkpoint_dir).glob("iter_*/manifest.json")
    scores = {manifest["iteration"]: manifest["score"] for manifest in (json.loads(p.read_text()) for p in stored)}
    assert scores and scores == {iteration: found[iteration]["box_ap"] for iteration in scores}


def test_a_start_after_a_death_or_a_stop_makes_each_evaluation_in_progress_once(tmp_path: Path) -> None:
    whole = figures(train(evaluating_plan(tmp_path, "waiting", overlapped=False)))
    for name, how in (("died", {"die_at": 6}), ("stopped", {"stop_at": 6})):
        plan = evaluating_plan(tmp_path, name)

        def hold(event: Event) -> None:
            if isinstance(event, StepsDone) and event.iteration == 2:
                (process,) = evaluating(psutil.Process())
                process.suspend()

        first = train(plan, **how, act=hold)  # a stop does not wait for what is held
        assert not figures(first) and not evaluating(psutil.Process())
        assert last(first, CheckpointSaved).iteration == (4 if name == "died" else 6)
        second = train(plan, attempt=1)
        assert last(second, LoopStarted).iteration == last(first, CheckpointSaved).iteration
        assert list(figures(second)) == [4, 8, 12]
        for iteration, found in figures(second).items():
            assert found == pytest.approx(whole[iteration], abs=1e-9)


def test_a_target_that_is_found_to_be_met_ends_training_at_the_next_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = evaluating_plan(tmp_path, "concurrent", eval_period=10, max_iter=30, checkpoint_period=0)
    plan = dataclasses.replace(plan, target_box_ap=0.0, stop_at_target=True)
    windows: list[int] = []
    fetch = Overlap.fetch

    def from_12_on(overlap: Overlap) -> list[Job]:
        if 12 not in windows:  # how long the scores take does not matter
            return []
        overlap.wait()
        return fetch(overlap)

    def note(event: Event) -> None:
        if isinstance(event, StepsDone):
            windows.append(event.iteration)

    monkeypatch.setattr(Overlap, "fetch", from_12_on)
    events = train(plan, act=note)
    finished = last(events, LoopFinished)
    assert (finished.reason, finished.iteration, list(figures(events))) == ("target", 14, [10])
    assert last(events, CheckpointSaved).iteration == 14
    assert [type(event) for event in train(plan, attempt=1) if isinstance(event, StepsDone | Evaluated)] == []


def test_a_target_ends_all_ranks_together(tmp_path: Path) -> None:
    # As long as it takes to find it, however long a process needs to start here.
    plan = evaluating_plan(tmp_path, "concurrent", eval_period=4, max_iter=100_000, checkpoint_period=0)
    plan = dataclasses.replace(plan, world_size=2, target_box_ap=0.0, stop_at_target=True)
    write_plan(plan, tmp_path / "plan.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ours = ["-m", "benchmarks.ours", str(tmp_path / "plan.json"), str(tmp_path / "events")]
    done = subprocess.run([*torchrun, *ours], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    events = [event_from_json(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert last(events, LoopFinished).reason == "target" and next(iter(figures(events))) == 4
    assert 4 < last(events, LoopFinished).iteration < 100_000


def test_what_ends_the_evaluation_ends_training_with_its_cause(tmp_path: Path) -> None:
    plan = evaluating_plan(tmp_path, "concurrent")
    image = next(path for path in sorted(Path(plan.val.images).iterdir()) if path.is_file())
    image.write_bytes(b"no image")
    failure = last(train_with(plan, lambda event: None), WorkerFailed)
    assert (failure.failure, failure.image_files) == ("bad_input", (str(image),))
    assert failure.iteration < 12 and BadInputError.__name__ in failure.traceback
    assert not evaluating(psutil.Process())


def test_the_evaluating_process_ends_with_a_training_process_that_is_killed(tmp_path: Path) -> None:
    plan = evaluating_plan(tmp_path, "concurrent", max_iter=100_000, eval_period=50_000)
    write_plan(plan, tmp_path / "plan.json")
    ours = [sys.executable, "-m", "benchmarks.ours", str(tmp_path / "plan.json"), str(tmp_path / "events")]
    with subprocess.Popen(ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as training:
        family = psutil.Process(training.pid)
        wait_for(lambda: evaluating(family))
        (evaluator,) = evaluating(family)
        os.kill(training.pid, signal.SIGKILL)
    evaluator.wait(timeout=300)


def evaluate_share(plan: TrialPlan, rank: int, address: str, weights: bytes, line: Any) -> None:
    """One of two processes that share the images of an evaluation; sends what it found."""
    server = EvaluationServer(plan, "cpu", clock.anchor(), rank, world_size=2)
    server.set_up(address)
    line.send(server.evaluate(4, [{}], weights))


def test_processes_that_share_the_images_find_what_one_finds(tmp_path: Path) -> None:
    plan = evaluating_plan(tmp_path, "shared")
    Path(plan.trial_dir).mkdir(parents=True)
    torch.manual_seed(0)
    tensors = list(mask_rcnn.build_detector(mask_rcnn.build_config(plan), plan).state_dict().values())
    block = torch.zeros(num_bytes(tensors), dtype=torch.uint8)
    for view, tensor in zip(views(block, tensors), tensors, strict=True):
        view.copy_(tensor)
    alone = EvaluatingProcess(plan, "cpu")
    context, address = multiprocessing.get_context("spawn"), f"127.0.0.1:{find_port()}"
    lines = [context.Pipe() for _ in range(2)]
    shares = [(plan, rank, address, block.numpy().tobytes(), theirs) for rank, (_, theirs) in enumerate(lines)]
    processes = [context.Process(target=evaluate_share, args=arguments) for arguments in shares]
    for process in processes:
        process.start()
    (expected,), _ = alone.evaluate(4, [{}], block.numpy())
    alone.end()
    (found,), _ = answer(lines[0][0].recv())
    answer(lines[1][0].recv())
    assert found.figures == expected.figures and found.class_ap == expected.class_ap
    assert found.validation_losses == pytest.approx(expected.validation_losses, rel=1e-5)
    for process in processes:
        process.join()
