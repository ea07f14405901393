"""Compares a trial's record with what else was written of it: MLPerf's and AI-Rank's logs, manifests of checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from orchestrator.bundle.contents import BundledRun
from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.records import TrialResult
from orchestrator.findings import FindingList
from orchestrator.report.airank import airank_log, system_information
from orchestrator.report.mlperf import mllog_text
from trainers.contract.evaluation_details import DETAILS_FOLDER, NUM_POINTS, EvaluationDetails
from trainers.contract.events import CheckpointSaved, ClockChanged, Evaluated, Event
from trainers.contract.plan import TrialPlan
from trainers.contract.targets import metric_rating

PREFIX = ":::MLLOG "
PLACES = ("file", "lineno")
"""Of a line's metadata, what says where in this program's source it was logged."""

CHECKSUM = "load_data, checksum:"

CLOCK_TOLERANCE_SECONDS = 5.0
"""Between a checkpoint's manifest and its event, on a busy machine."""

SCORE_TOLERANCE = 1e-9

CURVE_TOLERANCE = 0.02
"""Of AP, 0-100: curves have four digits."""

HINT = "It was made of the same events"


def check_logs(
    run: BundledRun, plan: Plan, events: Sequence[Event], result: TrialResult, findings: FindingList
) -> None:
    """Makes MLPerf's and AI-Rank's files of a trial again and compares them with those in the bundle.

    Args:
        run: The run.
        plan: The trial.
        events: Its events, from the run or made of a log.
        result: Its record, as recomputed.
        findings: Added to.
    """
    _compare_mllog(run, plan.name, mllog_text(plan, events, result), findings)
    # AI-Rank's checksum is that of a file, which is not looked for here: its path is a stranger's.
    if isinstance(plan, TrialPlan):
        plan = dataclasses.replace(plan, train=dataclasses.replace(plan.train, annotations=""))
    _compare_airank(run, plan.name, airank_log(plan, events, result), findings)
    path, place = run.place(plan.name, "system_information.json"), f"{run.name}/{plan.name}/system_information.json"
    if path.is_file() and any(event.kind == "worker_started" for event in events):
        true = json.loads(json.dumps(system_information(plan, events, result)))
        for key, value in orjson.loads(path.read_bytes()).items():
            if key in true and true[key] != value:
                what = f"{key} is {value!r:.100}"
                findings.error("log_disagrees", place, key, what, f"The events give {true[key]!r:.100}")


def check_checkpoints(run: BundledRun, plan: TrialPlan, findings: FindingList) -> None:
    """Compares the manifests of the trial's checkpoints with its events."""
    clock_set = any(isinstance(event, ClockChanged) for event in run.of(plan.name))
    saved = {event.iteration: event for event in run.of(plan.name) if isinstance(event, CheckpointSaved)}
    evaluations = [event for event in run.of(plan.name) if isinstance(event, Evaluated)]
    ratings = {event.iteration: metric_rating(event, plan.metric) for event in evaluations}
    for path in sorted(run.place(plan.name, "checkpoints").glob("*/manifest.json")):
        manifest = orjson.loads(path.read_bytes())
        place, event = path.relative_to(run.folder.parent).as_posix(), saved.get(manifest["iteration"])
        problems = []
        if event is None:
            problems.append(f"the events have no checkpoint of iteration {manifest['iteration']}")
        else:
            size = sum(file["bytes"] for file in manifest["files"].values())
            if size != event.size_bytes:
                problems.append(f"it holds {size} bytes, the event of it has {event.size_bytes}")
            if not clock_set and abs(manifest["time"] - event.time) > CLOCK_TOLERANCE_SECONDS + event.write_seconds:
                problems.append(f"it is {abs(manifest['time'] - event.time):.0f} s away from the event of it")
        rating, score = ratings.get(manifest["iteration"]), manifest["score"]
        if score is not None and rating is not None and abs(score - rating) > SCORE_TOLERANCE:
            problems.append(f"its score is {score:g}, the evaluation after its iteration has {plan.metric} {rating:g}")
        for what in problems:
            findings.error("checkpoint_differs", place, "", what, "Manifest and event were written together")


def check_details(run: BundledRun, plan: TrialPlan, findings: FindingList) -> None:
    """Compares AP at an IoU of 0.5 with the curves in the details of each evaluation, whose mean it is."""
    for event in run.of(plan.name):
        if not isinstance(event, Evaluated) or not event.details_file:
            continue
        path = run.place(plan.name, f"{DETAILS_FOLDER}/{Path(event.details_file).name}")
        place = path.relative_to(run.folder.parent).as_posix()
        if not path.is_file():
            what = "the details of an evaluation are not there"
            findings.warning("details_unchecked", place, "", what, "Ask for them")
            continue
        for part, curves in EvaluationDetails.read(path).curves.items():
            own = [100 * sum(curve.precision) / NUM_POINTS for curve in curves if curve.num_objects]
            given = event.figures.get(f"{part}_ap50")
            if given is not None and own and abs(given - sum(own) / len(own)) > CURVE_TOLERANCE:
                what = f"its {part} curves have AP50 {sum(own) / len(own):.2f}"
                hint = f"The evaluation after {event.iteration} iterations has {given:.2f}"
                findings.error("curves_differ", place, part, what, hint)


def _compare_mllog(run: BundledRun, trial: str, text: str, findings: FindingList) -> None:
    path, place = run.place(trial, "mllog.txt"), f"{run.name}/{trial}/mllog.txt"
    if not path.is_file():
        return
    given, true = _mllog(path.read_text(encoding="utf-8", errors="replace")), _mllog(text)
    for key, lines in given.items():
        if lines != true.get(key, []):
            what = f"its lines of {key} are not those that the events give"
            findings.error("log_disagrees", place, key, what, _first_difference(lines, true.get(key, [])))


def _mllog(text: str) -> dict[str, list[Any]]:
    """The lines of a log by key, without where in the source they were logged."""
    lines: dict[str, list[Any]] = defaultdict(list)
    for line in text.splitlines():
        if line.startswith(PREFIX):
            fields = orjson.loads(line[len(PREFIX) :])
            metadata = {name: value for name, value in fields["metadata"].items() if name not in PLACES}
            lines[str(fields["key"])].append([fields["event_type"], fields["time_ms"], fields["value"], metadata])
    return lines


def _first_difference(given: list[Any], true: list[Any]) -> str:
    for one, other in zip(given, true, strict=False):
        if one != other:
            return f"It has {json.dumps(one)[:150]}, the events give {json.dumps(other)[:150]}"
    return f"It has {len(given)} of them, the events give {len(true)}"


def _compare_airank(run: BundledRun, trial: str, text: str, findings: FindingList) -> None:
    path, place = run.place(trial, "ai_rank.log"), f"{run.name}/{trial}/ai_rank.log"
    if not path.is_file():
        return
    given = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(given, start=1):
        _, mark, checksum = line.partition(CHECKSUM)
        known = run.started.datasets.get("train", {}).get("annotations_sha256") if run.started else None
        if mark and known and checksum not in ("unknown", known):
            what = f"the checksum of the training set is {checksum:.80}"
            findings.error("data_differ", place, f"line {number}", what, f"Its fingerprint has {known}")
    without = (
        [line.partition(CHECKSUM)[0] for line in given],
        [line.partition(CHECKSUM)[0] for line in text.splitlines()],
    )
    if without[0] != without[1]:
        pairs = zip(*without, strict=False)
        number = next((n for n, (one, other) in enumerate(pairs, 1) if one != other), min(map(len, without)) + 1)
        findings.error("log_disagrees", place, f"line {number}", "its lines are not those that the events give", HINT)
