"""Shows a run's progress: a live bar for each trial that is under way on a terminal, plain lines in a job's log."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import singledispatchmethod
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from orchestrator.figures.causes import clock_note, evaluation_notes
from orchestrator.figures.figure import NOT_MEASURED, number_text, rate_text
from orchestrator.figures.steps import JointWindow, WindowJoin
from orchestrator.report.run_eta import RunEta
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


@dataclass(slots=True)
class _Shown:
    """A trial that is under way."""

    plan: TrialPlan
    join: WindowJoin
    task: TaskID | None = None
    last_line: float | None = None
    loop_started: LoopStarted | None = None
    last_ap: dict[str, float | None] = field(default_factory=dict)

    def eta(self, window: JointWindow) -> float | None:
        """Seconds to the end of the schedule; None before the first step of this attempt."""
        start = self.loop_started
        if start is None or window.iteration <= start.iteration:
            return None
        seconds_per_iteration = (window.time - start.time) / (window.iteration - start.iteration)
        return seconds_per_iteration * (self.plan.solver.max_iter - window.iteration)


class ProgressDisplay:
    """Shows the events of a run.

    Args:
        console: Where; live bars are shown where it is a terminal.
        quiet: Show failures only.
        plans: The trials that are still to be run. With several, the time to the end of the run is shown, too.
    """

    def __init__(self, console: Console, quiet: bool, plans: Sequence[TrialPlan] = ()) -> None:
        self._console, self._quiet = console, quiet
        self._plans = {plan.name: plan for plan in plans}
        self._shown: dict[str, _Shown] = {}
        self._progress: Progress | None = None
        self._run_task: TaskID | None = None
        self._run_eta = RunEta(len(plans))

    @singledispatchmethod
    def __call__(self, event: Event) -> None:
        """Shows one event."""

    def stopping(self, grace_seconds: float) -> None:
        """Shows that the run is being stopped, and what happens until it has."""
        self._print(
            "",
            f"[yellow]stopping[/]: the workers take a last checkpoint, for at most {grace_seconds:.0f} s; "
            "Ctrl-C again ends at once",
            always=True,
        )

    def close(self) -> None:
        """Removes the bars."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    @__call__.register
    def _trial_started(self, event: TrialStarted) -> None:
        self._begin(TrialPlan.from_dict(event.plan), event)

    def _begin(self, plan: TrialPlan, event: Event) -> None:
        trial = self._shown[plan.name] = _Shown(plan, WindowJoin(plan.world_size))
        self._run_eta.began(plan.name, event.time)
        workers = "1 worker" if plan.world_size == 1 else f"{plan.world_size} workers"
        self._print(plan.name, f"[bold]starting[/] {workers} on {plan.device}, recipe {plan.recipe_name}")
        if self._console.is_terminal and not self._quiet:
            self._progress = self._progress or self._start_progress()
            trial.task = self._progress.add_task(
                plan.name, total=plan.solver.max_iter, rate="starting", loss="", ap="", eta=None
            )

    def _start_progress(self) -> Progress:
        progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"), _Eta(table_column=Column(no_wrap=True)),
            *(TextColumn(f"{{task.fields[{name}]}}") for name in ("rate", "loss", "ap")),
            console=self._console, transient=True, expand=True,
        )  # fmt: skip
        if self._run_eta.num_trials > 1:
            total, completed = self._run_eta.num_trials, self._run_eta.num_ended
            self._run_task = progress.add_task("trials", True, total, completed, rate="", loss="", ap="", eta=None)
        progress.start()
        return progress

    @__call__.register
    def _worker_started(self, event: WorkerStarted) -> None:
        if trial := self._shown.get(event.trial):
            trial.join.expect(event)
            of = trial.plan.world_size
            if event.rank == 0 and event.world_size not in (None, of):
                text = f"[yellow]continuing with {event.world_size} of {of} workers[/]"
                self._print(event.trial, text, always=True)

    @__call__.register
    def _training_started(self, event: LoopStarted) -> None:
        trial = self._shown.get(event.trial)
        if event.rank != 0 or trial is None:
            return
        trial.loop_started = event
        resumed = f", resuming at iteration {event.iteration}" if event.iteration else ""
        self._print(
            event.trial,
            f"training on {number_text(event.num_train_images, 0)} images, "
            f"evaluating on {number_text(event.num_val_images, 0)}; "
            f"set up in {number_text(event.setup_seconds, 1)} s{resumed}",
        )
        self._update(trial, completed=event.iteration)

    @__call__.register
    def _steps_done(self, event: StepsDone) -> None:
        trial = self._shown.get(event.trial)
        window = trial.join.add(event) if trial else None
        if window is None or trial is None:
            return
        eta, rate, total = trial.eta(window), rate_text(window.images_per_second), window.losses.get("total_loss")
        rate, loss = f"{rate} images/s", f"loss {total:.3f}" if total is not None else ""
        whole = self._run_eta.left(event.trial, eta, window.time)
        self._update(trial, completed=window.iteration, rate=rate, loss=loss, eta=eta)
        now = time.monotonic()
        if not self._progress and (trial.last_line is None or now - trial.last_line >= PLAIN_LINE_SECONDS):
            trial.last_line = now
            of = trial.plan.solver.max_iter
            run = f"  ETA of the run {duration(whole)}" if self._run_eta.num_trials > 1 else ""
            text = f"iteration {window.iteration}/{of}  ETA {duration(eta)}  {rate}  {loss}".rstrip()
            self._print(event.trial, text + run)
        elif self._progress and self._run_task is not None:
            self._progress.update(self._run_task, eta=whole)

    @__call__.register
    def _evaluated(self, event: Evaluated) -> None:
        trial = self._shown.get(event.trial)
        if trial is None:
            return
        plan, parts = trial.plan, []
        targets = {"box": plan.target_box_ap, "mask": plan.target_mask_ap, "keypoint": None}
        for name, target in targets.items():
            ap, before = event.figures.get(f"{name}_ap"), trial.last_ap.get(f"{name}_ap")
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
        parts += _metric_text(plan, event)
        trial.last_ap = event.figures
        took = f"{number_text(event.seconds, 1)} s"
        if event.overlapped:
            took += f", concurrently; training stalled for {number_text(event.stall_seconds, 1)} s"
        self._print(event.trial, f"evaluation at {event.iteration}: {'; '.join(parts) or 'no AP'} ({took})")
        for note in evaluation_notes(event):
            self._print(event.trial, f"[yellow]{note}[/]", always=True)
        self._update(trial, ap=f"AP {number_text(event.figures.get('box_ap'), 1)}")

    @__call__.register
    def _checkpoint_saved(self, event: CheckpointSaved) -> None:
        if not self._progress:
            self._print(event.trial, f"checkpoint of iteration {event.iteration} ({event.size_bytes / 1e6:.1f} MB)")

    @__call__.register
    def _evaluation_lost(self, event: EvaluationLost) -> None:
        for note in evaluation_notes(event):
            self._print(event.trial, f"[yellow]{escape(note)}[/]", always=True)

    @__call__.register
    def _checkpoint_failed(self, event: CheckpointFailed) -> None:
        text = f"[red]continuing without a new checkpoint[/]: {escape(event.message)}"
        self._print(event.trial, text, always=True)

    @__call__.register
    def _checkpoint_skipped(self, event: CheckpointSkipped) -> None:
        text = f"[yellow]skipping a damaged checkpoint[/] {escape(event.path)}: {escape(event.message)}"
        self._print(event.trial, text, always=True)

    @__call__.register
    def _clock_changed(self, event: ClockChanged) -> None:
        what = "the clock was set" if event.rank < 0 else "a clock is off"
        self._print(event.trial, f"[yellow]{what}[/]: {clock_note(event)}", always=True)

    @__call__.register
    def _worker_failed(self, event: WorkerFailed) -> None:
        text = f"[red]rank {event.rank} failed[/] in {event.section}: {escape(event.message)}"
        self._print(event.trial, text, always=True)
        for file in event.image_files if event.failure in ("bad_input", "not_finite") else ():
            self._print(event.trial, f"  image of its batch: {escape(file)}", always=True)

    @__call__.register
    def _trial_restarted(self, event: TrialRestarted) -> None:
        if event.trial not in self._shown and event.trial in self._plans:  # it is gone on with: its start was earlier
            self._begin(self._plans[event.trial], event)
        text = f"[yellow]restarting the workers[/] ({event.failure}: {escape(event.message)})"
        self._print(event.trial, text, always=True)

    @__call__.register
    def _trial_ended(self, event: TrialEnded) -> None:
        trial = self._shown.get(event.trial)
        self._run_eta.ended(event.trial, event.time)
        if self._progress and trial and trial.task is not None:
            self._progress.remove_task(trial.task)
            trial.task = None
            if self._run_task is not None:
                self._progress.update(self._run_task, completed=self._run_eta.num_ended)
        if not self._run_eta.any_live:
            self.close()
        if event.status != "FINISHED":
            self._print(event.trial, f"[red]{event.status.lower()}[/]: {escape(event.reason)}", always=True)
        elif event.reason:
            self._print(event.trial, f"[yellow]ended early[/]: {escape(event.reason)}", always=True)

    def _update(self, trial: _Shown, **fields: Any) -> None:
        if self._progress and trial.task is not None:
            self._progress.update(trial.task, **fields)

    def _print(self, trial: str, text: str, always: bool = False) -> None:
        if always or not self._quiet:
            name = f"[dim]{trial}[/] " if trial else ""
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
