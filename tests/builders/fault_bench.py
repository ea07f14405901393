"""A bench for faults: one small trial on a Ray of its own, run in this process with faults injected, and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from orchestrator.execution.stop import StopRequest
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.spec import Experiment, Faults
from tests.builders.experiments import tiny_experiment
from tests.builders.waiting import wait_for
from trainers.contract.events import Event, RunEnded, RunStarted, TrialEnded
from trainers.contract.plan import TrialPlan
from trainers.faults import Fault, fired

E = TypeVar("E", bound=Event)

ITERATIONS = 12


def experiment(**changes: Any) -> dict[str, Any]:
    """Two workers, 12 iterations, a window of 3, an evaluation every 6, a checkpoint every 3."""
    values = tiny_experiment(
        trials={"world_sizes": [2], "scaling": "strong"},
        protocol={"iterations": ITERATIONS, "eval_period_iterations": 6, "warmup_iterations": 2},
        storage={"checkpoint_period_iterations": 3},
        log_period_iterations=3,
    )
    return {**values, **changes}


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    ended: TrialEnded
    events: list[Event]
    fired: list[dict[str, Any]]
    plan: TrialPlan
    rows: Counter[tuple[str, int]]
    tags: dict[str, str]

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def state(self) -> str:
        """Hash of the weights and the optimizer's state at the end."""
        from trainers.contract.events import LoopFinished

        return self.of(LoopFinished)[-1].state_sha256

    @property
    def scores(self) -> dict[int, dict[str, float | None]]:
        """Figures of every evaluation, by iteration."""
        from trainers.contract.events import Evaluated

        return {event.iteration: event.figures for event in self.of(Evaluated)}


def metric_rows(uri: str, run_id: str) -> Counter[tuple[str, int]]:
    """How often MLflow has a point of each curve, by metric and step; only of what is the same at every speed."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    kept = ("loss/", "coco/box", "coco/mask", "learning")  # summaries (coco/final…) are written at every end of a trial
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith(kept)]
    return Counter((name, point.step) for name in names for point in client.get_metric_history(run_id, name))


def workers() -> Iterator[psutil.Process]:
    """The living worker processes of Ray Train."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                yield process


class Bench:
    """Runs trials with faults."""

    def __init__(self, folder: Path, faults_file: Path) -> None:
        self.folder, self.faults_file = folder, faults_file
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self._number = 0

    def run(
        self,
        *faults: Fault,
        policy: Faults | None = None,
        stop: StopRequest | None = None,
        values: dict[str, Any] | None = None,
        root: Path | None = None,
        listeners: list[Callable[[Event], None]] | None = None,
        **plan_changes: Any,
    ) -> Outcome:
        """Runs the trial to its end, with some faults on the way."""
        from orchestrator.data.generate import generate
        from orchestrator.execution.event_log import EventLog
        from orchestrator.execution.event_pump import EventPump
        from orchestrator.execution.trial import run_trial
        from orchestrator.runlog.outbox import FILE_NAME, Outbox
        from orchestrator.tracking.driver import Tracker

        wait_for(lambda: not list(workers()))  # those of the trial before have room, and may be taken for others
        self._number += 1
        run_dir = self.run_dir = self.folder / f"run{self._number}"
        run_dir.mkdir()
        settings = Experiment.model_validate(values or experiment())
        assert settings.data.generated is not None
        if root is None:
            root = self.folder / "data"
            generate(root, **settings.data.generated.model_dump())
        (plan,) = expand(settings, Hardware(num_cpus=2), str(run_dir), root)
        plan = dataclasses.replace(plan, **plan_changes)
        self.faults_file.write_text(json.dumps([dataclasses.asdict(fault) for fault in faults]))
        self.faults_file.with_suffix(".fired").unlink(missing_ok=True)
        pump = EventPump(EventLog(Outbox(run_dir / FILE_NAME), listeners or []))
        driver: dict[str, Any] = {"trial": "", "attempt": 0, "rank": -1, "time": 0.0}
        run_id = f"{plan.experiment}/{self._number}"
        pump.emit(RunStarted(**driver, experiment=settings.model_dump(mode="json"), run_id=run_id, tags={}))
        ended = run_trial(plan, policy or settings.faults, pump, str(run_dir / "ray"), stop or StopRequest(60))
        pump.close()
        self.faults_file.unlink(missing_ok=True)  # nothing else in this process is to meet them
        pump.emit(RunEnded(**driver, status=ended.status))
        tracker = Tracker(run_dir, self.uri)
        assert tracker.sync()
        run = tracker.run_ids()[plan.name]
        from mlflow.tracking import MlflowClient

        tags = MlflowClient(self.uri).get_run(run).data.tags
        events = [event for event in pump.events if event.trial == plan.name]
        return Outcome(ended, events, fired(self.faults_file), plan, metric_rows(self.uri, run), tags)
