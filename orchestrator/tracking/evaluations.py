"""What MLflow gets of an evaluation: figures by class, the same few photos each time, curves and confusions."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlflow.tracking import MlflowClient
from PIL import Image

from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.metrics import metrics
from orchestrator.report.evaluation import DAMAGED, class_pictures, read_details
from orchestrator.report.photos import Photos, by_image
from orchestrator.tracking.text import fit
from trainers.contract.evaluation_details import MIN_SCORE
from trainers.contract.events import Evaluated
from trainers.contract.plan import TrialPlan

MAX_CLASSES = 100
"""Classes up to which each has metrics of its own: MLflow's pages draw a chart for every metric."""

ARTIFACTS = "evaluation"
"""Folder of a run's artifacts for the details of its last evaluation."""

COMPRESSED_SIDE = 256
"""Pixels of the longer side of the small copy that MLflow keeps of an image, as its `log_image` does."""

_LOGGED = re.compile(r"images/(?P<name>(?P<key>.+)\+step\+(?P<step>\d+)\+.*?)(?P<compressed>\+compressed)?\.\w+")
"""Path of an artifact that `log_image` wrote."""


def evaluation_metrics(event: Evaluated) -> dict[str, float | None]:
    """The figures of an evaluation under names that MLflow takes, different ones for different classes.

    Those of the classes are left out where there are more than `MAX_CLASSES`.
    """
    values = metrics(event, "evaluations.")
    of_classes = {f"validation_class/{key}" for key in event.class_ap}
    if len({key.partition("/")[2] for key in event.class_ap}) > MAX_CLASSES:
        values = {name: value for name, value in values.items() if name not in of_classes}
    return {fit(name, "unique key") if name in of_classes else name: value for name, value in values.items()}


class EvaluationLog:
    """Logs photos and artifacts of evaluations; each call may be repeated without harm."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._photos: dict[str, Photos] = {}
        self._logged: dict[str, set[tuple[str, int]]] = {}
        """Keys and steps of the images that a run has."""

    def log_photos(self, run_id: str, plan: Plan, event: Evaluated) -> str:
        """Logs the photos with what was detected, and once with what is annotated; returns why not, or "".

        Each photo is an image key with the iterations as steps, and what is annotated as step 0, which MLflow's image
        grid shows first.
        """
        if not event.details_file or not isinstance(plan, TrialPlan):
            return ""
        try:
            pictures = self._draw(run_id, plan, event)
        except DAMAGED as error:  # data or details are elsewhere, or gone
            return f"{type(error).__name__}: {error}"
        if run_id not in self._logged:
            self._logged[run_id] = self._look(run_id)
        logged = self._logged[run_id]
        for (key, step), picture in pictures.items():
            if (key, step) not in logged:
                when = int(event.time * 1000)
                self._client.log_image(run_id, picture, key=key, step=step, timestamp=when, synchronous=True)
                logged.add((key, step))
        return ""

    def _draw(self, run_id: str, plan: TrialPlan, event: Evaluated) -> dict[tuple[str, int], Image.Image]:
        """The pictures by key and step."""
        details = read_details(Path(plan.trial_dir), event.details_file)
        if run_id not in self._photos:
            self._photos[run_id] = Photos(plan.val, details.sample_ids)
        photos = self._photos[run_id]
        found = by_image((entry for entry in details.detections if entry["score"] >= MIN_SCORE), photos.files)
        pictures = {}
        for number, (image, file) in enumerate(photos.files.items(), 1):
            key = f"photos/{number} {re.sub(r'[^A-Za-z0-9_.-]', '_', Path(file).stem)[:80]}"
            pictures[key, 0] = photos.draw(image, photos.objects[image]).picture
            pictures[key, event.iteration] = photos.draw(image, found[image]).picture
        return pictures

    def _look(self, run_id: str) -> set[tuple[str, int]]:
        """Asks for the images that a run has; completes one of which only the larger file arrived."""
        found: dict[str, dict[bool, str]] = {}
        keys: dict[str, tuple[str, int]] = {}
        for file in self._client.list_artifacts(run_id, "images"):
            if match := _LOGGED.fullmatch(file.path):
                found.setdefault(match["name"], {})[bool(match["compressed"])] = file.path
                keys[match["name"]] = match["key"].replace("~", "/"), int(match["step"])
        for name, paths in found.items():
            if True not in paths:
                self._compress(run_id, name, paths[False])
        return set(keys.values())

    def _compress(self, run_id: str, name: str, path: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with Image.open(self._client.download_artifacts(run_id, path, folder)) as picture:
                picture.thumbnail((COMPRESSED_SIDE, COMPRESSED_SIDE))
                small = Path(folder, f"{name}+compressed.webp")
                picture.save(small)
            self._client.log_artifact(run_id, str(small), "images")

    def log_artifacts(self, run_id: str, plan: Plan, evaluations: Sequence[Evaluated]) -> None:
        """Logs the details of a trial's last evaluation, and its curves and confusions as pictures."""
        last = next((each for each in reversed(evaluations) if each.details_file), None)
        if last is None or not isinstance(plan, TrialPlan):
            return
        try:
            details = read_details(Path(plan.trial_dir), last.details_file)
            pictures = class_pictures(details)
        except DAMAGED:
            return
        for name, picture in pictures.items():
            self._client.log_image(run_id, picture, f"{ARTIFACTS}/{name}.png")
        self._client.log_text(run_id, details.to_json(), f"{ARTIFACTS}/details.json")
