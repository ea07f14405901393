"""A training in a process of its own that takes steps when it is ordered to, and is suspended otherwise.

Processes are forked from one that has imported everything and touched no GPU, so that each is up in a second.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks import ours, peer
from benchmarks.gpu_probe import EndTraining, Order, Probe
from benchmarks.slots import kill, resume, suspend
from trainers.contract.events import Evaluated, Event, LoopFinished, StepsDone
from trainers.contract.plan import TrialPlan

START_SECONDS = 90.0
"""Longest time from a process's start to its first step."""

END_SECONDS = 20.0
"""Longest time in which a training ends itself once it is ordered to."""

LOG_LINES = 4
"""Lines of a dead process's output that are shown."""

MESSAGE_LENGTH = 300
"""Characters of a failure's message that are shown."""

Kind = Literal["ours", "peer", "to_the_end"]
"""This program's worker without Ray; detectron2's DefaultTrainer; the worker for the whole of its schedule, which is
ordered nothing."""


class SideError(RuntimeError):
    """A training failed, died or hangs; the message says why in one line."""


class Side:
    """One training, from its start; `receive` its description, `ask` it for blocks of steps, and `end` it.

    Args:
        kind: What trains.
        plan: What it trains; its folder takes the output.
    """

    def __init__(self, kind: Kind, plan: TrialPlan) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "trainers.rank"])
        Path(plan.trial_dir).mkdir(parents=True, exist_ok=True)
        self._log = Path(plan.trial_dir, "output.txt")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(kind, plan, theirs, str(self._log)))
        self._process.start()
        theirs.close()
        self._family = psutil.Process(self._process.pid)
        self.pid = self._family.pid
        """Of its process."""
        self.alive = True
        """Whether it has not been ended."""

    def ask(self, order: Order, limit_seconds: float) -> dict[str, Any]:
        """Lets it run for a block of steps, then suspends it; returns what was measured.

        Raises:
            SideError: It failed, or did not answer within the limit.
        """
        resume(self._family)
        try:
            self._connection.send(order)
        except OSError:
            raise SideError(self._death()) from None
        found = self.receive(limit_seconds)
        suspend(self._family)
        return found

    def receive(self, limit_seconds: float) -> dict[str, Any]:
        """Waits for what it says next; the first is what it says of its device, before its first step.

        Raises:
            SideError: It failed, or said nothing within the limit.
        """
        try:
            limit_seconds = max(limit_seconds, 0.0)
            if not self._connection.poll(limit_seconds):
                raise SideError(f"no answer in {limit_seconds:.0f} s")
            found: dict[str, Any] = self._connection.recv()
        except (EOFError, OSError):
            raise SideError(self._death()) from None
        if "problem" in found:
            raise SideError(found["problem"])
        return found

    def end(self) -> dict[str, Any]:
        """Ends it; returns what it found out about itself, nothing where it does not end itself."""
        found: dict[str, Any] = {}
        if self.alive:
            resume(self._family)
            with suppress(OSError, SideError):
                self._connection.send(Order("end"))
                found = self.receive(END_SECONDS)
            self._process.join(END_SECONDS)
            self.kill()
        return found

    def kill(self) -> None:
        """Ends it without asking."""
        if self.alive:
            self.alive = False
            kill(self._family)
            self._process.join()
            self._connection.close()

    def _death(self) -> str:
        self._process.join(END_SECONDS)
        lines = self._log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:] if self._log.exists() else []
        return f"the process ended with {self._process.exitcode}: {' / '.join(lines)}"[:MESSAGE_LENGTH]


def _train(kind: Kind, plan: TrialPlan, conductor: Connection, log: str) -> None:
    """The process: trains until it is ordered to end, and sends what it found out about itself."""
    with Path(log).open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    try:
        found = TRAININGS[kind](plan, conductor)
    except Exception as error:  # noqa: BLE001 - whatever fails is this training's row, and no other's
        traceback.print_exc()
        text = " ".join(str(error).split())
        conductor.send({"problem": f"{type(error).__name__}: {text}"[:MESSAGE_LENGTH]})
        return
    conductor.send(found)


def _train_ours(plan: TrialPlan, conductor: Connection) -> dict[str, Any]:
    events: list[Event] = []
    with suppress(EndTraining):
        ours.train_in_process(plan, events.append, Probe(conductor, plan.device == "cuda"))
    return {"shapes": shapes_of_events(events)}


def _train_peer(plan: TrialPlan, conductor: Connection) -> dict[str, Any]:
    trainer = peer.build_trainer(plan, Probe(conductor, plan.device == "cuda"))
    shapes: list[tuple[int, ...]] = []
    trainer.model.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    with suppress(EndTraining):
        trainer.train()
    first_seen = {shape: number for number, shape in reversed(list(enumerate(shapes)))}
    return {"shapes": shapes_met(set(first_seen.values()), trainer.step_seconds)}


def shapes_met(first_seen: set[int], step_seconds: Sequence[float]) -> dict[str, Any]:
    """What is known of the shapes of a training's batches.

    Args:
        first_seen: The steps, from 0, in which a shape was met for the first time.
        step_seconds: Of each step.

    Returns:
        `distinct` shapes in `steps`; the share of the second half's steps that met a `new` one; milliseconds of the
        median step that did (`new_ms`) and that did not (`other_ms`).
    """
    half = len(step_seconds) // 2
    late = [number in first_seen for number in range(half, len(step_seconds))]
    split = {new: [each for number, each in enumerate(step_seconds) if (number in first_seen) == new] for new in (0, 1)}
    return {
        "distinct": len(first_seen),
        "steps": len(step_seconds),
        "new": sum(late) / len(late) if late else None,
        "new_ms": 1000 * statistics.median(split[1]) if split[1] else None,
        "other_ms": 1000 * statistics.median(split[0]) if split[0] else None,
    }


def shapes_of_events(events: list[Event]) -> dict[str, Any] | None:
    """The same of our worker's events, with what they say of padding and graphs; None where they do not say."""
    windows = [event for event in events if isinstance(event, StepsDone)]
    if not windows or any(window.new_shapes is None for window in windows):
        return None
    first_seen = {window.first_iteration + step for window in windows for step in (window.new_shapes or {}).values()}
    pixels = sum(window.pixels or 0 for window in windows)
    return {
        **shapes_met(first_seen, [seconds for window in windows for seconds in window.step_seconds]),
        "waste": sum(window.wasted_pixels or 0 for window in windows) / pixels if pixels else None,
        "eager_batches": dict(sum((Counter(window.eager_batches or {}) for window in windows), Counter())),
        "graphs": windows[-1].num_graphs,
        "capture_seconds": sum(window.capture_seconds or 0.0 for window in windows),
        "eager_steps": dict(sum((Counter(window.eager_steps) for window in windows), Counter())),
    }


def _train_to_the_end(plan: TrialPlan, conductor: Connection) -> dict[str, Any]:  # noqa: ARG001
    events: list[Event] = []
    began = time.perf_counter()
    ours.train_in_process(plan, events.append, before_step=lambda: None)
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    (finished,) = (event for event in events if isinstance(event, LoopFinished))
    steps = [event for event in events if isinstance(event, StepsDone)]
    return {
        "box_ap": evaluations[-1].figures.get("box_ap"),
        "mask_ap": evaluations[-1].figures.get("mask_ap"),
        "iterations": finished.iteration,
        "reason": finished.reason,
        "seconds": time.perf_counter() - began,
        "training_seconds": sum(event.seconds for event in steps),
        "stalls": [event.stall_seconds for event in evaluations if event.overlapped],
    }


TRAININGS: dict[Kind, Callable[[TrialPlan, Connection], dict[str, Any]]] = {
    "ours": _train_ours, "peer": _train_peer, "to_the_end": _train_to_the_end
}  # fmt: skip
