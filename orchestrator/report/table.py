"""The closing table, in the form of the seed benchmark: workers, time to train, images/s, box and mask AP.

One set of rows for the terminal, for Markdown and for CSV. The traps it protects against: a name from an experiment
file that a spreadsheet would run as a formula or that would break the Markdown table, and repeats of which some never
met the target being summed up by the lucky ones.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orchestrator.figures.records import ExperimentResult, TrialResult
from trainers import clock

NOT_MEASURED = "–"
DEFINITIONS = "docs/measurement.md"

STARVED = 0.05
"""Share of the step time spent waiting for data above which a row says so; the seed's runs waited for less than 1 %."""
"""Where every column is defined."""

HEADINGS = (
    "Run", "Workers", "Time to train, box (s)", "Time to train (s)", "Images/s", "Box AP", "Mask AP", "Speed-up",
    "Efficiency", "Cost", "Cost to target",
)  # fmt: skip
SHORT_HEADINGS = (
    "Run", "Work\ners", "Box\ntarget", "Target\n(s)", "Images\n/s", "Box\nAP", "Mask\nAP", "Speed\nup", "Effi-\nciency",
    "Cost", "to\ntarget",
)  # fmt: skip
"""The same for a terminal of 80 columns."""
COST_COLUMNS = 2
"""Columns at the end that are there only where a price is known."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the repeats of one recipe, kind of scaling and world size, or a published figure.

    Attributes:
        name: Trial, without its seed where there are several; or the reference's name.
        kind: `measured` by this program, `reference` for a published figure.
        workers: World size.
        num_trials: Repeats behind the figures.
        time_to_box_target_seconds: Seed clock to the box target: median, a repeat that missed it counts as infinite.
        time_to_train_seconds: Seed clock to all targets, likewise.
        images_per_second: Throughput, median.
        box_ap: Box AP of the evaluation that met the targets, else of the last one (0–100), median.
        mask_ap: The same for masks.
        speed_up: Throughput over that of the smallest world size.
        efficiency: Speed-up over the ratio of the world sizes; 1 is ideal.
        cost: What the accelerators of one trial cost, in the currency of the experiment's price, median.
        cost_to_target: The same to the targets; a repeat that missed them counts as infinite.
        status: Worst status of the trials; "" for references.
        note: Why a figure is missing, for a person; or the reference's source.
    """

    name: str
    kind: Literal["measured", "reference"]
    workers: int
    num_trials: int
    time_to_box_target_seconds: float | None
    time_to_train_seconds: float | None
    images_per_second: float | None
    box_ap: float | None
    mask_ap: float | None
    speed_up: float | None
    efficiency: float | None
    cost: float | None
    cost_to_target: float | None
    status: str
    note: str

    def cells(self, *, with_costs: bool = False) -> tuple[str, ...]:
        """The cells under `HEADINGS`, as text; those of the costs on request."""
        runs = f" (median of {self.num_trials})" if self.num_trials > 1 else ""
        failed = f" [{self.status}]" if self.status not in ("", "FINISHED") else ""
        reference = " (reference)" if self.kind == "reference" else ""
        costs = (number_text(self.cost, 2), number_text(self.cost_to_target, 2)) if with_costs else ()
        return (
            self.name + runs + failed + reference,
            str(self.workers),
            seconds_text(self.time_to_box_target_seconds),
            seconds_text(self.time_to_train_seconds),
            rate_text(self.images_per_second),
            number_text(self.box_ap, 2),
            number_text(self.mask_ap, 2),
            number_text(self.speed_up, 2),
            percent_text(self.efficiency),
            *costs,
        )


def table_cells(result: ExperimentResult, headings: Sequence[str] = HEADINGS) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table as people see it; columns of costs only where a price is known."""
    rows = table_rows(result)
    priced = any(row.cost is not None for row in rows)
    shown = list(headings if priced else headings[:-COST_COLUMNS])
    return shown, [list(row.cells(with_costs=priced)) for row in rows]


def table_rows(result: ExperimentResult) -> list[Row]:
    """The table's rows: the trials in the order they were run, repeats together, then the references."""
    groups: dict[tuple[str | None, str | None, int, str], list[TrialResult]] = defaultdict(list)
    for trial in result.trials:
        groups[trial.recipe, trial.scaling, trial.world_size, _without_seed(trial)].append(trial)
    rows = [_measured(result, name, trials) for (*_, name), trials in groups.items()]
    for reference in result.reference_rows:
        rows.append(
            Row(
                name=reference.name,
                kind="reference",
                workers=reference.world_size,
                num_trials=1,
                time_to_box_target_seconds=None,
                time_to_train_seconds=reference.time_to_train_seconds,
                images_per_second=reference.images_per_second,
                box_ap=reference.box_ap,
                mask_ap=reference.mask_ap,
                speed_up=None,
                efficiency=None,
                cost=None,
                cost_to_target=None,
                status="",
                note=reference.source,
            )
        )
    return rows


def closing_table(result: ExperimentResult) -> Group:
    """The table for a terminal of 80 columns, with notes on missing figures below it; no name is broken.

    Columns that the seed's table has not are left out where they are empty, or where costs need their place.
    """
    headings, cells = table_cells(result, SHORT_HEADINGS)
    rows = table_rows(result)
    empty = {n for n in (2, 7, 8) if {line[n] for line in cells} <= {NOT_MEASURED}}
    left_out = empty | ({2, 7} if len(headings) == len(HEADINGS) else set())
    shown = [n for n in range(len(headings)) if n not in left_out]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for n in shown:
        if n == 0:
            table.add_column(headings[n], min_width=max((len(w) for line in cells for w in line[0].split()), default=0))
        else:
            table.add_column(headings[n], justify="right", no_wrap=True)
    for row, line in zip(rows, cells, strict=True):
        table.add_row(*(escape(line[n]) for n in shown), style="dim" if row.kind == "reference" else None)
    notes = [Text(f"{row.name}: {row.note}", style="dim") for row in rows if row.note]
    return Group(Text(result.experiment, style="bold"), table, *notes)


def markdown_table(result: ExperimentResult) -> str:
    """The table as Markdown, with its notes and the place of the definitions, ending in a newline."""
    rows = table_rows(result)
    headings, cells = table_cells(result)
    lines = [
        "| " + " | ".join(headings) + " |",
        "|" + "|".join(":---" if position == 0 else "---:" for position in range(len(headings))) + "|",
        *("| " + " | ".join(escape_markdown(cell) for cell in line) + " |" for line in cells),
        "",
        *(f"- {escape_markdown(row.name)}: {escape_markdown(row.note)}" for row in rows if row.note),
    ]
    if any(row.note for row in rows):
        lines.append("")
    return "\n".join([*lines, f"{NOT_MEASURED} is not measured. Every figure is defined in {DEFINITIONS}.", ""])


def csv_table(result: ExperimentResult) -> str:
    """The table as CSV (RFC 4180): full precision, empty where not measured, no cell that is a formula."""
    fields = tuple(Row.__dataclass_fields__)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(fields)
    for row in table_rows(result):
        writer.writerow([neutral_cell(getattr(row, field)) for field in fields])
    return text.getvalue()


def seconds_text(seconds: float | None) -> str:
    """Seconds for a person: whole from 1,000 up, else to a tenth."""
    return number_text(seconds, 0 if seconds is not None and abs(seconds) >= 1000 else 1)


def rate_text(rate: float | None) -> str:
    """Images per second for a person: two decimals, or three figures where that would show fewer."""
    return f"{rate:.3g}" if rate is not None and 0 < rate < 1 else number_text(rate, 2)


def number_text(value: float | None, decimals: int) -> str:
    """A number with thousands separators, or the dash of a figure that was not measured."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"


def percent_text(share: float | None) -> str:
    """A share as a percentage to one decimal."""
    return NOT_MEASURED if share is None else f"{number_text(100 * share, 1)} %"


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


def _measured(result: ExperimentResult, name: str, trials: Sequence[TrialResult]) -> Row:
    first = trials[0]
    scaling = next(
        (
            row
            for row in result.scaling
            if (row.recipe, row.kind, row.world_size) == (first.recipe, first.scaling, first.world_size)
        ),
        None,
    )
    met = [trial for trial in trials if trial.time_to_train_seconds is not None]
    notes = list(dict.fromkeys(trial.reason for trial in trials if trial.reason))
    waits = [trial.data_wait_share for trial in trials if trial.data_wait_share is not None]
    if waits and max(waits) > STARVED:
        notes.append(
            f"starved: {max(waits):.0%} of the step time went by waiting for data; "
            "give it more CPUs (resources.cpus_per_worker) or loader processes (resources.loader_workers)"
        )
    aps = [ap_to_show(trial) for trial in trials]
    if first.protocol == "throughput" and any(ap != (None, None) for ap in aps):
        # The seed's table leaves these blank: nobody trained to them, and they would be read as if.
        figures = f"box AP {number_text(first.box_ap, 2)}, mask AP {number_text(first.mask_ap, 2)}"
        notes.append(f"{figures} after {first.iterations} iterations run for speed, not for accuracy")
        aps = [(None, None)] * len(trials)
    if met and len(met) < len(trials):
        notes.insert(0, f"targets met in {len(met)} of {len(trials)} trials")
    worst = next((s for s in ("FAILED", "KILLED") if any(t.status == s for t in trials)), "FINISHED")
    return Row(
        name=name,
        kind="measured",
        workers=first.world_size,
        num_trials=len(trials),
        time_to_box_target_seconds=_median_with_misses([t.time_to_box_target_seconds for t in trials]),
        time_to_train_seconds=_median_with_misses([t.time_to_train_seconds for t in trials]),
        images_per_second=_median([t.images_per_second for t in trials]),
        box_ap=_median([box for box, _ in aps]),
        mask_ap=_median([mask for _, mask in aps]),
        speed_up=scaling.speed_up if scaling else None,
        efficiency=scaling.efficiency if scaling else None,
        cost=_median([t.cost for t in trials]),
        cost_to_target=_median_with_misses([t.cost_to_target for t in trials]),
        status=worst,
        note="; ".join(notes),
    )


def ap_to_show(trial: TrialResult) -> tuple[float | None, float | None]:
    """Box and mask AP of the evaluation that first met all targets, as the seed shows them, else of the last one."""
    box, mask = trial.target_box_ap, trial.target_mask_ap
    if trial.time_to_train_seconds is not None:
        for e in trial.evaluations:
            if (box is None or (e.box_ap is not None and e.box_ap >= box)) and (
                mask is None or (e.mask_ap is not None and e.mask_ap >= mask)
            ):
                return e.box_ap, e.mask_ap
    return trial.box_ap, trial.mask_ap


def _without_seed(trial: TrialResult) -> str:
    return trial.name.removesuffix(f"-seed{trial.seed}")


def _median(values: Sequence[float | None]) -> float | None:
    return clock.quantile([value for value in values if value is not None], 0.5)


def _median_with_misses(values: Sequence[float | None]) -> float | None:
    """The median where a missing value is longer than any other; None where the median itself is missing."""
    if all(value is None for value in values):
        return None
    ordered = sorted(math.inf if value is None else value for value in values)
    lower, upper = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return None if math.isinf(upper) else (lower + upper) / 2
