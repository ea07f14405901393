"""What of a run's folder goes into a bundle, and the run as it is read back from one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from orchestrator.bundle.archive import BundleError
from orchestrator.bundle.redaction import Redaction
from orchestrator.experiment.reading import to_yaml
from orchestrator.figures.logged_plan import LoggedPlan, Plan, plan_from_dict
from orchestrator.figures.records import ExperimentResult
from orchestrator.findings import printable
from orchestrator.replay.metrics_json import is_metrics_json
from orchestrator.replay.record import LOG_NAMES, PACKED, SUBMISSIONS
from orchestrator.replay.unpacking import ReplayError, read_text
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from trainers.contract.evaluation_details import DETAILS_FOLDER
from trainers.contract.events import Event, LoopStarted, RunStarted, TrialStarted

RESULTS = "results.json"
TRIAL_FILES = (
    "log.txt", "log.txt.rank*", "mllog.txt", "ai_rank.log", "system_information.json", "checkpoints/*/manifest.json",
    f"{DETAILS_FOLDER}/*.json",
)  # fmt: skip
"""Of a trial's folder. The report is left out: it can be made of these (`python -m orchestrator.report`)."""

RESULT_FILES = ("mllog.txt", "ai_rank.log", "system_information.json")
"""Those that the driver writes into every trial's folder, whoever trained it."""

EXPERIMENT, ENVIRONMENT, CONFIG = "experiment.yaml", "environment.json", "config.yaml"
"""Files that a bundle has and a run's folder has not: parts of the events, for readers and for `bundle rerun`."""


@dataclass(frozen=True, slots=True)
class BundledRun:
    """A run in a bundle, or about to go into one."""

    name: str
    folder: Path
    result: ExperimentResult
    stored: dict[str, Any]
    """`results.json` as it is, without the defaults of what it lacks."""
    events: Sequence[Event]
    """Empty for a run that was read from the logs of another program."""
    plans: dict[str, Plan]
    """Plans by the trial's name, in the order of the trials."""

    @property
    def is_replayed(self) -> bool:
        """Whether another program trained it, so that its logs are all there is."""
        return not self.events

    @property
    def started(self) -> RunStarted | None:
        """Its last start; None for a replayed one, and where the events lack it."""
        return next((e for e in reversed(self.events) if isinstance(e, RunStarted)), None)

    def of(self, trial: str) -> list[Event]:
        """The events of a trial."""
        return [event for event in self.events if event.trial == trial]

    def place(self, trial: str, file: str = "") -> Path:
        """The folder of a trial, or a file in it; inside of the run's folder whatever the trial's name is."""
        return self.folder / Path(trial).name / file


def read_run(folder: Path, name: str) -> BundledRun:
    """Reads a run's folder, as it is on disk or in a bundle.

    Raises:
        BundleError: It holds no results, or results or events that this version cannot read.
    """
    try:
        content = (folder / RESULTS).read_bytes()
        result = ExperimentResult.model_validate_json(content)
        events = [event for event, _ in Outbox(folder / FILE_NAME).read()]
        plans = {event.trial: plan_from_dict(event.plan) for event in events if isinstance(event, TrialStarted)}
    except OSError as error:
        raise BundleError(f"{name}: not a run's folder: {error.strerror or error}: {error.filename}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        what = printable(f"{'.'.join(map(str, problem['loc']))[:200]}: {problem['msg']}")
        raise BundleError(f"{name}/{RESULTS}: not results that this version reads: {what}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"{name}/{FILE_NAME}: not events that this version reads: {printable(str(error))}") from error
    if not events and (folder / FILE_NAME).exists():
        raise BundleError(f"{name}/{FILE_NAME}: holds no event that can be read")
    replayed = not events or any(isinstance(plan, LoggedPlan) for plan in plans.values())
    return BundledRun(
        name, folder, result, orjson.loads(content), [] if replayed else events, {} if replayed else plans
    )


def run_files(folder: Path, name: str, redaction: Redaction) -> Iterator[tuple[str, bytes]]:
    """The files of a run in a bundle, by their names in it, without what is nobody's business.

    Args:
        folder: The run's folder.
        name: The run's name in the bundle.
        redaction: What is taken out.

    Raises:
        BundleError: It is no run's folder, the run has not ended, or it lacks what its figures are made of.
    """
    run = read_run(folder, str(folder))
    if run.result.status == "RUNNING":
        command = f"python -m orchestrator.run --resume {folder}"
        raise BundleError(f"{folder}: the run has not ended; go on with it: {command}")
    found = {RESULTS: _redacted(folder / RESULTS, redaction)}
    if not run.is_replayed:
        found[FILE_NAME] = _redacted(folder / FILE_NAME, redaction)
    with tempfile.TemporaryDirectory(prefix="bundle-") as redacted:
        for file, content in found.items():
            Path(redacted, file).write_bytes(content)
        found |= derived_files(read_run(Path(redacted), str(folder)))
    submissions = _submissions(run) if run.is_replayed else {}
    found |= {file: redaction.apply(content) for file, content in submissions.items()}
    for trial in run.result.trials:
        elsewhere = submissions.values()
        files = _logs(run, trial.name, elsewhere) if run.is_replayed else _trial_files(run, trial.name)
        found |= {f"{Path(trial.name).name}/{file}": redaction.apply(content) for file, content in files.items()}
    for file in sorted(found):
        yield f"runs/{name}/{file}", found[file]


def derived_files(run: BundledRun) -> dict[str, bytes]:
    """The files of a bundle that repeat parts of the events, by their names in the run's folder."""
    started = run.started
    if started is None:
        return {}
    about = {"environment": run.result.environment, "packages": started.packages, "datasets": started.datasets}
    files = {
        EXPERIMENT: to_yaml(started.experiment).encode(),
        ENVIRONMENT: (json.dumps(about, indent=1) + "\n").encode(),
    }
    for event in run.events:
        if isinstance(event, LoopStarted) and event.rank == 0 and event.config_yaml:
            files.setdefault(f"{Path(event.trial).name}/{CONFIG}", event.config_yaml.encode())
    return files


def unknown_files(run: BundledRun) -> list[str]:
    """Files of a run in a bundle that `run_files` does not put there, relative to its folder."""
    known = {run.folder / name for name in (RESULTS, FILE_NAME, EXPERIMENT, ENVIRONMENT)}
    for trial in run.result.trials:
        for pattern in (*TRIAL_FILES, CONFIG, *LOG_NAMES):
            known |= set(run.place(trial.name).glob(pattern))
    if run.is_replayed:
        known |= set((run.folder / SUBMISSIONS).rglob("*"))
    found = {path for path in run.folder.rglob("*") if path.is_file()}
    return sorted(path.relative_to(run.folder).as_posix() for path in found - known)


def _redacted(path: Path, redaction: Redaction) -> bytes:
    """A JSON file, or one of a JSON document in each line, which it must still be afterwards."""
    try:
        content = redaction.apply(path.read_bytes())
        for line in content.splitlines() if path.name == FILE_NAME else [content]:
            orjson.loads(line)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BundleError(f"{path}: holds what is no JSON, so its figures cannot be checked: {error}") from error
    return content


def has_log(place: Path) -> bool:
    """Whether the log of a replayed trial is in the folder of its trial; MLPerf's are `result_files`."""
    return any((place / name).is_file() for name in LOG_NAMES)


def result_files(run: BundledRun) -> list[Path]:
    """MLPerf's results of a replayed run, without the descriptions of their systems."""
    return sorted(path for path in (run.folder / SUBMISSIONS).rglob("*.*") if path.parent.name != "systems")


def _trial_files(run: BundledRun, trial: str) -> dict[str, bytes]:
    folder = run.place(trial)
    paths = (path for pattern in TRIAL_FILES for path in folder.glob(pattern))
    plain = sorted({path for path in paths if path.is_file() and not path.is_symlink()})
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in plain}


def _logs(run: BundledRun, trial: str, elsewhere: Collection[bytes]) -> dict[str, bytes]:
    """The log of a replayed trial, unless it is elsewhere in the bundle, and what was made of it."""
    folder = run.place(trial)
    made = {name: (folder / name).read_bytes() for name in RESULT_FILES if (folder / name).is_file()}
    logs = [path for path in sorted(folder.glob("*")) if path.name not in RESULT_FILES and path.is_file()]
    if len(logs) != 1:
        raise BundleError(f"{folder}: holds {len(logs)} logs of a replayed run, not one")
    text = _unpacked(logs[0])
    name = LOG_NAMES[is_metrics_json(text.decode(errors="replace"))]
    return made if text in elsewhere else {name: text, **made}


def _submissions(run: BundledRun) -> dict[str, bytes]:
    """MLPerf's results of a replayed run, unpacked, by their names in the run's folder."""
    found = {}
    for path in sorted((run.folder / SUBMISSIONS).rglob("*")):
        if path.is_file() and not path.is_symlink():
            name = path.relative_to(run.folder).as_posix()
            is_log = path.parent.name != "systems"
            found[name.removesuffix(path.suffix) if path.suffix in PACKED else name] = (
                _unpacked(path) if is_log else path.read_bytes()
            )
    return found


def _unpacked(log: Path) -> bytes:
    try:
        return read_text(log)[0].encode()
    except ReplayError as error:
        raise BundleError(str(error)) from error
