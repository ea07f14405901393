"""A prediction for people: tables, and what they rest on; nothing in them was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orchestrator.experiment.prediction_file import PredictedSize, Prediction, SimulatedRun
from orchestrator.figures.figure import NOT_MEASURED, number_text, percent_text, rate_text
from orchestrator.figures.records import TrialResult

PARTS = ("compute", "data", "stragglers", "communication")


class PredictionTable(NamedTuple):
    """One table of a prediction, as text."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def prediction_tables(prediction: Prediction) -> list[PredictionTable]:
    """The tables of a prediction: throughput and time, the step by part, and whole trainings with failures."""
    if not prediction.sizes:
        return []
    sizes = prediction.sizes
    links = f", SIMULATED links: {prediction.links}" if prediction.links else ""
    device = prediction.device_name or "an unknown device"
    seen = ", ".join(map(str, prediction.calibrated_sizes))
    tables = [
        PredictionTable(
            f"PREDICTED from {seen} workers on {device} ({prediction.recipe}, {prediction.scaling} scaling){links}",
            ["Workers", "Batch", "Images/s\n(95 %)", "Efficiency\n(95 %)", "To\ntarget", "Schedule", "Cost"],
            [_headline(size) for size in sizes],
        ),
        PredictionTable(
            f"PREDICTED step, ms{links}",
            ["Workers", "Step", *(part.capitalize() for part in PARTS)],
            [
                [str(size.world_size), _ms(size.step_seconds), *(_ms(size.part_seconds[part]) for part in PARTS)]
                for size in sizes
            ],
        ),
    ]
    simulated = [(size.world_size, size.simulated) for size in sizes if size.simulated]
    if simulated:
        headings = ["Workers", "Hosts", "Failure\nevery", "Failures", "Checkpoint\nevery", "Goodput"]
        tables.append(
            PredictionTable(
                "SIMULATED training with failures",
                [*headings, "Wall clock\n(95 %)"],
                [_simulated(size, run) for size, run in simulated],
            )
        )
    return tables


def prediction_notes(prediction: Prediction) -> Iterator[str]:
    """What must be known to read a prediction, a line each."""
    for size in prediction.sizes:
        yield f"{size.world_size} workers, batch {size.global_batch_size}: {size.convergence}"
    if prediction.worst_relative_error is not None:
        off = percent_text(prediction.worst_relative_error)
        yield f"at the sizes that were measured, the model is off by at most {off}; beyond them it may be off by more"
    yield from prediction.assumptions


def prediction_group(prediction: Prediction) -> Group:
    """A prediction for a terminal of 80 columns."""
    parts: list[Table | Text] = []
    for title, headings, rows in prediction_tables(prediction):
        table = Table(
            title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
            pad_edge=False, show_edge=False,
        )  # fmt: skip
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        parts += [table, Text()]
    return Group(*parts, *(Text(f"- {note}", style="dim") for note in prediction_notes(prediction)))


def prediction_note(trials: Sequence[TrialResult]) -> str:
    """What was predicted for a row of the closing table and how far that was off; "" where nothing was."""
    predicted = trials[0].predicted
    if predicted.images_per_second is None:
        return ""
    between = f"{rate_text(predicted.images_per_second)} images/s "
    between += f"({rate_text(predicted.low)}–{rate_text(predicted.high)}) were predicted"
    errors = [trial.predicted.error for trial in trials if trial.predicted.error is not None]
    off = ", ".join(f"{number_text(100 * abs(error), 1)} % too {'much' if error > 0 else 'little'}" for error in errors)
    return f"{between}: {off}" if off else between


def _headline(size: PredictedSize) -> list[str]:
    cost = size.cost if size.cost_to_target is None else size.cost_to_target
    return [
        str(size.world_size),
        str(size.global_batch_size),
        _with_range(map(rate_text, (size.images_per_second, size.images_per_second_low, size.images_per_second_high))),
        _with_range(map(percent_text, (size.efficiency, size.efficiency_low, size.efficiency_high))),
        _duration(size.time_to_target_seconds),
        _duration(size.schedule_seconds),
        number_text(cost, 2),
    ]


def _simulated(world_size: int, run: SimulatedRun) -> list[str]:
    return [
        str(world_size),
        str(run.num_hosts),
        _duration(run.mtbf_seconds),
        number_text(run.num_failures, 2),
        _duration(run.advised_checkpoint_seconds),
        percent_text(run.goodput),
        _with_range(map(_duration, (run.wall_seconds, run.wall_seconds_low, run.wall_seconds_high))),
    ]


def _with_range(texts: Iterable[str]) -> str:
    """A figure above the two ends of its interval."""
    value, low, high = texts
    return f"{value}\n({low}–{high})"


def _ms(seconds: float) -> str:
    return number_text(1000 * seconds, 1)


def _duration(seconds: float | None) -> str:
    """Seconds up to ten minutes, minutes up to two hours, then hours."""
    if seconds is None:
        return NOT_MEASURED
    unit, divisor = ("s", 1) if seconds < 600 else ("min", 60) if seconds < 7200 else ("h", 3600)
    value = seconds / divisor
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
