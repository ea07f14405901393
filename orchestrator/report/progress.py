"""Shows a run's progress: a live bar on a terminal, plain lines in a job's log."""

from __future__ import annotations

import datetime
import time
from functools import singledispatchmethod
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from orchestrator.figures.causes import clock_note, evaluation_notes
from orchestrator.figures.figure import NOT_MEASURED, number_text, rate_text
from orchestrator.figures.steps import JointWindow, WindowJoin
from trainers.contract.events import (
    CheckpointFailed,
    CheckpointSaved,
    CheckpointSkipped,
    ClockChanged,
    Evaluated,
    EvaluationLost,
    Event,
    LoopStarted,
    StepsDone,
    TrialEnded,
    TrialRestarted,
    TrialStarted,
    WorkerFailed,
    WorkerStarted,
)
from trainers.contract.plan import TrialPlan
from trainers.contract.targets import is_met, metric_value

PLAIN_LINE_SECONDS = 30.0
"""Shortest time between two progress lines where there is no terminal."""


def duration(seconds: float | None) -> str:
    """Seconds as `1:02:03`, or – where not known."""
    return str(datetime.timedelta(seconds=round(seconds))) if seconds is not None else NOT_MEASURED


class _Eta(ProgressColumn):
    """Time to the end of the schedule, from the rate since this attempt's first step, evaluations included."""

    def render(self, task: Task) -> Text:
        return Text(f"ETA {duration(task.fields.get('eta'))}", style="cyan")


class ProgressDisplay:
    """Shows the events of a run: with a live bar where the console is a terminal; `quiet` shows only failures."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._plan: TrialPlan | None = None
        self._join = WindowJoin(1)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last_line: float | None = None
        self._loop_started: LoopStarted | None = None
        self._last_ap: dict[str, float | None] = {}

    @singledispatchmethod
    def __call__(self, event: Event) -> None:
        """Shows one event."""

    def stopping(self, grace_seconds: float) -> None:
        """Shows that the run is being stopped, and what happens until it has."""
        self._print(
            f"[yellow]stopping[/]: the workers take a last checkpoint, for at most {grace_seconds:.0f} s; "
            "Ctrl-C again ends at once",
            always=True,
        )

    def close(self) -> None:
        """Removes the bar."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    @__call__.register
    def _trial_started(self, event: TrialStarted) -> None:
        plan = TrialPlan.from_dict(event.plan)
        self._plan, self._join, self._last_ap = plan, WindowJoin(plan.world_size), {}
        self._loop_started = self._last_line = None
        workers = "1 worker" if plan.world_size == 1 else f"{plan.world_size} workers"
        self._print(f"[bold]starting[/] {workers} on {plan.device}, recipe {plan.recipe_name}")
        if self._console.is_terminal and not self._quiet:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total}"), _Eta(),
                *(TextColumn(f"{{task.fields[{name}]}}") for name in ("rate", "loss", "ap")),
                console=self._console, transient=True, expand=True,
            )  # fmt: skip
            self._task = self._progress.add_task(
                plan.name, total=plan.solver.max_iter, rate="starting", loss="", ap="", eta=None
            )
            self._progress.start()

    @__call__.register
    def _worker_started(self, event: WorkerStarted) -> None:
        self._join.expect(event)
        if self._plan and event.rank == 0 and event.world_size not in (None, self._plan.world_size):
            of = self._plan.world_size
            self._print(f"[yellow]continuing with {event.world_size} of {of} workers[/]", always=True)

    @__call__.register
    def _training_started(self, event: LoopStarted) -> None:
        if event.rank != 0:
            return
        self._loop_started = event
        resumed = f", resuming at iteration {event.iteration}" if event.iteration else ""
        self._print(
            f"training on {number_text(event.num_train_images, 0)} images, "
            f"evaluating on {number_text(event.num_val_images, 0)}; "
            f"set up in {number_text(event.setup_seconds, 1)} s{resumed}"
        )
        self._update(completed=event.iteration)

    @__call__.register
    def _steps_done(self, event: StepsDone) -> None:
        window = self._join.add(event)
        if window is None or self._plan is None:
            return
        eta, rate, total = self._eta(window), rate_text(window.images_per_second), window.losses.get("total_loss")
        rate, loss = f"{rate} images/s", f"loss {total:.3f}" if total is not None else ""
        self._update(completed=window.iteration, rate=rate, loss=loss, eta=eta)
        now = time.monotonic()
        if not self._progress and (self._last_line is None or now - self._last_line >= PLAIN_LINE_SECONDS):
            self._last_line = now
            of = self._plan.solver.max_iter
            self._print(f"iteration {window.iteration}/{of}  ETA {duration(eta)}  {rate}  {loss}".rstrip())

    def _eta(self, window: JointWindow) -> float | None:
        """Seconds to the end of the schedule; None before the first step of this attempt."""
        start = self._loop_started
        if self._plan is None or start is None or window.iteration <= start.iteration:
            return None
        seconds_per_iteration = (window.time - start.time) / (window.iteration - start.iteration)
        return seconds_per_iteration * (self._plan.solver.max_iter - window.iteration)

    @__call__.register
    def _evaluated(self, event: Evaluated) -> None:
        if self._plan is None:
            return
        parts = []
        targets = {"box": self._plan.target_box_ap, "mask": self._plan.target_mask_ap, "keypoint": None}
        for name, target in targets.items():
            ap, before = event.figures.get(f"{name}_ap"), self._last_ap.get(f"{name}_ap")
            if ap is None:
                continue
            text = f"{name} AP {ap:.2f}"
            text += f" ({ap - before:+.2f})" if before is not None else ""
            if target is not None:
                text += f", target {target:g} " + ("met" if is_met(ap, target) else f"{target - ap:.2f} away")
            parts.append(text)
        averages = {name: event.figures.get(f"ema_{name}_ap") for name in targets}
        if any(ap is not None for ap in averages.values()):
            found = ", ".join(f"{name} AP {ap:.2f}" for name, ap in averages.items() if ap is not None)
            parts.append(f"of averaged weights {found}")
        parts += _metric_text(self._plan, event)
        self._last_ap = event.figures
        took = f"{number_text(event.seconds, 1)} s"
        if event.overlapped:
            took += f", concurrently; training stalled for {number_text(event.stall_seconds, 1)} s"
        self._print(f"evaluation at {event.iteration}: {'; '.join(parts) or 'no AP'} ({took})")
        for note in evaluation_notes(event):
            self._print(f"[yellow]{note}[/]", always=True)
        self._update(ap=f"AP {number_text(event.figures.get('box_ap'), 1)}")

    @__call__.register
    def _checkpoint_saved(self, event: CheckpointSaved) -> None:
        if not self._progress:
            self._print(f"checkpoint of iteration {event.iteration} ({event.size_bytes / 1e6:.1f} MB)")

    @__call__.register
    def _evaluation_lost(self, event: EvaluationLost) -> None:
        for note in evaluation_notes(event):
            self._print(f"[yellow]{escape(note)}[/]", always=True)

    @__call__.register
    def _checkpoint_failed(self, event: CheckpointFailed) -> None:
        self._print(f"[red]continuing without a new checkpoint[/]: {escape(event.message)}", always=True)

    @__call__.register
    def _checkpoint_skipped(self, event: CheckpointSkipped) -> None:
        self._print(
            f"[yellow]skipping a damaged checkpoint[/] {escape(event.path)}: {escape(event.message)}", always=True
        )

    @__call__.register
    def _clock_changed(self, event: ClockChanged) -> None:
        self._print(f"[yellow]the clock was set[/]: {clock_note(event)}", always=True)

    @__call__.register
    def _worker_failed(self, event: WorkerFailed) -> None:
        self._print(f"[red]rank {event.rank} failed[/] in {event.section}: {escape(event.message)}", always=True)
        for file in event.image_files if event.failure in ("bad_input", "not_finite") else ():
            self._print(f"  image of its batch: {escape(file)}", always=True)

    @__call__.register
    def _trial_restarted(self, event: TrialRestarted) -> None:
        self._print(f"[yellow]restarting the workers[/] ({event.failure}: {escape(event.message)})", always=True)

    @__call__.register
    def _trial_ended(self, event: TrialEnded) -> None:
        self.close()
        if event.status != "FINISHED":
            self._print(f"[red]{event.status.lower()}[/]: {escape(event.reason)}", always=True)
        elif event.reason:
            self._print(f"[yellow]ended early[/]: {escape(event.reason)}", always=True)

    def _update(self, **fields: Any) -> None:
        if self._progress:
            self._progress.update(self._task, **fields)

    def _print(self, text: str, always: bool = False) -> None:
        if always or not self._quiet:
            name = f"[dim]{self._plan.name}[/] " if self._plan else ""
            self._console.print(f"{name}{text}", highlight=False, soft_wrap=True)


def _metric_text(plan: TrialPlan, event: Evaluated) -> list[str]:
    """The metric and its target, where the AP of boxes, masks or keypoints does not say it."""
    value = metric_value(event, plan.metric)
    if value is None or (plan.target is None and plan.metric in ("box_ap", "mask_ap", "keypoint_ap")):
        return []
    text = f"{escape(plan.metric)} {value:.2f}"
    if plan.target is not None:
        met = is_met(value, plan.target, plan.metric)
        text += f", target {plan.target:g} " + ("met" if met else f"{abs(value - plan.target):.2f} away")
    return [text]
