"""The closing table, in the form of the seed benchmark: workers, time to train, images/s, box and mask AP.

One set of rows for the terminal, for Markdown and for CSV; headings and notation are the catalogue's.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orchestrator.experiment.prediction_file import Prediction
from orchestrator.experiment.spec import ReferenceRow
from orchestrator.figures.benchmark import verdict_lines
from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.figure import NOT_MEASURED, Figure, number_text, percent_text, seconds_text
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.report.prediction import prediction_group, prediction_note, prediction_notes, prediction_tables

DEFINITIONS = "docs/measurement.md"
"""Where every column is defined."""

MAX_DATA_WAIT = 0.05
"""Share of the step time spent waiting for data above which a note says so; the seed's runs: 2.3 and 7.1 %."""

MAX_NAMES = 3
"""Names of other trials in a note."""

MAX_NEW_SHAPES = 0.05
"""What new shapes may add to the time of the steps without a note."""

COLUMNS = tuple(
    FIGURES[key]
    for key in (
        "time_to_box_target_seconds", "time_to_train_seconds", "images_per_second", "box_ap", "mask_ap",
        "keypoint_ap", "scaling.speed_up", "scaling.efficiency", "cost", "cost_to_target",
    )
)  # fmt: skip
"""Figures of the table after the name and the workers."""

WHERE_KNOWN = ("keypoint_ap", "cost", "cost_to_target")
"""Columns that are there only where a row has a figure: a model with keypoints, a price."""

APS = ("box_ap", "mask_ap", "keypoint_ap")

NARROW_OPTIONAL = ("time_to_box_target_seconds", "scaling.speed_up", "scaling.efficiency")
"""Columns that the seed's table does not have: a narrow table leaves them out where they are empty."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the repeats of one recipe, kind of scaling and world size, or a published figure.

    Figures without a description are those of the catalogue: medians over the repeats.
    """

    name: str
    """Trial, without its seed where there are several; or the reference's name."""
    kind: Literal["measured", "reference"]
    workers: int
    num_trials: int = 1
    """Repeats behind the figures."""
    time_to_box_target_seconds: float | None = None
    """A repeat that missed the target counts as infinite, here and in the two figures to all targets."""
    time_to_train_seconds: float | None = None
    images_per_second: float | None = None
    box_ap: float | None = None
    """Of the evaluation that met the targets, else of the last one (0–100); so are the next two."""
    mask_ap: float | None = None
    keypoint_ap: float | None = None
    speed_up: float | None = None
    efficiency: float | None = None
    cost: float | None = None
    cost_to_target: float | None = None
    status: str = ""
    """Worst status of the trials; empty for references."""
    note: str = ""
    """Why a figure is missing, for a person; or the reference's source."""

    def title(self) -> str:
        """The name with what must be known at once: repeats, a failure, a published figure."""
        runs = f" (median of {self.num_trials})" if self.num_trials > 1 else ""
        failed = f" [{self.status}]" if self.status not in ("", "FINISHED") else ""
        return self.name + runs + failed + (" (reference)" if self.kind == "reference" else "")

    def text(self, column: Figure) -> str:
        """What it shows in a column."""
        return column.text(getattr(self, column.key.rpartition(".")[2]))


def table_cells(result: ExperimentResult, *, narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table as people see it.

    Args:
        result: The run.
        narrow: For a terminal of 80 columns: short headings, and without what the seed's table does not have where that
            is empty or the costs need its place.
    """
    rows = table_rows(result)
    priced = any(row.cost is not None for row in rows)
    empty = {column.key for column in COLUMNS if all(row.text(column) == NOT_MEASURED for row in rows)}
    columns = [column for column in COLUMNS if column.key not in empty.intersection(WHERE_KNOWN)]
    if narrow:
        displaced = {"time_to_box_target_seconds", "scaling.speed_up"} if priced else set()
        left_out = (empty | displaced).intersection(NARROW_OPTIONAL)
        columns = [column for column in columns if column.key not in left_out]
    headings = ["Run", *((c.short if narrow else c.heading) for c in (FIGURES["world_size"], *columns))]
    return headings, [[row.title(), str(row.workers), *map(row.text, columns)] for row in rows]


def table_rows(result: ExperimentResult) -> list[Row]:
    """The table's rows: the trials in the order they were run, repeats together, then the references."""
    groups: dict[tuple[str | None, str | None, int, str], list[TrialResult]] = defaultdict(list)
    for trial in result.trials:
        name = trial.name.removesuffix(f"-seed{trial.seed}")
        groups[trial.recipe, trial.scaling, trial.world_size, name].append(trial)
    measured = [_measured(result, name, trials) for (*_, name), trials in groups.items()]
    return [*measured, *map(_reference, result.reference_rows)]


def closing_table(result: ExperimentResult) -> Group:
    """The table for a terminal of 80 columns, with notes on missing figures below it; no name is broken."""
    headings, lines = table_cells(result, narrow=True)
    rows = table_rows(result)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(headings[0], min_width=max((len(word) for line in lines for word in line[0].split()), default=0))
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*map(escape, line), style="dim" if row.kind == "reference" else None)
    notes = [Text(f"{row.name}: {row.note}", style="dim") for row in rows if row.note]
    predicted = Group(Text(), prediction_group(result.prediction)) if result.prediction else Group()
    return Group(Text(result.experiment, style="bold"), table, *map(Text, verdict_lines(result)), *notes, predicted)


def markdown_table(result: ExperimentResult) -> str:
    """The table as Markdown, with its notes and the place of the definitions, ending in a newline."""
    rows = table_rows(result)
    headings, body = table_cells(result)
    notes = [f"- {escape_markdown(row.name)}: {escape_markdown(row.note)}" for row in rows if row.note]
    lines = [
        "| " + " | ".join(headings) + " |",
        "|:---|" + "---:|" * (len(headings) - 1),
        *("| " + " | ".join(map(escape_markdown, line)) + " |" for line in body),
        "",
        *(f"{escape_markdown(line)}\n" for line in verdict_lines(result)),
        *([*notes, ""] if notes else []),
        *(_markdown_prediction(result.prediction) if result.prediction else []),
    ]
    return "\n".join([*lines, f"{NOT_MEASURED} is not measured. Every figure is defined in {DEFINITIONS}.", ""])


def _markdown_prediction(prediction: Prediction) -> Iterator[str]:
    for title, headings, rows in prediction_tables(prediction):
        yield from (f"**{escape_markdown(title)}**", "", f"| {' | '.join(map(escape_markdown, headings))} |")
        yield f"|{'---:|' * len(headings)}"
        yield from (f"| {' | '.join(map(escape_markdown, row))} |" for row in rows)
        yield ""
    yield from (f"- {escape_markdown(note)}" for note in prediction_notes(prediction))
    yield ""


def csv_table(result: ExperimentResult) -> str:
    """The table as CSV (RFC 4180): full precision, empty where not measured, no cell that is a formula."""
    names = [field.name for field in fields(Row)]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([neutral_cell(getattr(row, name)) for name in names] for row in table_rows(result))
    return text.getvalue()


def escape_markdown(text: str) -> str:
    """Text that shows as it is in a Markdown table: no markup, no HTML, no line break."""
    return re.sub(r"([\\`*_{}\[\]<>|#~!&])", r"\\\1", " ".join(text.split()))


def neutral_cell(value: object) -> object:
    """A CSV cell that no spreadsheet takes for a formula (OWASP, "CSV injection"): text gets a quote in front."""
    if value is None:
        return ""
    if (isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@")) or (value and str(value)[0] in "\t\r"):
        return f"'{value}"
    return value


def _aps_to_show(trial: TrialResult) -> dict[str, float | None]:
    """APs of the evaluation that first met all targets, as the seed shows them, else of the last one."""
    start = "" if trial.scored_iteration is None else "scored_"
    return {name: getattr(trial, f"{start}{name}") for name in APS}


def _reference(reference: ReferenceRow) -> Row:
    return Row(
        name=reference.name,
        kind="reference",
        workers=reference.world_size,
        time_to_train_seconds=reference.time_to_train_seconds,
        images_per_second=reference.images_per_second,
        box_ap=reference.box_ap,
        mask_ap=reference.mask_ap,
        note=reference.source,
    )


def _measured(result: ExperimentResult, name: str, trials: Sequence[TrialResult]) -> Row:
    first = trials[0]
    key = (first.recipe, first.scaling, first.world_size)
    scaling = next((row for row in result.scaling if (row.recipe, row.kind, row.world_size) == key), None)
    # The seed's table leaves AP blank where nobody trained to it.
    aps = [dict.fromkeys(APS) if first.protocol == "throughput" else _aps_to_show(trial) for trial in trials]
    return Row(
        name=name,
        kind="measured",
        workers=first.world_size,
        num_trials=len(trials),
        time_to_box_target_seconds=_median_with_misses([t.time_to_box_target_seconds for t in trials]),
        time_to_train_seconds=_median_with_misses([t.time_to_train_seconds for t in trials]),
        images_per_second=_median(t.images_per_second for t in trials),
        **{name: _median(each[name] for each in aps) for name in APS},
        speed_up=scaling.speed_up if scaling else None,
        efficiency=scaling.efficiency if scaling else None,
        cost=_median(t.cost for t in trials),
        cost_to_target=_median_with_misses([t.cost_to_target for t in trials]),
        status=next((s for s in ("FAILED", "KILLED") if any(t.status == s for t in trials)), "FINISHED"),
        note="; ".join(_notes(trials)),
    )


def _notes(trials: Sequence[TrialResult]) -> list[str]:
    """What must be known to read a row."""
    first = trials[0]
    notes = list(dict.fromkeys(trial.reason for trial in trials if trial.reason))
    met = sum(trial.time_to_train_seconds is not None for trial in trials)
    together = sorted({name for trial in trials for name in trial.ran_with or ()})
    if together:
        more = f" and {len(together) - MAX_NAMES} more" if len(together) > MAX_NAMES else ""
        hosts = sorted({host for trial in trials for host in trial.shared_hosts or ()})
        shared = f", sharing {', '.join(hosts)}: its speed is not that of a trial alone" if hosts else ""
        notes.append(f"ran at the same time as {', '.join(together[:MAX_NAMES])}{more}{shared}")
    if 0 < met < len(trials):
        notes.insert(0, f"targets met in {met} of {len(trials)} trials")
    if predicted := prediction_note(trials):
        notes.append(predicted)
    wait = max((trial.data_wait_share for trial in trials if trial.data_wait_share is not None), default=0.0)
    if wait > MAX_DATA_WAIT:
        notes.append(
            f"starved: {wait:.0%} of the step time went by waiting for data; "
            "give it more CPUs (resources.cpus_per_worker) or loader processes (resources.loader_workers)"
        )
    notes += [_goodput_note(trial) for trial in trials if trial.num_restarts and trial.goodput is not None]
    if eager := [trial for trial in trials if trial.eager_steps]:
        share = percent_text(max(trial.eager_step_share or 0.0 for trial in eager))
        reasons = dict.fromkeys(reason for trial in eager for reason in trial.eager_steps)
        notes.append(f"eager: {share} of the steps had no fixed shape or CUDA graph ({', '.join(reasons)})")
    costly = max(trials, key=_new_shape_share)
    if _new_shape_share(costly) > MAX_NEW_SHAPES and costly.device == "cuda":  # a CPU takes every shape alike
        seconds = seconds_text(costly.new_shape_seconds)
        notes.append(f"{costly.num_shapes} shapes of batches added {seconds} s to its steps (switches.fixed_shapes)")
    known = {name: ap for name in APS if (ap := getattr(first, name)) is not None}
    if first.protocol == "throughput" and known:
        figures = ", ".join(f"{name.replace('_ap', ' AP')} {number_text(ap, 2)}" for name, ap in known.items())
        notes.append(f"{figures} after {first.iterations} iterations run for speed, not for accuracy")
    return notes


def _goodput_note(trial: TrialResult) -> str:
    """What failures and stops cost a trial."""
    lost = (trial.lost_work_seconds, trial.downtime_seconds, trial.checkpoint_seconds)
    work, down, stalled = map(seconds_text, lost)
    shares = f"goodput {percent_text(trial.goodput)}, ETTR {percent_text(trial.ettr)}"
    return f"{shares}: {work} s of work lost, {down} s down, {stalled} s stalled by checkpoints"


def _new_shape_share(trial: TrialResult) -> float:
    """What new shapes added to the steps, over what these would have taken; 0 where that is not known."""
    usual = (trial.step_seconds.p50 or 0.0) * (trial.iterations or 0)
    return (trial.new_shape_seconds or 0.0) / usual if usual else 0.0


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _median_with_misses(values: Sequence[float | None]) -> float | None:
    """The median where a missing value is longer than any other; None where the median itself is missing."""
    median = statistics.median(math.inf if value is None else value for value in values)
    return median if math.isfinite(median) else None
