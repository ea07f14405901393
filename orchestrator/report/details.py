"""Tables of the report with the figures that the results have no room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.figure import NOT_MEASURED, number_text, rate_text, seconds_text
from orchestrator.figures.records import Segment, TrialResult
from orchestrator.report.timings import SECTION_NAMES
from orchestrator.runlog.folder import TrialEvents

WALL_KEYS = ("sections.wall", *(f"sections.{name}" for name in SECTION_NAMES))
EVALUATION_KEYS = (
    "evaluations.iteration", "evaluations.epoch", "evaluations.box_ap", "evaluations.mask_ap",
    "evaluations.keypoint_ap", "evaluations.elapsed_seconds", "evaluations.seconds",
)  # fmt: skip
COCO_COLUMNS = {"box_ap50": "Box AP50", "mask_ap50": "Mask AP50", "keypoint_ap50": "Keypoint AP50"}
PARTS = ("mask", "keypoint")
"""What not every model detects: its columns are there where an evaluation has its figures."""

STEP_KEYS = (
    "global_batch_size", "base_lr", "step_seconds.p50", "step_seconds.p95", "step_seconds.p99", "data_wait_share",
    "rank_skew", "peak_memory_gib", "num_restarts",
)  # fmt: skip
SHAPE_KEYS = (
    *("num_shapes", "new_shape_seconds", "wasted_pixel_share"),
    *("num_graphs", "capture_seconds", "eager_step_share"),
)
GOODPUT_KEYS = (
    "goodput", "ettr", "sections.wall", "lost_work_seconds", "downtime_seconds", "paused_seconds", "checkpoint_seconds",
    "checkpoint_interval_seconds", "advised_checkpoint_seconds",
)  # fmt: skip
ENERGY_KEYS = (
    *("energy.joules", "energy.joules_per_image", "energy.watt_hours_to_target", "energy.training_joules"),
    *("energy.evaluation_joules", "energy.idle_joules", "energy.host_joules", "energy.cost", "energy.carbon_grams"),
)
SEGMENT_KEYS = ("global_batch_size", "base_lr", "images_per_second")
RESTART_KEYS = ("restarts.lost_iterations", "restarts.downtime_seconds", "restarts.recovery_seconds")
"""Columns of the tables: rows of the catalogue, and COCO's figures by their name in an evaluation's record."""


def detail_tables(trials: Sequence[TrialEvents]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Headings and rows of every table that has rows, by its title; the trials' labels begin their rows."""
    wall, goodput, evaluations, steps, shapes, restarts, segments = [], [], [], [], [], [], []
    coco = FIGURES["evaluations.figures.*"]
    figures = {name for trial in trials for each in trial.trial.evaluations for name in each.figures}
    absent = tuple(part for part in PARTS if f"{part}_ap" not in figures)
    keys = [key for key in EVALUATION_KEYS if not key.removeprefix("evaluations.").startswith(absent)]
    columns = {name: heading for name, heading in COCO_COLUMNS.items() if not name.startswith(absent)}
    losses = FIGURES["evaluations.validation_losses.*"]
    with_loss = any(each.validation_losses for trial in trials for each in trial.trial.evaluations)
    for trial in trials:
        record = trial.trial
        if record.sections:
            wall.append([trial.label, *_texts(record, WALL_KEYS)])
            goodput.append([trial.label, *_texts(record, GOODPUT_KEYS), checkpoint_advice(record)])
        for evaluation in record.evaluations:
            more = [coco.text(evaluation.figures.get(name)) for name in columns]
            more += [losses.text(evaluation.validation_losses.get("total_loss"))] if with_loss else []
            evaluations.append([trial.label, *_texts(evaluation, keys), *more])
        device = f"{record.world_size} × {record.device_name or record.device or NOT_MEASURED}"
        steps.append([trial.label, *_texts(record, STEP_KEYS), device])
        if record.num_shapes is not None:
            shapes.append([trial.label, *_texts(record, SHAPE_KEYS), _reasons(record.eager_steps)])
        for restart in record.restarts:
            what = [str(restart.attempt), restart.cause, restart.message]
            parts = [f"{part} {seconds_text(seconds)}" for part, seconds in restart.recovery_part_seconds.items()]
            restarts.append([trial.label, *what, *_texts(restart, RESTART_KEYS), ", ".join(parts) or NOT_MEASURED])
        segments += [[trial.label, *_segment_texts(segment)] for segment in record.segments or []]
    tables = {
        "Wall clock by section, seconds": (["Trial", *_headings(WALL_KEYS)], wall),
        "Goodput": (["Trial", *_headings(GOODPUT_KEYS), "Checkpoints"], goodput),
        "Evaluations": (["Trial", *_headings(keys), *columns.values(), *[losses.heading] * with_loss], evaluations),
        "Steps and memory": (["Trial", *_headings(STEP_KEYS), "Device"], steps),
        "Shapes of batches": (["Trial", *_headings(SHAPE_KEYS), "Because of"], shapes),
        "Energy": (["Trial", *_headings(ENERGY_KEYS), "Not measured"], _energy_rows(trials)),
        "Restarts": (["Trial", "Attempt", "Cause", "Message", *_headings(RESTART_KEYS), "Of it (s)"], restarts),
        "Numbers of workers": (["Trial", "From iteration", "To", "Workers", *_headings(SEGMENT_KEYS)], segments),
    }
    return {title: (headings, rows) for title, (headings, rows) in tables.items() if rows}


def _energy_rows(trials: Sequence[TrialEvents]) -> list[list[str]]:
    """A row for each trial whose hosts looked for energy counters, with the reason where figures are missing."""
    return [
        [trial.label, *_texts(trial.trial, ENERGY_KEYS), trial.trial.energy.reason]
        for trial in trials
        if trial.trial.energy.nodes
    ]


def checkpoint_advice(record: TrialResult) -> str:
    """How often checkpoints were taken and how often would be best, in a line; "" where that is not known."""
    if record.mtbf_seconds is None:
        return ""
    taken, best = (seconds_text(s) for s in (record.checkpoint_interval_seconds, record.advised_checkpoint_seconds))
    hours = f"{rate_text(record.mtbf_seconds / 3600)} h between failures ({record.mtbf_source})"
    return f"taken every {taken} s; every {best} s would lose the least, with {hours}"


def _segment_texts(segment: Segment) -> list[str]:
    numbers = (segment.first_iteration, segment.iteration, segment.world_size)
    return [*map(number_text, numbers), *_texts(segment, SEGMENT_KEYS)]


def _reasons(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{reason} ({number_text(count)})" for reason, count in counts.items())


def _headings(keys: Sequence[str]) -> list[str]:
    return [FIGURES[key].heading for key in keys]


def _texts(record: Any, keys: Sequence[str]) -> list[str]:
    """Figures of a record as text; `record` is a trial's, or one of the list that the keys begin with."""
    texts = []
    for key in keys:
        within = key.removeprefix("evaluations.").removeprefix("restarts.")
        text = FIGURES[key].text(attrgetter(within)(record))
        texts.append(text if text.strip("-0.") else text.removeprefix("-"))  # a difference may round to -0.0
    return texts
