"""The page of many entries: one file with a table that sorts and filters, and pictures, that opens offline.

Names, sources and notes are strangers' text: the templates escape it, and the page's content security policy lets no
script run but the one that was written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.figure import NOT_MEASURED, number_text
from orchestrator.files import write_atomically
from orchestrator.report.entries import Entry, Estimate
from orchestrator.report.entries_plots import ENTRY_PLOTS
from orchestrator.report.page import script_values, template

PAGE = "entries.html"

FACETS = {"chip": "Chip", "chips": "Chips", "precision": "Precision", "recipe": "Recipe", "target": "Target"}
"""Columns that a choice filters by."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    key: str
    """Field of an entry."""
    heading: str
    definition: str
    text: Callable[[float | None], str] | None = None
    """How a number is written; None for text."""
    best_first: Literal["ascending", "descending"] = "ascending"
    """Direction that a first click sorts in."""

    @property
    def numeric(self) -> bool:
        """Whether it is sorted by numbers."""
        return self.text is not None


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the table, as text."""

    column: Column
    text: str
    value: str
    """What it is sorted by; "" where nothing is known."""
    small: str = ""
    """Its interval, or where it is from."""
    note: str = ""
    """What must be known to read it."""
    css: str = ""
    """Its class."""


MARKS = {"verified": "✓", "refuted": "✗", "open": "○"}


def _figure(field: str, key: str, heading: str = "", definition: str = "") -> Column:
    """A column of a figure of the catalogue."""
    row = FIGURES[key]
    first: Literal["ascending", "descending"] = "descending" if row.better == "higher" else "ascending"
    return Column(field, heading or row.heading, (definition or row.definition).replace("`", ""), row.text, first)


COLUMNS = (
    Column("name", "Entry", "Experiment and setup, with the place it was read from; or a published figure."),
    Column("chip", "Chip", "Accelerator, or processor where it ran on one."),
    Column("chips", "Chips", "Number of accelerators: workers, one for each.", number_text),
    Column("precision", "Precision", "Number format of the forward and backward pass."),
    Column("recipe", "Recipe", "Named set of speed switches (docs/performance.md)."),
    Column("target", "Target", "What counts as trained, and the number of training images."),
    _figure("time_to_train", "time_to_train_seconds"),
    _figure(
        "mlperf_time", "mlperf_seconds",
        definition="{} Of a benchmark, its score.".format(FIGURES["mlperf_seconds"].definition),
    ),
    _figure(
        "rate_per_chip", "images_per_second", "Images/s per chip",
        "Throughput over the number of accelerators. {}".format(FIGURES["images_per_second"].definition),
    ),
    _figure("efficiency", "scaling.efficiency"),
    _figure("energy", "energy.watt_hours_to_target"),
    _figure("cost", "cost_to_target"),
    Column(
        "verified", "Verified", "What the program that made this page recomputed. Of a bundle: what `bundle verify` "
        "does; of a run's folder: that its figures follow from its events; of a published figure: nothing.",
    ),
)  # fmt: skip


def write_entries(entries: Sequence[Entry], place: Path) -> Path:
    """Writes the page into a folder, which is made; returns its path. Raises OSError."""
    write_atomically(place / PAGE, entries_html(entries))
    return place / PAGE


def entries_html(entries: Sequence[Entry]) -> str:
    """The page; on top the entry with the shortest time, by the clock that more of them have."""
    clock = max(("time_to_train", "mlperf_time"), key=lambda key: sum(_value(e, key) is not None for e in entries))
    ordered = sorted(entries, key=lambda entry: _value(entry, clock) or math.inf)
    return template("entries.html.j2").render(
        title=f"{len(entries)} entries" if len(entries) != 1 else "1 entry",
        num_measured=sum(entry.kind == "measured" for entry in entries),
        columns=COLUMNS,
        sorted_by=clock,
        facets=[(key, heading, _choices(ordered, key)) for key, heading in FACETS.items()],
        rows=[(entry, _facets(entry), [_cell(entry, column) for column in COLUMNS]) for entry in ordered],
        figures=[(plot, *plot.svg(ordered)) for plot in ENTRY_PLOTS],
        **script_values(["tables.js"]),
    )


def _cell(entry: Entry, column: Column) -> Cell:
    value = getattr(entry, column.key)
    if isinstance(value, Estimate):
        text = column.text or number_text
        interval = f"{text(value.low)} – {text(value.high)}" if value.low is not None else ""
        return Cell(column, text(value.value), str(_value(entry, column.key) or ""), small=interval)
    if column.key == "name":
        return Cell(column, entry.name, entry.name, small=entry.source, note=entry.note)
    if column.key == "verified":
        return Cell(column, f"{MARKS[entry.verdict]} {entry.verified}", entry.verified, css=entry.verdict)
    return Cell(column, NOT_MEASURED if value is None else str(value), "" if value is None else str(value))


def _value(entry: Entry, key: str) -> float | None:
    """A figure's number, None where it is not measured or not finite."""
    value: float | None = getattr(entry, key).value
    return value if value is not None and math.isfinite(value) else None


def _facets(entry: Entry) -> dict[str, str]:
    return {key: NOT_MEASURED if (value := getattr(entry, key)) is None else str(value) for key in FACETS}


def _choices(entries: Sequence[Entry], key: str) -> list[str]:
    """What can be chosen to filter by, numbers by their size."""
    found = {_facets(entry)[key] for entry in entries}
    return sorted(found, key=lambda text: (int(text) if text.isdecimal() else math.inf, text.casefold()))
