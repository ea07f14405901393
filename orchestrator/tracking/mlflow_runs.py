"""MLflow, fed from the outbox: the only file that imports mlflow.

Every call may be made twice without harm: runs are found again by their key, and a metric point with its time, step and
value fixed when it was measured is one row however often it is sent.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import json
import logging
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from orchestrator.experiment.reading import parse_yaml, to_yaml
from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures.catalog import (
    HEADLINE,
    SHOWN_COLUMNS,
    VIEW_KEY,
    evaluation_metrics,
    reference_metrics,
    summary,
    window_metrics,
)
from orchestrator.figures.causes import root_cause
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.trial import trial_result
from orchestrator.figures.windows import WindowJoin
from orchestrator.report.table import markdown_table, number_text, rate_text, seconds_text
from orchestrator.runlog.folder import flatten
from trainers.contract.events import (
    CheckpointSaved,
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
from trainers.contract.plan import DatasetPlan, TrialPlan

logger = logging.getLogger(__name__)

RUN_KEY = "benchmark.key"
MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH = 1000, 100, 6000
MAX_NOTE = 5000
"""MLflow's limits per call and per value."""
HOW_TO_LOAD = """\
# To load this model

    import torch
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file("config.yaml")
    model = build_model(cfg)
    model.load_state_dict(torch.load("state.pt", map_location=cfg.MODEL.DEVICE, weights_only=True)["model"])
    model.eval()

`state.pt` also holds optimizer and schedule. Where it is missing, the checkpoint lies where the model's tag
`checkpoint` says.
"""


class MlflowRuns:
    """Turns events into MLflow calls, each of which may be repeated.

    Args:
        uri: The tracking store.
        run_dir: The run's folder.
        state: MLflow's ids that are known already: `runs` and `experiment_id`, as in `known`.
    """

    def __init__(self, uri: str, run_dir: Path, state: dict[str, Any]) -> None:
        # What they tell at level INFO, such as every step of making a database, is not for the user's screen. Here,
        # because importing mlflow sets its level.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client, self._run_dir, self._state = MlflowClient(uri), run_dir, state
        self._runs: dict[str, str] = state["runs"]
        self._plans: dict[str, TrialPlan] = {}
        self._joins: dict[str, WindowJoin] = {}
        self._events: dict[str, list[Event]] = {}
        self._seen: set[tuple[str, str, int]] = set()
        self._metrics: list[tuple[str, Metric]] = []

    @property
    def known(self) -> dict[str, Any]:
        """MLflow's ids of the experiment and of the runs, by trial; the references' as `reference/NAME`."""
        return {"runs": self._runs, "experiment_id": self._state["experiment_id"]}

    def recall(self, event: Event) -> None:
        """Takes in an event that is tracked already."""
        self._take_in(event)
        self._metrics.clear()

    def track(self, event: Event) -> None:
        """Takes in an event and tracks it."""
        if isinstance(event, RunStarted):
            self._start_run(event)
        elif isinstance(event, TrialStarted):
            self._start_trial(event)
        self._take_in(event)
        if isinstance(event, TrialRestarted):
            self._client.update_run(self._runs[event.trial], status="RUNNING")
        elif isinstance(event, WorkerStarted):
            tags = {f"host.{event.rank}": event.host, "device_name": event.device_name}
            tags |= {f"version.{package}": version for package, version in event.versions.items()}
            self._tag(self._runs[event.trial], tags)
        elif isinstance(event, LoopStarted) and event.config_yaml:
            values = dict(flatten(parse_yaml(event.config_yaml), "d2."))
            self._params(self._runs[event.trial], values)
            self._client.log_text(self._runs[event.trial], event.config_yaml, "config.yaml")
        elif isinstance(event, TrialEnded):
            self._end_trial(event)
        elif isinstance(event, RunEnded):
            self._end_run(event)
        if len(self._metrics) >= MAX_METRICS:
            self.flush()

    def flush(self) -> None:
        """Sends the metric points."""
        by_run: dict[str, list[Metric]] = {}
        for run_id, metric in self._metrics:
            by_run.setdefault(run_id, []).append(metric)
        for run_id, metrics in by_run.items():
            for start in range(0, len(metrics), MAX_METRICS):
                self._client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])
        self._metrics.clear()

    def _take_in(self, event: Event) -> None:
        self._events.setdefault(event.trial, []).append(event)
        if isinstance(event, TrialStarted):
            plan = TrialPlan.from_dict(event.plan)
            self._plans[event.trial], self._joins[event.trial] = plan, WindowJoin(plan.world_size)
        elif isinstance(event, WorkerStarted):
            self._joins[event.trial].expect(event)
        elif isinstance(event, StepsDone):
            window = self._joins[event.trial].add(event)
            if window:
                self._points(event.trial, window_metrics(window), window.iteration, window.time)
        elif isinstance(event, Evaluated):
            self._points(event.trial, evaluation_metrics(event), event.iteration, event.time)
        elif isinstance(event, SystemSampled):
            started = self._events[event.trial][0].time
            values = {f"system/{event.host}/{name}": value for name, value in event.values.items()}
            self._points(event.trial, values, int(event.time - started), event.time)

    def _points(self, trial: str, values: dict[str, Any], step: int, when: float) -> None:
        """Adds metric points; one that was there before a restart is not doubled by the same iteration after it."""
        for name, value in values.items():
            if value is not None and (trial, name, step) not in self._seen:
                self._seen.add((trial, name, step))
                if trial in self._runs:
                    self._metrics.append((self._runs[trial], Metric(name, value, int(when * 1000), step)))

    def _start_run(self, event: RunStarted) -> None:
        name = event.experiment["name"]
        experiment = self._client.get_experiment_by_name(name)
        found = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._state["experiment_id"] = found
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time))
        tags = {
            **event.tags,
            "mlflow.note.content": event.experiment.get("description", ""),
            "mlflow.source.name": event.tags.get("run.command", ""),
            "mlflow.source.type": "JOB" if "run.ray_job_id" in event.tags else "LOCAL",
            "mlflow.source.git.commit": event.tags.get("run.git_commit", ""),
            "kind": "experiment",
        }
        run_id = self._run(event.run_id, f"{name} {stamp}", event.time, tags)
        self._runs[""] = run_id
        for key, value in _experiment_tags(event.experiment.get("description", "")).items():
            self._client.set_experiment_tag(found, key, value)
        if event.attempt:
            self._client.update_run(run_id, status="RUNNING")
        self._params(run_id, dict(flatten(event.experiment)))
        self._client.log_text(run_id, to_yaml(event.experiment), "experiment.yaml")
        for row in event.experiment["reference_rows"]:
            self._reference_run(name, ReferenceRow.model_validate(row))

    def _reference_run(self, experiment: str, row: ReferenceRow) -> None:
        """A published figure as a run of its own, once per experiment, for MLflow's compare view."""
        tags = {"kind": "reference", "source": row.source, "mlflow.note.content": f"Published: {row.source}"}
        run_id = self._run(f"reference/{experiment}/{row.name}", row.name, time.time(), tags)
        self._runs[f"reference/{row.name}"] = run_id
        if self._client.get_run(run_id).info.status == "FINISHED":
            return
        found = {name: value for name, value in reference_metrics(row).items() if value is not None}
        self._client.log_batch(run_id, metrics=[Metric(name, value, 0, 0) for name, value in found.items()])
        self._params(run_id, {"workers": str(row.world_size)})
        self._client.set_terminated(run_id, "FINISHED")

    def _start_trial(self, event: TrialStarted) -> None:
        plan = TrialPlan.from_dict(event.plan)
        parent = self._client.get_run(self._runs[""])
        tags = {
            **{key: value for key, value in parent.data.tags.items() if key.startswith(("mlflow.source", "run."))},
            "mlflow.parentRunId": self._runs[""],
            "kind": "trial",
            "mlflow.note.content": _about(plan),
            "world_size": str(plan.world_size),
            "recipe": plan.recipe_name,
            "scaling": plan.scaling,
            "protocol": plan.protocol,
            "device": plan.device,
        }
        run_id = self._run(f"{parent.data.tags[RUN_KEY]}/{plan.name}", plan.name, event.time, tags)
        self._runs[event.trial] = run_id
        self._params(run_id, {"workers": str(plan.world_size), **dict(flatten(event.plan, "plan."))})
        used = ((plan.train, "training"), (plan.val, "evaluation"))
        # A replayed log names data that lies elsewhere.
        inputs = [_dataset_input(data, context) for data, context in used if Path(data.annotations).is_file()]
        if inputs:
            self._client.log_inputs(run_id, datasets=inputs)

    def _end_trial(self, event: TrialEnded) -> None:
        run_id, plan = self._runs[event.trial], self._plans[event.trial]
        self.flush()
        result = trial_result(plan, self._events[event.trial], run_id)
        step, when = result.iterations or 0, int(event.time * 1000)
        metrics = [Metric(name, value, when, step) for name, value in summary(result).items() if value is not None]
        self._client.log_batch(run_id, metrics=metrics)
        self._client.log_text(run_id, result.model_dump_json(indent=2), "result.json")
        for log in sorted(Path(plan.trial_dir).glob("log.txt*")):
            self._client.log_artifact(run_id, str(log))
        started = next(e for e in self._events[""] if isinstance(e, RunStarted))
        if started.experiment["tracking"]["log_model"]:
            self._log_model(run_id, plan, result)
        self._client.set_tag(run_id, "mlflow.note.content", f"{_about(plan)}; {_outcome(result)}")
        self._tag(run_id, _story(result, self._events[event.trial]))
        self._client.set_terminated(run_id, event.status, int(event.time * 1000))

    def _end_run(self, event: RunEnded) -> None:
        self.flush()
        run_id = self._runs[""]
        results = self._run_dir / "results.json"
        if results.exists():
            result = ExperimentResult.model_validate_json(results.read_text(encoding="utf-8"))
            for row in result.scaling:
                for trial in result.trials:
                    if (trial.recipe, trial.scaling, trial.world_size) == (row.recipe, row.kind, row.world_size):
                        values = {"scaling/efficiency": row.efficiency, "scaling/speed_up": row.speed_up}
                        metrics = [Metric(k, v, int(event.time * 1000), 0) for k, v in values.items() if v is not None]
                        self._client.log_batch(self._runs[trial.name], metrics=metrics)
            self._client.set_tag(run_id, "mlflow.note.content", markdown_table(result)[:MAX_NOTE])
        for name in ("results.json", "report.md", "report.html", "table.csv"):
            if (self._run_dir / name).exists():
                self._client.log_artifact(run_id, str(self._run_dir / name))
        self._client.set_terminated(run_id, event.status, int(event.time * 1000))

    def _run(self, key: str, name: str, started: float, tags: dict[str, str]) -> str:
        """The run with this key, made if it is not there."""
        found = self._client.search_runs([self._state["experiment_id"]], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {RUN_KEY: key, "mlflow.user": getpass.getuser(), **tags}
        run = self._client.create_run(
            self._state["experiment_id"], start_time=int(started * 1000), tags=tags, run_name=name
        )
        return str(run.info.run_id)

    def _log_model(self, run_id: str, plan: TrialPlan, result: TrialResult) -> None:
        """The last checkpoint as one of MLflow's models, its AP linked to data set and iteration."""
        saved = [e for e in self._events[plan.name] if isinstance(e, CheckpointSaved)]
        configs = [e.config_yaml for e in self._events[plan.name] if isinstance(e, LoopStarted) and e.config_yaml]
        if not saved or not configs:
            return
        last, experiment_id = saved[-1], self._state["experiment_id"]
        found = self._client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
        model = found[0] if found else self._client.create_logged_model(
            experiment_id, plan.name, run_id, tags={"checkpoint": last.path, "iteration": str(last.iteration)},
            params={"config": plan.config_file, "recipe": plan.recipe_name, "workers": str(plan.world_size)},
            model_type="detectron2",
        )  # fmt: skip
        if model.status == LoggedModelStatus.READY:
            return
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.yaml").write_text(configs[-1], encoding="utf-8")
            Path(folder, "README.md").write_text(HOW_TO_LOAD, encoding="utf-8")
            # A checkpoint in an object store stays there; the tag says where.
            for state in sorted(Path(last.path).glob("state*.pt"))[-1:]:
                Path(folder, "state.pt").symlink_to(state)
            self._client.log_model_artifacts(model.model_id, folder)
        data = _dataset_input(plan.val, "evaluation").dataset if Path(plan.val.annotations).is_file() else None
        known = {"model_id": model.model_id, "dataset_name": data and data.name, "dataset_digest": data and data.digest}
        evaluated = [e for e in self._events[plan.name] if isinstance(e, Evaluated) and e.iteration == last.iteration]
        metrics = [
            Metric(f"coco/{name}", value, int(event.time * 1000), event.iteration, run_id=run_id, **known)
            for event in evaluated[-1:]
            for name, value in event.figures.items()
            if value is not None
        ]
        self._client.log_batch(run_id, metrics=metrics)
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    def _params(self, run_id: str, values: dict[str, Any]) -> None:
        params = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in values.items()]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + MAX_PARAMS])

    def _tag(self, run_id: str, tags: dict[str, str]) -> None:
        if tags:
            self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def _experiment_tags(description: str) -> dict[str, str]:
    """The experiment's note, and the view of its runs: the columns that matter, trials and published figures."""
    meanings = "\n".join(f"- `{name}`: {meaning}" for name, meaning in HEADLINE.items())
    # Sorted by anything but the date: else MLflow folds the trials away under their parents.
    order = {"orderByKey": "metrics.`throughput/images_per_second`", "orderByAsc": True}
    view = json.dumps({"selectedColumns": list(SHOWN_COLUMNS), "searchFilter": "tags.kind != 'experiment'", **order})
    return {
        "mlflow.note.content": f"{description}\n\n{meanings}"[:MAX_NOTE],
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{VIEW_KEY}": "deflate;" + base64.b64encode(zlib.compress(view.encode())).decode(),
    }


def _about(plan: TrialPlan) -> str:
    workers = f"{plan.world_size} worker{'s' if plan.world_size > 1 else ''}"
    return f"{workers} on {plan.device}, recipe {plan.recipe_name}, {plan.scaling} scaling, {plan.protocol}"


def _outcome(result: TrialResult) -> str:
    figures = {
        "images/s": rate_text(result.images_per_second),
        "s to train": seconds_text(result.time_to_train_seconds),
        "box AP": number_text(result.box_ap, 2),
        "mask AP": number_text(result.mask_ap, 2),
    }
    return ", ".join(f"{value} {name}" for name, value in figures.items())


def _story(result: TrialResult, events: list[Event]) -> dict[str, str]:
    """Tags that say where a trial ran, why it ended, where it failed, and what each restart cost."""
    tags = {"reason": result.reason} if result.reason else {}
    tags |= {"num_nodes": str(result.num_nodes)} if result.num_nodes else {}
    cause = root_cause([event for event in events if event.attempt == events[-1].attempt])
    if cause is not None and result.status == "FAILED":
        tags |= {"failure": cause.failure, "failure.rank": str(cause.rank), "failure.iteration": str(cause.iteration)}
    for restart in result.restarts:
        down = f"{restart.downtime_seconds:.1f} s down" if restart.downtime_seconds is not None else "not up again"
        if restart.recovery_seconds is not None:
            down += f", {restart.recovery_seconds:.1f} s from the failure to the next step"
        if restart.world_size not in (None, result.world_size):
            down += f", with {restart.world_size} workers"
        tags[f"restart.{restart.attempt}"] = (
            f"{restart.cause}: {restart.message}; {restart.lost_iterations} iterations lost, {down}"
        )
    return tags


def _dataset_input(dataset: DatasetPlan, context: str) -> DatasetInput:
    """A data set as MLflow knows one; its digest is of the annotation file."""
    annotations = Path(dataset.annotations)
    digest = hashlib.sha256()
    with annotations.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    source = json.dumps({"annotations": dataset.annotations, "images": dataset.images})
    return DatasetInput(
        Dataset(dataset.name, digest.hexdigest()[:8], "local", source), [InputTag("mlflow.data.context", context)]
    )
