"""Data sets and models of a trial, as MLflow knows them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric
from mlflow.tracking import MlflowClient

from orchestrator.figures.accuracy import first_evaluations
from orchestrator.figures.logged_plan import Plan
from orchestrator.files import file_sha256
from orchestrator.tracking.text import fit
from trainers.contract.events import CheckpointSaved, Evaluated, Event, LoopStarted
from trainers.contract.plan import DatasetPlan, TrialPlan
from trainers.contract.targets import metric_rating

HOW_TO_LOAD = """\
# To load this model

    import torch
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.set_new_allowed(True)  # keys of samplers that detectron2 has no defaults for
    cfg.merge_from_file("config.yaml")
    model = build_model(cfg)
    model.load_state_dict(torch.load("state.pt", map_location=cfg.MODEL.DEVICE, weights_only=True)["model"])
    model.eval()

`state.pt` also holds optimizer and schedule, and with `protocol.ema` the averaged weights, under `["ema"]["model"]`.
Where it is missing, the model's tag `checkpoint` names the checkpoint.
"""


def dataset_inputs(plan: Plan) -> list[DatasetInput]:
    """Training and validation data of a trial, where their annotation files are on this machine."""
    if not isinstance(plan, TrialPlan):
        return []  # a log only names its data
    used = ((plan.train, "training"), (plan.val, "evaluation"))
    return [
        DatasetInput(_dataset(data), [InputTag("mlflow.data.context", context)])
        for data, context in used
        if Path(data.annotations).is_file()
    ]


def log_model(
    client: MlflowClient, experiment_id: str, run_id: str, plan: Plan, events: Sequence[Event], *, best: bool = False
) -> None:
    """Logs a checkpoint of a trial as a model with the AP of its iteration; does nothing where there is none.

    It is the last one, or the `best` by the trial's metric, whose name then ends in `-best`; where no checkpoint was
    evaluated, the last all the same.
    """
    saved = [e for e in events if isinstance(e, CheckpointSaved)]
    configs = [e.config_yaml for e in events if isinstance(e, LoopStarted) and e.config_yaml]
    if not saved or not configs or not isinstance(plan, TrialPlan):
        return
    chosen = (best and _best(plan, saved, events)) or saved[-1]
    name = f"{plan.name}-best" if best else plan.name
    found = client.search_logged_models([experiment_id], f"source_run_id = '{fit(run_id, 'filter')}'")
    model = found[0] if found else client.create_logged_model(
        experiment_id, name, run_id, tags={"checkpoint": chosen.path, "iteration": str(chosen.iteration)},
        params={"config": plan.config_file, "recipe": plan.recipe_name, "workers": str(plan.world_size)},
        model_type="detectron2",
    )  # fmt: skip
    if model.status == LoggedModelStatus.READY:
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(configs[-1], encoding="utf-8")
        Path(folder, "README.md").write_text(HOW_TO_LOAD, encoding="utf-8")
        # A checkpoint in an object store stays there; the tag names it.
        if state := _state_file(Path(chosen.path)):
            Path(folder, "state.pt").symlink_to(state)
        client.log_model_artifacts(model.model_id, folder)
    data = _dataset(plan.val) if Path(plan.val.annotations).is_file() else None
    evaluated = [e for e in events if isinstance(e, Evaluated) and e.iteration == chosen.iteration]
    val, digest = (data.name, data.digest) if data else (None, None)
    # The points that the run has: where an evaluation was repeated, by a restart or after the log was cut, the first.
    metrics = [
        Metric(point.key, point.value, point.timestamp, point.step, model.model_id, val, digest, run_id)
        for name in (evaluated[0].figures if evaluated else ())
        for point in client.get_metric_history(run_id, f"coco/{name}")
        if point.step == chosen.iteration
    ]
    client.log_batch(run_id, metrics=metrics)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _best(plan: TrialPlan, saved: Sequence[CheckpointSaved], events: Sequence[Event]) -> CheckpointSaved | None:
    """The checkpoint of the best evaluation, which the workers keep; None where none of them was evaluated."""
    ratings = {event.iteration: metric_rating(event, plan.metric) for event in first_evaluations(events)}
    rated = [(rating, each.iteration, each) for each in saved if (rating := ratings.get(each.iteration)) is not None]
    return max(rated, key=lambda found: found[:2])[2] if rated else None


def _state_file(checkpoint: Path) -> Path | None:
    """The file that a checkpoint's manifest names: an interrupted write may have left another next to it."""
    try:
        (name,) = json.loads((checkpoint / "manifest.json").read_bytes())["files"].keys()
        path = checkpoint / name
        return path if path.parent == checkpoint and path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it is elsewhere, gone or damaged
        return None


def _dataset(dataset: DatasetPlan) -> Dataset:
    """A data set as MLflow knows one; its digest is of the annotation file."""
    source = json.dumps({"annotations": dataset.annotations, "images": dataset.images})
    return Dataset(dataset.name, file_sha256(Path(dataset.annotations))[:8], "local", source)
