"""What a person sees while a run goes on: a live bar on a terminal, plain lines in a job's log."""

from __future__ import annotations

import datetime
import time

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from orchestrator.figures.windows import JointWindow, WindowJoin
from trainers.contract.events import (
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
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

PLAIN_LINE_SECONDS = 30.0
"""Most often that a progress line is written where there is no terminal."""


def duration(seconds: float | None) -> str:
    """Seconds as `1:02:03`, or – when not known."""
    return str(datetime.timedelta(seconds=round(seconds))) if seconds is not None else "–"


def plan_table(plans: list[TrialPlan]) -> Table:
    """The plan of every trial, as `--dry-run` and the start of a run show it; fits 80 columns."""
    devices = " and ".join(dict.fromkeys(plan.device for plan in plans))
    table = Table(
        title=f"Plan, on {devices}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
    )  # fmt: skip
    table.add_column("Trial", no_wrap=True)
    for heading in ("Work\ners", "CPUs\neach", "Batch", "Base\nLR", "Itera-\ntions", "Warm-\nup"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("LR\nsteps", justify="right")
    table.add_column("Eval.\nevery", justify="right", no_wrap=True)
    for plan in plans:
        solver = plan.solver
        evaluation = str(solver.eval_period) if solver.eval_period else "end" if solver.evaluate_at_end else "none"
        steps = [step for step in solver.steps if step < solver.max_iter]
        table.add_row(
            escape(plan.name),
            str(plan.world_size),
            str(plan.cpus_per_worker),
            str(solver.global_batch_size),
            f"{solver.base_lr:g}",
            str(solver.max_iter),
            str(solver.warmup_iters),
            " ".join(map(str, steps)) or "none",
            evaluation,
        )
    return table


class _Eta(ProgressColumn):
    """Time to the end of the schedule, from the rate since this attempt's first step, evaluations included."""

    def render(self, task: Task) -> Text:
        return Text(f"ETA {duration(task.fields.get('eta'))}", style="cyan")


class ProgressDisplay:
    """Shows the events of a run.

    Args:
        console: Where to; a live bar when it is a terminal, else lines.
        quiet: Only failures are shown.
    """

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._plan: TrialPlan | None = None
        self._join = WindowJoin(1)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last_line = 0.0
        self._loop_started: tuple[float, int] | None = None
        self._last_ap: dict[str, float | None] = {}

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        if isinstance(event, TrialStarted):
            self._start(TrialPlan.from_dict(event.plan))
        elif isinstance(event, LoopStarted) and event.rank == 0:
            self._loop_started = (event.time, event.iteration)
            resumed = f", going on at iteration {event.iteration}" if event.iteration else ""
            self._say(
                f"training on {event.num_train_images:,} images, evaluating on {event.num_val_images:,}; "
                f"set up in {event.setup_seconds:.1f} s{resumed}"
            )
            self._update(event.iteration)
        elif isinstance(event, WorkerStarted):
            self._join.expect(event)
            if self._plan and event.rank == 0 and event.world_size not in (0, self._plan.world_size):
                of = self._plan.world_size
                self._say(f"[yellow]going on with {event.world_size} of {of} workers[/]", always=True)
        elif isinstance(event, StepsDone):
            window = self._join.add(event)
            if window:
                self._show(window)
        elif isinstance(event, Evaluated):
            self._evaluated(event)
        elif isinstance(event, CheckpointSaved) and not self._progress:
            self._say(f"checkpoint of iteration {event.iteration} ({event.size_bytes / 1e6:.1f} MB)")
        elif isinstance(event, CheckpointFailed):
            self._say(f"[red]going on without a new checkpoint[/]: {escape(event.message)}", always=True)
        elif isinstance(event, WorkerFailed):
            self._say(f"[red]rank {event.rank} failed[/] in {event.section}: {escape(event.message)}", always=True)
            for file in event.image_files if event.failure in ("bad_input", "not_finite") else ():
                self._say(f"  image of its batch: {escape(file)}", always=True)
        elif isinstance(event, TrialRestarted):
            self._say(f"[yellow]starting the workers again[/] ({event.failure}: {escape(event.message)})", always=True)
        elif isinstance(event, TrialEnded):
            self.close()
            if event.status != "FINISHED":
                self._say(f"[red]{event.status.lower()}[/]: {escape(event.reason)}", always=True)

    def stopping(self, grace_seconds: float) -> None:
        """Says that somebody asked for the end, and what happens now."""
        self._say(
            f"[yellow]stopping[/]: the workers take a last checkpoint, for at most {grace_seconds:.0f} s; "
            "Ctrl-C again ends at once",
            always=True,
        )

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _start(self, plan: TrialPlan) -> None:
        self._plan, self._join, self._last_ap = plan, WindowJoin(plan.world_size), {}
        self._loop_started, self._last_line = None, 0.0
        workers = "1 worker" if plan.world_size == 1 else f"{plan.world_size} workers"
        self._say(f"[bold]starting[/] {workers} on {plan.device}, recipe {plan.recipe_name}")
        if self._console.is_terminal and not self._quiet:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total}"),
                _Eta(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[loss]}"),
                TextColumn("{task.fields[ap]}"),
                console=self._console,
                transient=True,
                expand=True,
            )
            self._task = self._progress.add_task(
                plan.name, total=plan.solver.max_iter, rate="starting", loss="", ap="", eta=None
            )
            self._progress.start()

    def _show(self, window: JointWindow) -> None:
        assert self._plan is not None
        eta = None
        if self._loop_started and window.iteration > self._loop_started[1]:
            began, first = self._loop_started
            eta = (window.time - began) / (window.iteration - first) * (self._plan.solver.max_iter - window.iteration)
        rate = f"{window.images_per_second:.4g} images/s"
        loss = f"loss {window.losses.get('total_loss', 0.0):.3f}"
        self._update(window.iteration, rate=rate, loss=loss, eta=eta)
        if not self._progress and time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self._say(f"iteration {window.iteration}/{self._plan.solver.max_iter}  ETA {duration(eta)}  {rate}  {loss}")

    def _update(self, iteration: int, **fields: object) -> None:
        if self._progress:
            self._progress.update(self._task, completed=iteration, **fields)  # type: ignore[arg-type]

    def _evaluated(self, event: Evaluated) -> None:
        assert self._plan is not None
        parts = []
        for name, key, target in (
            ("box", "box_ap", self._plan.target_box_ap),
            ("mask", "mask_ap", self._plan.target_mask_ap),
        ):
            ap, before = event.figures.get(key), self._last_ap.get(key)
            if ap is None:
                continue
            text = f"{name} AP {ap:.2f}"
            text += f" ({ap - before:+.2f})" if before is not None else ""
            if target is not None:
                text += f", target {target:g} " + ("met" if ap >= target else f"{target - ap:.2f} away")
            parts.append(text)
        self._last_ap = event.figures
        beside = f" beside training, which stood still {event.stall_seconds:.1f} s" if event.overlapped else ""
        self._say(f"evaluation at {event.iteration}: {'; '.join(parts) or 'no AP'} ({event.seconds:.1f} s{beside})")
        if self._progress:
            self._progress.update(self._task, ap=f"AP {event.figures.get('box_ap') or 0:.1f}")

    def _say(self, text: str, always: bool = False) -> None:
        if always or not self._quiet:
            name = f"[dim]{self._plan.name}[/] " if self._plan else ""
            self._console.print(f"{name}{text}", highlight=False, soft_wrap=True)
