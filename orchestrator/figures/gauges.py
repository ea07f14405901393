"""The figures of a running trial under their names in Prometheus, kept up to date from its events."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatchmethod

from orchestrator.figures.goodput import goodput_figures
from orchestrator.figures.sections import sections
from orchestrator.figures.steps import WindowJoin
from trainers.contract.events import (
    Evaluated,
    Event,
    RunStarted,
    StepsDone,
    TrialEnded,
    TrialRestarted,
    TrialStarted,
    WorkerStarted,
)

GAUGES = {
    "windows.images_per_second": "detectron2_images_per_second",
    "windows.step_seconds.p50": "detectron2_step_p50_seconds",
    "windows.step_seconds.p95": "detectron2_step_p95_seconds",
    "windows.data_wait_share": "detectron2_data_wait_ratio",
    "windows.losses.*": "detectron2_total_loss",
    "windows.learning_rate": "detectron2_learning_rate",
    "windows.peak_memory_gib": "detectron2_peak_memory_bytes",
    "evaluations.box_ap": "detectron2_box_ap",
    "evaluations.mask_ap": "detectron2_mask_ap",
    "evaluations.keypoint_ap": "detectron2_keypoint_ap",
    "goodput": "detectron2_goodput_ratio",
    "num_restarts": "detectron2_restarts",
    "iterations": "detectron2_iterations",
    "world_size": "detectron2_workers",
}
"""Names by key of the catalogue, by Prometheus' conventions: base units, which are the end of the name, shares as
`_ratio`. Ray puts `ray_` before them. Of the losses, their sum."""

TAGS = ("experiment", "run_id", "trial")
"""Labels of every gauge."""

BYTES_PER_GIB = 2**30

Labels = tuple[str, str, str]
"""Values of `TAGS`."""


class LiveFigures:
    """The latest figures of the trials that run, from all events of the run in their order."""

    def __init__(self) -> None:
        self._run = ("", "")
        self._live: set[str] = set()
        self._joins: dict[str, WindowJoin] = {}
        self._values: dict[str, dict[str, float | None]] = {}

    def take(self, event: Event) -> None:
        """Takes the next event."""
        if isinstance(event, RunStarted):
            self._run = (str(event.experiment.get("name", "")), event.run_id)
            self._live.clear()  # what was under way had lost its driver
        elif isinstance(event, TrialEnded):
            self._live.discard(event.trial)
        elif isinstance(event, TrialStarted | TrialRestarted):
            self._live.add(event.trial)
        self._update(event)  # the last of a trial's workers may be later than its end

    def take_goodput(self, events: Sequence[Event]) -> None:
        """Takes from all events so far the goodput of every trial that runs, up to its last event."""
        for trial in self._live:
            own = [event for event in events if event.trial == trial]
            last = max(event.time for event in own)
            now = TrialEnded(trial=trial, attempt=0, rank=-1, time=last, status="KILLED", reason="")
            self._put(trial, goodput=goodput_figures(sections([*own, now]), own, None).get("goodput"))

    def values(self) -> list[tuple[str, Labels, float]]:
        """Name in Prometheus, labels and value of each known figure of each trial that runs."""
        return [
            (GAUGES[key], (*self._run, trial), value * BYTES_PER_GIB if key.endswith("_gib") else value)
            for trial in sorted(self._live)
            for key, value in self._values.get(trial, {}).items()
            if value is not None
        ]

    def _put(self, trial: str, **values: float | None) -> None:
        self._values.setdefault(trial, {}).update(values)

    @singledispatchmethod
    def _update(self, event: Event) -> None:
        """Takes the figures of an event of a trial."""

    @_update.register
    def _trial_started(self, event: TrialStarted) -> None:
        self._joins[event.trial] = WindowJoin(event.plan["world_size"])
        self._put(event.trial, num_restarts=0, world_size=event.plan["world_size"])

    @_update.register
    def _trial_restarted(self, event: TrialRestarted) -> None:
        self._put(event.trial, num_restarts=event.attempt)

    @_update.register
    def _worker_started(self, event: WorkerStarted) -> None:
        if event.world_size is not None and event.trial in self._joins:
            self._joins[event.trial].expect(event)
            self._put(event.trial, world_size=event.world_size)

    @_update.register
    def _steps_done(self, event: StepsDone) -> None:
        window = self._joins[event.trial].add(event) if event.trial in self._joins else None
        if window is None:
            return
        self._put(event.trial, iterations=window.iteration)
        self._values[event.trial] |= {
            "windows.images_per_second": window.images_per_second,
            "windows.step_seconds.p50": window.step_seconds.p50,
            "windows.step_seconds.p95": window.step_seconds.p95,
            "windows.data_wait_share": window.data_wait_share,
            "windows.losses.*": window.losses.get("total_loss"),
            "windows.learning_rate": window.learning_rate,
            "windows.peak_memory_gib": window.peak_memory_gib,
        }

    @_update.register
    def _evaluated(self, event: Evaluated) -> None:
        names = ("box_ap", "mask_ap", "keypoint_ap")
        self._put(event.trial, **{f"evaluations.{name}": event.figures.get(name) for name in names})
