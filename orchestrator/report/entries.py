"""The rows of the page of many entries: run folders, bundles and reference files, each with what of it was verified."""

from __future__ import annotations

import math
import statistics
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

from orchestrator.experiment.references import read_references
from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures.benchmark import scored, verdict_lines
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.scaling import scaling_rows, spread
from orchestrator.figures.trial import trial_result
from orchestrator.files import is_folder
from orchestrator.report.table import Row, table_rows
from orchestrator.runlog.folder import RunFolder, read_run_folder

MAX_CHIPS = 1_000_000
"""Accelerators of an entry; no system has as many."""

MAX_MESSAGE = 400
"""Characters of what is wrong with an entry."""


class Estimate(NamedTuple):
    """A figure: the median over the repeats, and the 95 % interval of their mean."""

    value: float | None = None
    """None where it was not measured."""
    low: float | None = None
    """Lower end; None with a single repeat, or where a repeat lacks the figure."""
    high: float | None = None
    """Upper end."""


NOT_KNOWN = Estimate()


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the page: the repeats of one setup of a run, or a published figure."""

    name: str
    kind: Literal["measured", "reference"]
    source: str
    """Where it is from: the end of the path, or what a reference file says."""
    chips: int
    """Accelerators (1 to `MAX_CHIPS`); the workers where it ran on CPUs."""
    chip: str | None = None
    """Model name of the accelerator or processor; None where it is not known, as for the fields below."""
    precision: str | None = None
    recipe: str | None = None
    target: str | None = None
    """What counts as trained, and on how many images: times to different targets do not compare."""
    time_to_train: Estimate = NOT_KNOWN
    """In seconds, by the seed clock (docs/measurement.md)."""
    mlperf_time: Estimate = NOT_KNOWN
    """In seconds, by MLPerf's clock; of a benchmark, its score."""
    rate_per_chip: Estimate = NOT_KNOWN
    """Images per second and accelerator."""
    efficiency: Estimate = NOT_KNOWN
    """Of scaling, from the smallest size of the same run; 1 is ideal."""
    energy: Estimate = NOT_KNOWN
    """Watt-hours to the target."""
    cost: Estimate = NOT_KNOWN
    """Cost to the target, in the currency of the entry."""
    note: str = ""
    """What must be known to read it, for a person."""
    verified: str = ""
    """What of it was verified, or why nothing was."""
    verdict: Literal["verified", "refuted", "open"] = "open"
    """Whether it was; refuted where its own events say otherwise, open where nothing could be recomputed."""

    @property
    def seconds(self) -> float | None:
        """Time to the target by MLPerf's clock, or by the seed clock where that is the only one known."""
        return self.time_to_train.value if self.mlperf_time.value is None else self.mlperf_time.value

    @property
    def chip_hours(self) -> float | None:
        """Accelerator hours to the target: the cost that has no price and no currency."""
        return None if self.seconds is None else self.chips * self.seconds / 3600

    @property
    def images_per_second(self) -> float | None:
        """Of all accelerators together."""
        return None if self.rate_per_chip.value is None else self.chips * self.rate_per_chip.value


class Unpacked(NamedTuple):
    """A bundle that was verified and unpacked."""

    folders: Sequence[Path]
    """Its run folders."""
    verified: str
    """What was verified, for a person: files, figures, score."""


OpenBundle = Callable[[Path, Path], Unpacked]
"""Verifies a bundle and unpacks it into an empty folder; raises ValueError where something in it does not follow."""


def read_entries(paths: Sequence[Path], open_bundle: OpenBundle) -> list[Entry]:
    """The rows of all entries, in the order given; an entry that is given twice counts once.

    Args:
        paths: Folders of runs, reference files (`.yaml`), and bundles (any other file).
        open_bundle: Verifies and unpacks a bundle.

    Raises:
        ValueError: An entry cannot be read, or a bundle not be verified; one line for each such entry.
    """
    rows: list[Entry] = []
    problems: list[str] = []
    for path in {path.resolve(): path for path in paths}.values():
        try:
            rows += _read(path, open_bundle)
        except (OSError, ValueError) as error:
            text = textwrap.shorten(str(error), MAX_MESSAGE, placeholder=" …")
            problems.append(text if text.startswith(str(path)) else f"{path}: {text}")
    if problems:
        raise ValueError("\n".join(problems))
    return rows


def _read(path: Path, open_bundle: OpenBundle) -> list[Entry]:
    source = "/".join(path.absolute().parts[-2:])
    if is_folder(path):
        return _stated_and_recomputed(read_run_folder(path), source)
    if not path.exists():
        raise ValueError("there is no such file or folder")
    if path.suffix in (".yaml", ".yml"):
        return _references(path, source)
    with tempfile.TemporaryDirectory() as place:
        bundle = open_bundle(path, Path(place))
        runs = [read_run_folder(folder) for folder in bundle.folders]
    verified = f"bundle: {bundle.verified}"
    return [replace(row, verified=verified, verdict="verified") for run in runs for row in _rows(run.result, source)]


def _stated_and_recomputed(run: RunFolder, source: str) -> list[Entry]:
    """The rows that a run's results state, marked by whether its events give the same."""
    stated = _rows(run.result, source)
    try:
        trials = [trial_result(t.plan, t.events) for t in run.trials if t.plan]
    except ValueError as error:
        return [replace(row, verified=f"run folder: not recomputed: {error}") for row in stated]
    if len(trials) < len(run.trials):
        return [replace(row, verified="run folder: not recomputed: its events are not there") for row in stated]
    benchmark = run.result.benchmark
    if benchmark:  # MLPerf's verdict is the business of bundles
        score = scored(trials, benchmark.num_runs).score_minutes
        benchmark = benchmark.model_copy(update={"score_minutes": score})
    found = run.result.model_copy(update={"trials": trials, "scaling": scaling_rows(trials), "benchmark": benchmark})
    recomputed = {row.name: row for row in _rows(found, source)}
    return [_compared(row, recomputed.get(row.name)) for row in stated]


def _compared(stated: Entry, recomputed: Entry | None) -> Entry:
    wrong = [f.name for f in fields(Entry) if getattr(stated, f.name) != getattr(recomputed, f.name, None)]
    if wrong:
        names = ", ".join(name.replace("_", " ") for name in wrong)
        return replace(stated, verified=f"run folder: its events give another {names}", verdict="refuted")
    return replace(stated, verified="run folder: figures recomputed from its events", verdict="verified")


def _rows(result: ExperimentResult, source: str) -> list[Entry]:
    """The trials of a run, repeats together; published figures that it names are not its own, and left out."""
    if not result.trials:
        raise ValueError("it holds no trial")
    for trial in result.trials:
        if not 1 <= trial.world_size <= MAX_CHIPS:  # a stranger's file may hold anything
            raise ValueError(f"{trial.name}: no system has {trial.world_size} accelerators")
    return [_measured(result, row, source) for row in table_rows(result) if row.kind == "measured"]


def _measured(result: ExperimentResult, row: Row, source: str) -> Entry:
    trials = [t for t in result.trials if t.name.removesuffix(f"-seed{t.seed}") == row.name]
    first = trials[0]
    size = next(
        (s for s in result.scaling if (s.recipe, s.kind, s.world_size) == (first.recipe, first.scaling, row.workers)),
        None,
    )
    mlperf_time, benchmark = _estimate([t.mlperf_seconds for t in trials], misses=True), result.benchmark
    if benchmark:
        score = benchmark.score_minutes
        mlperf_time = NOT_KNOWN if score is None else mlperf_time._replace(value=60 * score)
    repeats = f"median of {row.num_trials}" if row.num_trials > 1 else ""
    failed = row.status.lower() if row.status != "FINISHED" else ""
    return Entry(
        name=f"{result.experiment}: {row.name}",
        kind="measured",
        source=source,
        chips=row.workers,
        chip=first.device_name,
        precision=str(first.numerics["precision"]) if "precision" in first.numerics else None,
        recipe=first.recipe,
        target=_target(first),
        time_to_train=_estimate([t.time_to_train_seconds for t in trials], misses=True),
        mlperf_time=mlperf_time,
        rate_per_chip=_estimate([_per_chip(t.images_per_second, t.world_size) for t in trials]),
        efficiency=Estimate(size.efficiency, size.efficiency_low, size.efficiency_high) if size else NOT_KNOWN,
        energy=_estimate([t.energy.watt_hours_to_target for t in trials], misses=True),
        cost=_estimate([t.cost_to_target for t in trials], misses=True),
        note="; ".join(filter(None, (failed, repeats, *verdict_lines(result)[1:], row.note))),
    )


def _references(path: Path, source: str) -> list[Entry]:
    rows = read_references(path)
    if not rows:
        raise ValueError("it holds no published figure")
    return [_reference(row, source) for row in rows]


def _reference(row: ReferenceRow, source: str) -> Entry:
    reached = [f"{part} AP {ap:g}" for part, ap in (("box", row.box_ap), ("mask", row.mask_ap)) if ap is not None]
    return Entry(
        name=row.name,
        kind="reference",
        source=row.source or source,
        chips=row.world_size,
        chip=row.accelerator,
        precision=row.precision,
        time_to_train=Estimate(row.time_to_train_seconds),
        mlperf_time=Estimate(row.mlperf_seconds),
        rate_per_chip=Estimate(_per_chip(row.images_per_second, row.world_size)),
        note=f"reached {', '.join(reached)}" if reached else "",
        verified="source only",
    )


def _per_chip(rate: float | None, chips: int) -> float | None:
    return None if rate is None else rate / chips


def _target(trial: TrialResult) -> str | None:
    aps = (("box AP", trial.target_box_ap), ("mask AP", trial.target_mask_ap), (trial.metric, trial.target))
    parts = [f"{name} {target:g}" for name, target in aps if target is not None]
    if parts and trial.num_train_images:
        parts.append(f"{trial.num_train_images:,} images")
    return ", ".join(parts) or None


def _estimate(values: Sequence[float | None], *, misses: bool = False) -> Estimate:
    """A figure over repeats; with `misses`, one that lacks it took longer than any other."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    median = statistics.median(known + [math.inf] * (len(values) - len(known)) * misses) if known else math.inf
    if not math.isfinite(median):
        return NOT_KNOWN
    found = spread(known) if len(known) == len(values) else None
    return Estimate(median, found.low, found.high) if found else Estimate(median)
