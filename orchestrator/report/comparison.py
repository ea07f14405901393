"""Several experiments side by side: what differs in their configs and results, and whether it is more than noise.

Two single runs differ by chance: a difference is called more than noise only where repeats, or at least the spread
within the runs, show it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.experiment.environment import DASHBOARD
from orchestrator.experiment.reading import flatten
from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.figure import NOT_MEASURED, Figure
from orchestrator.figures.records import TrialResult
from orchestrator.figures.scaling import Interval, compare, ratio_between_repeats
from orchestrator.runlog.folder import RunFolder

COMPARED = tuple(FIGURES[key] for key in ("images_per_second", "time_to_train_seconds", "box_ap", "mask_ap"))
"""Figures that are compared."""

IRRELEVANT = ("name", "description", "storage", "tracking", "reference_rows", "reference_files", "prediction")
"""Parts of an experiment that change no figure."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of one world size in two experiments, as text."""

    what: str
    """Recipe, kind of scaling and workers."""
    figure: str
    base: str
    other: str
    ratio: str
    """The other over the base, with its 95 % interval where there is one."""
    verdict: str
    """Whether that is more than noise."""
    other_label: str


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """A short name for each run: its experiment, and its folder where two are of the same."""
    names = [run.result.experiment for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.result.experiment} {run.path.name}" for run in runs]
    return names if len(set(names)) == len(names) else [f"{name} ({n})" for n, name in enumerate(names, 1)]


def differing(tables: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ between tables, with each table's value."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, NOT_MEASURED) for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def config_table(run: RunFolder) -> dict[str, str]:
    """An experiment's fields that can change a figure, dotted, as text."""
    values = {key: value for key, value in flatten(run.experiment) if key.split(".")[0] not in IRRELEVANT}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def environment_table(run: RunFolder) -> dict[str, str]:
    """What an experiment was run with: versions, host, devices."""
    devices = sorted({trial.device_name for trial in run.result.trials if trial.device_name})
    return {**run.result.environment, "command": "", DASHBOARD: "", "devices": ", ".join(devices)}


def result_differences(base: RunFolder, others: Sequence[tuple[str, RunFolder]]) -> list[Difference]:
    """Every figure of every world size that an experiment and the base have both run.

    Trials of the same recipe are compared; an experiment that shares no recipe with the base is compared with the
    base's first one, for then the recipe is what is compared.
    """
    rows = []
    below = _groups(base)
    for label, run in others:
        above = _groups(run)
        shared = {recipe for recipe, *_ in above} & {recipe for recipe, *_ in below}
        first = next(iter(below), ("",))[0]
        for (recipe, kind, size), trials in above.items():
            match = below.get((recipe if recipe in shared else first, kind, size))
            if match:
                what = f"{recipe}, {kind}, {size} worker{'s' if size > 1 else ''}"
                rows += [_difference(what, figure, match, trials, label) for figure in COMPARED]
    return [row for row in rows if (row.base, row.other) != (NOT_MEASURED, NOT_MEASURED)]


def _groups(run: RunFolder) -> dict[tuple[str, str, int], list[TrialResult]]:
    groups: dict[tuple[str, str, int], list[TrialResult]] = {}
    for trial in run.result.trials:
        groups.setdefault((trial.recipe or "", trial.scaling or "", trial.world_size), []).append(trial)
    return groups


def _difference(
    what: str, figure: Figure, below: Sequence[TrialResult], above: Sequence[TrialResult], label: str
) -> Difference:
    values = [[v for trial in trials if (v := figure.of(trial)) is not None] for trials in (below, above)]
    base, other = (statistics.median(found) if found else None for found in values)
    interval, source = ratio_between_repeats(values[1], values[0]) if all(values) else None, "between repeats"
    if interval is None and figure.key == "images_per_second" and all(values):
        interval, source = compare(above[0], below[0]), "within the runs; repeats would say more"
    ratio = f"{other / base:.3f}" if base and other is not None else NOT_MEASURED
    if interval:
        ratio = f"{interval.value:.3f} ({interval.low:.3f}–{interval.high:.3f})"
    verdict = _verdict(values, interval, source)
    return Difference(what, figure.heading, figure.text(base), figure.text(other), ratio, verdict, label)


def _verdict(values: list[list[float]], interval: Interval | None, source: str) -> str:
    if not all(values):
        return "not measured on both sides"
    if interval is None:
        return "cannot tell: one run each"
    return ("within noise" if interval.low <= 1 <= interval.high else "more than noise") + f", by the spread {source}"
