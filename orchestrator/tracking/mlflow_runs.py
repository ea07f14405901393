"""Turns the events of a run into MLflow's runs, metrics, params and tags.

Every call may be repeated without harm: runs are found again by their key, and a metric point has the time, step and
value of its measurement, so that sending it twice leaves one row.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient
from pydantic import ValidationError

from orchestrator.experiment.reading import flatten, parse_yaml, to_yaml
from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures.logged_plan import LoggedPlan, Plan, plan_from_dict
from orchestrator.figures.metrics import metrics, summary_step
from orchestrator.figures.neighbours import with_neighbours
from orchestrator.figures.records import ExperimentResult
from orchestrator.figures.steps import WindowJoin
from orchestrator.figures.trial import trial_result
from orchestrator.process import user_name
from orchestrator.report.table import markdown_table
from orchestrator.tracking import benchmark, notes
from orchestrator.tracking.evaluations import EvaluationLog, evaluation_metrics
from orchestrator.tracking.models import dataset_inputs, log_model
from orchestrator.tracking.text import fit, fit_tags, own_runs
from trainers.contract.events import (
    Evaluated,
    Event,
    LoopStarted,
    RunEnded,
    RunStarted,
    StepsDone,
    SystemSampled,
    TrialEnded,
    TrialRestarted,
    TrialStarted,
    WorkerStarted,
)

RUN_KEY = "benchmark.key"
"""Tag by which a run is found again."""

MAX_METRICS, MAX_PARAMS, MAX_TAGS = 1000, 100, 100
"""MLflow's limits per call."""


class MlflowRuns:
    """Turns events into MLflow calls; `state` has the ids that are known already, as in `known`."""

    def __init__(self, uri: str, run_dir: Path, state: dict[str, Any]) -> None:
        # They log every step of creating a database, and every failure with its traceback; a `TrackingError` says it in
        # a line. Here, because importing mlflow sets its level.
        for name in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._client, self._run_dir = MlflowClient(uri), run_dir
        self._evaluations = EvaluationLog(self._client)
        self._experiment_id: str | None = state["experiment_id"]
        self._runs: dict[str, str] = state["runs"]
        self._plans: dict[str, Plan] = {}
        self._joins: dict[str, WindowJoin] = {}
        self._events: dict[str, list[Event]] = defaultdict(list)
        self._seen: set[tuple[str, str, int]] = set()
        self._stored: dict[tuple[str, str, int], int] = {}
        """Points by run, metric and step that the store has of an earlier start of tracking, and their times (ms)."""
        self._metrics: dict[str, list[Metric]] = defaultdict(list)

    @property
    def known(self) -> dict[str, Any]:
        """MLflow's ids of the experiment and of the runs, by trial; those of references by `reference/NAME`."""
        return {"runs": self._runs, "experiment_id": self._experiment_id}

    def find_deleted(self) -> tuple[Literal["experiment", "run"], str] | None:
        """What was deleted in the store of all that this run writes to, and its id; None for nothing, or no answer."""
        try:
            if self._experiment_id and self._client.get_experiment(self._experiment_id).lifecycle_stage == "deleted":
                return "experiment", self._experiment_id
            for run_id in own_runs(self._runs).values():
                if self._client.get_run(run_id).info.lifecycle_stage == "deleted":
                    return "run", run_id
        except Exception:  # noqa: BLE001 - it is asked after a failure, which is reported anyway
            return None
        return None

    def recall(self, event: Event) -> None:
        """Takes in an event that is tracked already."""
        if self._is_out_of_place(event):
            return
        self._take_in(event)
        self._metrics.clear()

    def track(self, event: Event) -> None:
        """Takes in an event and tracks it."""
        if self._is_out_of_place(event):
            return
        if isinstance(event, RunStarted):
            self._start_run(event)
        elif isinstance(event, TrialStarted):
            self._start_trial(event)
        self._take_in(event)
        if isinstance(event, TrialRestarted):
            self._client.update_run(self._runs[event.trial], status="RUNNING")
        elif isinstance(event, WorkerStarted):
            self._tag(self._runs[event.trial], notes.worker_tags(event))
        elif isinstance(event, LoopStarted) and event.config_yaml:
            self._params(self._runs[event.trial], dict(flatten(parse_yaml(event.config_yaml), "d2.")))
            self._client.log_text(self._runs[event.trial], event.config_yaml, "config.yaml")
        elif isinstance(event, Evaluated):
            run_id = self._runs[event.trial]
            if missing := self._evaluations.log_photos(run_id, self._plans[event.trial], event):
                self._tag(run_id, {"photos": f"none: {missing}"})
        elif isinstance(event, TrialEnded):
            self._end_trial(event)
        elif isinstance(event, RunEnded):
            self._end_run(event)
        if any(len(points) >= MAX_METRICS for points in self._metrics.values()):
            self.flush()

    def flush(self) -> None:
        """Sends the metric points."""
        for run_id, points in self._metrics.items():
            for start in range(0, len(points), MAX_METRICS):
                self._client.log_batch(run_id, metrics=points[start : start + MAX_METRICS])
        self._metrics.clear()

    def fail(self, reason: str) -> None:
        """Marks the runs as failed that are not at their end, at the last event's time; those of the trials first."""
        last = max((event.time for event in chain(*self._events.values())), default=time.time())
        for run_id in reversed(own_runs(self._runs).values()):
            info = self._client.get_run(run_id).info
            if info.status in ("RUNNING", "SCHEDULED"):
                self._tag(run_id, {"reason": reason})
                self._client.set_terminated(run_id, "FAILED", max(int(last * 1000), info.start_time))

    def _is_out_of_place(self, event: Event) -> bool:
        """Whether it is of a trial whose start is missing, in a damaged log."""
        return bool(event.trial) and event.trial not in self._plans and not isinstance(event, TrialStarted)

    def _take_in(self, event: Event) -> None:
        """Remembers an event, and adds the metric points that it completes."""
        self._events[event.trial].append(event)
        if isinstance(event, TrialStarted):
            plan = plan_from_dict(event.plan)
            self._plans[event.trial], self._joins[event.trial] = plan, WindowJoin(plan.world_size)
        elif isinstance(event, WorkerStarted):
            self._joins[event.trial].expect(event)
        elif isinstance(event, StepsDone):
            window = self._joins[event.trial].add(event)
            if window:
                self._add_points(event.trial, metrics(window, "windows."), window.iteration, window.time)
        elif isinstance(event, Evaluated):
            self._add_points(event.trial, evaluation_metrics(event), event.iteration, event.time)
        elif isinstance(event, SystemSampled):
            started = self._events[event.trial][0].time
            values = {f"system/{event.host}/{name}": value for name, value in event.values.items()}
            self._add_points(event.trial, values, int(event.time - started), event.time)

    def _add_points(self, trial: str, values: dict[str, Any], step: int, when: float) -> None:
        """Adds the known values as metric points; an iteration that a restart repeats keeps its first point."""
        for name, value in values.items():
            if value is not None and (trial, name, step) not in self._seen:
                self._seen.add((trial, name, step))
                run_id, key = self._runs.get(trial), fit(name, "key")
                if run_id and (run_id, key, step) not in self._stored:
                    self._metrics[run_id].append(Metric(key, value, int(when * 1000), step))

    def _start_run(self, event: RunStarted) -> None:
        name = event.experiment["name"]
        # A run stays in its experiment, whatever that is called by now.
        parent = self._runs.get("")
        found = self._client.get_run(parent).info if parent else self._client.get_experiment_by_name(name)
        self._experiment_id = found.experiment_id if found else self._client.create_experiment(name)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time))
        run_id = self._run(event.run_id, f"{name} {stamp}", event.time, notes.run_tags(event))
        self._runs[""] = run_id
        for key, value in notes.experiment_tags(event).items():
            self._client.set_experiment_tag(self._experiment_id, key, fit(value, "tag"))
        if event.attempt:
            self._client.update_run(run_id, status="RUNNING")
            self._tag(run_id, notes.resume_tags(event))
        else:
            self._params(run_id, dict(flatten(event.experiment)))
        self._client.log_text(run_id, to_yaml(event.experiment), "experiment.yaml")
        rows = [ReferenceRow.model_validate(row) for row in event.experiment["reference_rows"]]
        for position, row in enumerate(rows):
            same = sum(earlier.name == row.name for earlier in rows[:position])
            self._reference_run(name, row, f"{row.name} ({same + 1})" if same else row.name)

    def _reference_run(self, experiment: str, row: ReferenceRow, label: str) -> None:
        """A published figure as a separate run, once per experiment, for MLflow's compare view."""
        tags = {"kind": "reference", "source": row.source, "mlflow.note.content": f"Published: {row.source}"}
        run_id = self._run(f"reference/{experiment}/{label}", label, time.time(), tags)
        self._runs[f"reference/{label}"] = run_id
        if self._client.get_run(run_id).info.status == "FINISHED":
            return
        self._figures(run_id, metrics(row, "references.") | benchmark.published(row))
        self._params(run_id, {"workers": str(row.world_size)})
        self._client.set_terminated(run_id, "FINISHED")

    def _start_trial(self, event: TrialStarted) -> None:
        plan = plan_from_dict(event.plan)
        parent = self._client.get_run(self._runs[""])
        inherited = {k: v for k, v in parent.data.tags.items() if k.startswith(("mlflow.source", "run."))}
        tags = {**inherited, "mlflow.parentRunId": self._runs[""], **notes.trial_tags(plan)}
        run_id = self._run(f"{parent.data.tags[RUN_KEY]}/{plan.name}", plan.name, event.time, tags)
        self._runs[event.trial] = run_id
        values = dict(flatten(event.plan, "plan."))
        if isinstance(plan, LoggedPlan):
            values = {key: value for key, value in values.items() if value is not None}
        self._params(run_id, {"workers": str(plan.world_size), **values})
        if inputs := dataset_inputs(plan):
            self._client.log_inputs(run_id, datasets=inputs)

    def _end_trial(self, event: TrialEnded) -> None:
        run_id, plan, events = self._runs[event.trial], self._plans[event.trial], self._events[event.trial]
        self.flush()
        result = with_neighbours(trial_result(plan, events, run_id), chain(*self._events.values()))
        self._figures(run_id, metrics(result), event.time, summary_step(events))
        self._client.log_text(run_id, result.model_dump_json(indent=2), "result.json")
        self._evaluations.log_artifacts(run_id, plan, [e for e in events if isinstance(e, Evaluated)])
        if isinstance(plan, LoggedPlan):
            logs = [Path(plan.source)]
        else:
            logs = [path for name in ("log.txt*", "stuck-*") for path in sorted(Path(plan.trial_dir).glob(name))]
        for log in logs:
            self._client.log_artifact(run_id, str(log))
        started = next(e for e in reversed(self._events[""]) if isinstance(e, RunStarted))
        if which := started.experiment["tracking"]["log_model"]:
            log_model(self._client, self._experiment(), run_id, plan, events, best=which == "best")
        self._tag(run_id, {"mlflow.note.content": f"{notes.about(plan)}; {notes.outcome(result)}"})
        self._tag(run_id, notes.outcome_tags(result, events))
        self._client.set_terminated(run_id, event.status, int(event.time * 1000))

    def _end_run(self, event: RunEnded) -> None:
        self.flush()
        run_id = self._runs[""]
        results = self._run_dir / "results.json"
        with suppress(FileNotFoundError, ValidationError):
            result = ExperimentResult.model_validate_json(results.read_text(encoding="utf-8"))
            ends = sum(isinstance(earlier, RunEnded) for earlier in self._events[""]) - 1
            for row in result.scaling:
                for trial in (each for each in result.trials if each.name in self._runs):
                    if (trial.recipe, trial.scaling, trial.world_size) == (row.recipe, row.kind, row.world_size):
                        self._figures(self._runs[trial.name], metrics(row, "scaling."), event.time, ends)
            if result.benchmark:
                self._figures(run_id, metrics(result.benchmark, "benchmark."), event.time, ends)
            self._tag(run_id, {"mlflow.note.content": markdown_table(result), **benchmark.summary_tags(result)})
            self._tag(run_id, notes.prediction_tags(result))
        benchmark.log_package(self._client, run_id, self._run_dir)
        for name in ("results.json", "report.md", "report.html", "table.csv", "prediction.json"):
            if (self._run_dir / name).exists():
                self._client.log_artifact(run_id, str(self._run_dir / name))
        self._client.set_terminated(run_id, event.status, int(event.time * 1000))

    def _run(self, key: str, name: str, started: float, tags: dict[str, str]) -> str:
        """The run with this key, created if there is none."""
        key = fit(key, "filter")
        found = self._client.search_runs([self._experiment()], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
        if found:
            self._recall_points(str(found[0].info.run_id), list(found[0].data.metrics))
            return str(found[0].info.run_id)
        tags = fit_tags({"mlflow.user": user_name(), **tags}) | {RUN_KEY: key}
        run = self._client.create_run(
            self._experiment(), start_time=int(started * 1000), tags=tags, run_name=fit(name, "name")
        )
        return str(run.info.run_id)

    def _recall_points(self, run_id: str, names: list[str]) -> None:
        """Asks for the points that a run has: the log may have lost those that were tracked from it."""
        for name in names:
            for point in self._client.get_metric_history(run_id, name):
                self._stored[run_id, name, point.step] = point.timestamp

    def _experiment(self) -> str:
        if self._experiment_id is None:
            raise ValueError("the outbox does not begin with the start of its run")
        return self._experiment_id

    def _figures(self, run_id: str, values: dict[str, float | None], when: float = 0.0, step: int = 0) -> None:
        """Logs the known ones of some figures at the first free step; points that are there stay as they are."""
        known = {fit(name, "key"): value for name, value in values.items() if value is not None}
        at = int(when * 1000)
        while any(self._stored.get((run_id, name, step), at) != at for name in known):
            step += 1  # the log has lost the end of the trial that these figures were of
        new = [name for name in known if (run_id, name, step) not in self._stored]
        self._client.log_batch(run_id, metrics=[Metric(name, known[name], at, step) for name in new])

    def _params(self, run_id: str, values: dict[str, Any]) -> None:
        """Logs the params that the run lacks: those of its first start stay, since MLflow refuses another value."""
        fitting = {fit(key, "key"): fit(value, "param") for key, value in values.items()}
        stored = self._client.get_run(run_id).data.params
        params = [Param(key, value) for key, value in fitting.items() if key not in stored]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + MAX_PARAMS])

    def _tag(self, run_id: str, tags: dict[str, str]) -> None:
        fitting = [RunTag(key, value) for key, value in fit_tags(tags).items()]
        for start in range(0, len(fitting), MAX_TAGS):
            self._client.log_batch(run_id, tags=fitting[start : start + MAX_TAGS])
