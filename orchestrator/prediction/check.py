"""`python -m orchestrator.prediction.check FILE…`: how far such a model is off for figures that others published.

Each published size is left out once and predicted from the others of its series (one program, machine and precision),
by the terms that projections use. Rows have no single steps, so waiting for the slowest worker and communication are
not known apart: what is checked are the terms, not the whole of `--predict`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.experiment.references import read_references
from orchestrator.experiment.spec import ReferenceRow, SpecError
from orchestrator.figures.figure import rate_text
from orchestrator.figures.step_terms import fit_terms, terms_at

Series = dict[int, ReferenceRow]
"""Rows of one program, machine and precision, by the workers that train."""


class Check(NamedTuple):
    """One published throughput and what was predicted for it without it."""

    series: str
    world_size: int
    source: str
    """What it was predicted from."""
    published: float
    """Images/s, as the next."""
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted / self.published - 1


def series_of(rows: Sequence[ReferenceRow]) -> dict[str, Series]:
    """The series among some rows that have a throughput at several sizes, by name."""
    found: dict[str, Series] = defaultdict(dict)
    for row in rows:
        if row.images_per_second and row.global_batch_size:
            name = ", ".join(filter(None, (row.name.partition(",")[0], row.accelerator, row.precision)))
            found[name][_workers(row)] = row
    return {name: dict(sorted(series.items())) for name, series in found.items() if len(series) > 1}


def leave_one_out(name: str, series: Series) -> Iterator[Check]:
    """Each size of a series by the terms of a step fitted to the others."""
    for left_out, row in series.items():
        others = [other for size, other in series.items() if size != left_out]
        found = fit_terms([_terms(other) for other in others], [_step(other) for other in others])
        step = sum(seconds * _terms(row)[term] for term, seconds in found.items())
        sizes = ", ".join(str(_workers(other)) for other in others)
        source = f"{sizes}: {', '.join(term for term, seconds in found.items() if seconds)}"
        yield Check(name, left_out, source, _rate(row), _batch(row) / step)


def borrowed(every: dict[str, Series]) -> Iterator[Check]:
    """The largest size of a series from its smallest, by the speed-up of another series with both."""
    for name, series in every.items():
        small, large = min(series), max(series)
        for other, rows in every.items():
            if other != name and small in rows and large in rows:
                predicted = _rate(series[small]) * _rate(rows[large]) / _rate(rows[small])
                yield Check(name, large, f"{small}, with the speed-up of {other}", _rate(series[large]), predicted)


def _workers(row: ReferenceRow) -> int:
    return row.training_world_size or row.world_size


def _rate(row: ReferenceRow) -> float:
    return row.images_per_second or 0.0


def _batch(row: ReferenceRow) -> int:
    return row.global_batch_size or 0


def _step(row: ReferenceRow) -> float:
    return _batch(row) / _rate(row)


def _terms(row: ReferenceRow) -> dict[str, float]:
    return terms_at(_workers(row), _batch(row) / _workers(row))


def main(
    references: Annotated[list[Path], typer.Argument(help="Files of published figures: references/*.yaml.")],
) -> None:
    """Predicts each published throughput from the others of its series, and shows how far that is off."""
    try:
        rows = [row for file in references for row in read_references(file)]
    except SpecError as error:
        Console(stderr=True, emoji=False).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error
    every = series_of(rows)
    if not every:
        Console(stderr=True, emoji=False).print("error: no series has a throughput and a batch at two sizes or more")
        raise typer.Exit(2)
    checks = [check for name, series in every.items() for check in leave_one_out(name, series)]
    console = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
    others = "Each size from the others of its series", checks
    for title, found in (others, ("The largest from the smallest", list(borrowed(every)))):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("Series", "Workers", "From", "Published", "Predicted", "Off by"):
            table.add_column(heading, justify="left" if heading in ("Series", "From") else "right")
        for check in found:
            rates = rate_text(check.published), rate_text(check.predicted)
            row = (check.series, str(check.world_size), check.source, *rates, f"{check.error:+.1%}")
            table.add_row(*map(escape, row))
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
