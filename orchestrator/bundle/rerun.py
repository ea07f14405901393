"""Says how a bundle's runs are repeated, and what of this machine is not as it was then."""

from __future__ import annotations

import os
import platform
import re
import shlex
from pathlib import Path

from orchestrator.bundle.archive import BundleError, unpack
from orchestrator.bundle.contents import EXPERIMENT, BundledRun, has_log, result_files
from orchestrator.bundle.verify import RUNS, read_runs
from orchestrator.experiment.environment import package_hashes
from orchestrator.experiment.plan import dataset_plans, generated_root
from orchestrator.experiment.spec import Experiment
from orchestrator.files import file_sha256
from orchestrator.findings import printable
from orchestrator.gpus import list_gpus
from trainers.contract.events import WorkerStarted

MAX_PACKAGES = 40
"""Packages that are named; the others are counted."""


def instructions(path: Path, to: Path) -> list[str]:
    """The commands that repeat each run of a bundle, and what differs here, a line each.

    Args:
        path: The bundle. It is not verified: what it says of its making may be wrong.
        to: An empty folder, for its files.

    Raises:
        BundleError: It is no bundle.
    """
    lines = []
    for run in read_runs(path, unpack(path, to)):
        lines.append(f"# {run.name}: {printable(run.result.experiment)}")
        try:
            own = _replay(path, run) if run.is_replayed else _repeat(path, run)
        except Exception as error:  # the events may be anybody's, and hold anything
            what = printable(f"{type(error).__name__}: {error}")[:200]
            raise BundleError(f"{path}: how {run.name} is repeated cannot be read of its events: {what}") from error
        lines += map(printable, own)
    return lines


def _replay(path: Path, run: BundledRun) -> list[str]:
    places = [place for trial in run.result.trials if has_log(place := run.place(trial.name))]
    names = (path.relative_to(run.folder).as_posix() for path in [*places, *result_files(run)])
    logs = " ".join(shlex.quote(f"{RUNS}/{run.name}/{name}") for name in names)
    return [
        f"unzip {shlex.quote(str(path))}",
        f"python -m orchestrator.replay {logs}",
        "# Another program trained it: these commands read its logs again, nothing is trained.",
    ]


def _repeat(path: Path, run: BundledRun) -> list[str]:
    environment, started = run.result.environment, run.started
    if started is None:
        return ["# its events lack the start of the run: how it was made is not known"]
    known = re.fullmatch(r"[0-9a-f]{7,64}", environment.get("git_commit", ""))
    commit = known[0] if known else None
    dirty = environment.get("git_dirty") == "true"
    name = f"{run.name}.yaml"
    lines = [f"git checkout {commit}"] if commit else []
    lines += [
        f"unzip -p {shlex.quote(str(path))} {shlex.quote(f'{RUNS}/{run.name}/{EXPERIMENT}')} > {shlex.quote(name)}",
        f"python -m orchestrator.run {shlex.quote(name)}",
        f"# It was started as: {shlex.join(run.result.command)}",
    ]
    if not commit:
        lines.append("# Which commit made it is not known.")
    elif dirty:
        lines.append("# There were uncommitted changes: the commit is not all of what ran.")
    differences = [
        *_packages(started.packages, environment),
        *_machine(run, environment),
        *_data(run, started.experiment),
    ]
    lines.append(
        f"# Different here: {len(differences)}" if differences else "# Nothing that was recorded differs here."
    )
    return [*lines, *(f"#   {difference}" for difference in differences)]


def _packages(recorded: dict[str, str], environment: dict[str, str]) -> list[str]:
    here = package_hashes()
    versions = {name: text.partition(" ")[0] for name, text in here.items()}
    if not recorded:  # of an older version, which noted a few versions
        known = {name: version for name, version in environment.items() if name in versions}
        return [f"{n}: {v} then, {versions[n]} here" for n, v in known.items() if versions[n] != v]
    lines = []
    for name, then in recorded.items():
        if name not in here:
            lines.append(f"{name}: {then.partition(' ')[0]} then, not installed here")
        elif then != here[name]:
            same = then.partition(" ")[0] == versions[name]
            other = "the same version of another build" if same else f"{versions[name]} here"
            lines.append(f"{name}: {then.partition(' ')[0]} then, {other}")
    if python := environment.get("python"):
        lines += [f"Python: {python} then, {platform.python_version()} here"] * (python != platform.python_version())
    more = len(lines) - MAX_PACKAGES
    return [*lines[:MAX_PACKAGES], *([f"and {more} more packages"] if more > 0 else [])]


def _machine(run: BundledRun, environment: dict[str, str]) -> list[str]:
    workers = [event for event in run.events if isinstance(event, WorkerStarted)]
    lines = []
    gpus = sorted({gpu.name for gpu in list_gpus()})
    devices = sorted({worker.device_name for worker in workers})
    processors = sorted({worker.host_processor for worker in workers if worker.host_processor})
    needed = max((sum(w.host == worker.host for w in workers if (w.trial, w.attempt) == (worker.trial, worker.attempt))
                  for worker in workers), default=0)  # fmt: skip
    if devices != processors and devices != gpus:
        lines.append(f"accelerator: {', '.join(devices)} then, {', '.join(gpus) or 'none'} here")
    elif devices == gpus and len(list_gpus()) < needed:
        lines.append(f"accelerators of a host: {needed} then, {len(list_gpus())} here")
    here = _processor()
    if processors and here and processors != [here]:
        lines.append(f"processor: {', '.join(processors)} then, {here} here")
    cores = environment.get("cpus")
    if cores and cores != str(os.cpu_count()):
        lines.append(f"CPUs: {cores} then, {os.cpu_count()} here")
    return lines


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _data(run: BundledRun, values: dict[str, object]) -> list[str]:
    experiment = Experiment.model_validate(values)
    if experiment.data.generated is not None:
        return []
    lines, known = [], run.started.datasets if run.started else {}
    for part, plan in zip(("train", "val"), dataset_plans(experiment, generated_root(experiment)), strict=True):
        file, then = Path(plan.annotations), known.get(part, {}).get("annotations_sha256")
        if not file.is_file():
            lines.append(f"{part} set: {file} is not here")
        elif then and file_sha256(file) != then:
            lines.append(f"{part} set: {file} has other annotations")
    return lines
