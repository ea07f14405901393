"""AI-Rank's training log of a trial: its log lines, its system_information.json, its summary table.

The format is that of the AI-Rank training rules, which the seed benchmark follows: one line per event with its Unix
time, in the order the rules give. What was not reached has no line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.figures.figure import number_text
from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.figures.sections import began, last_workers, loop_end
from orchestrator.files import file_sha256, write_atomically
from orchestrator.report.table import escape_markdown, table_rows
from trainers.contract.events import Evaluated, Event
from trainers.contract.plan import TrialPlan

LOG_NAME = "ai_rank.log"
SYSTEM_NAME = "system_information.json"
SUMMARY_NAME = "ai_rank.md"


def write_airank(plan: Plan, events: Sequence[Event], result: TrialResult, folder: Path) -> list[Path]:
    """Writes the log lines and system_information.json of a trial into its folder and returns their paths."""
    log, system = folder / LOG_NAME, folder / SYSTEM_NAME
    write_atomically(log, airank_log(plan, events, result))
    write_atomically(system, json.dumps(system_information(plan, events, result), indent=2) + "\n")
    return [log, system]


def write_airank_summary(result: ExperimentResult, run_dir: Path) -> Path:
    """Writes AI-Rank's summary table of all trials into the run's folder and returns its path."""
    path = run_dir / SUMMARY_NAME
    path.write_text(airank_table(result), encoding="utf-8")
    return path


def airank_log(plan: Plan, events: Sequence[Event], result: TrialResult) -> str:
    """AI-Rank's lines of a trial, ending in a newline; "" where the start of training is not known."""
    start = began(events)
    if start is None:
        return ""
    lines = [_line(start, f"load_data, checksum:{_checksum(plan)}"), _line(start, "test_begin")]
    target = result.time_to_train_seconds
    for event in sorted((e for e in events if isinstance(e, Evaluated)), key=lambda e: e.time):
        figures = ((name, event.figures.get(f"{name}_ap")) for name in ("box", "mask", "keypoint"))
        shown = " ".join(f"{name}_ap {value:.4f}" for name, value in figures if value is not None)
        if shown:
            epoch = f", total_epoch_cnt:{event.epoch:.6g}" if event.epoch is not None else ""
            lines.append(_line(event.scored, f"eval_accuracy:{shown}{epoch}"))
        if target is not None and event.iteration == result.scored_iteration:
            lines.append(_line(max(event.scored, start + target), f"target_quality_time:{target:.3f}sec"))
            target = None
    if (finished := loop_end(events)) is not None:
        lines.append(_line(finished.time, "test_finish"))
        if result.schedule_seconds is not None:
            lines.append(_line(finished.time, f"total_use_time:{result.schedule_seconds:.3f}sec"))
        if result.images_per_second is not None:
            lines.append(_line(finished.time, f"avg_ips:{result.images_per_second:.2f}images/sec"))
    return "\n".join(lines) + "\n"


def system_information(plan: Plan, events: Sequence[Event], result: TrialResult) -> dict[str, Any]:
    """What AI-Rank requires about the machines; null where it is not known."""
    workers = last_workers(events)
    first = workers[0] if workers else None
    nodes = result.num_nodes
    return {
        "accelerator_name": _known(first.device_name if first else None),
        "accelerator_memory_capacity": _gib(first.device_memory_gib if first else None),
        "accelerators_per_node": plan.world_size / nodes if nodes else None,
        "number_of_nodes": nodes,
        "host_processor_name": _known(first.host_processor if first else None),
        "host_processor_core_count": first.host_cores if first else None,
        "host_memory_capacity": _gib(first.host_memory_gib if first else None),
        "operating_system": _known(first.operating_system if first else None),
        "software_stack": first.versions if first else None,
        "framework": "detectron2",
        "model": Path(plan.config_file).stem if isinstance(plan, TrialPlan) else None,
        "precision": plan.recipe.precision if isinstance(plan, TrialPlan) else plan.precision,
        "global_batch_size": result.global_batch_size,
    }


def airank_table(result: ExperimentResult) -> str:
    """AI-Rank's summary table as Markdown: accelerators, time to train, throughput, accuracy, speed-up."""
    lines = [
        "| cards | Time2train (sec) | throughput (samples/sec) | accuracy (%) | speed-up |",
        "|---:|---:|---:|:---|---:|",
    ]
    for row in table_rows(result):
        if row.kind == "reference":
            continue
        accuracy = f"box ap: {number_text(row.box_ap, 2)} mask ap: {number_text(row.mask_ap, 2)}"
        if row.keypoint_ap is not None:
            accuracy += f" keypoint ap: {number_text(row.keypoint_ap, 2)}"
        lines.append(
            f"| {row.workers} | {number_text(row.time_to_train_seconds, 0)} | {number_text(row.images_per_second, 2)} "
            f"| {escape_markdown(accuracy)} | {number_text(row.speed_up, 2)} |"
        )
    return "\n".join(lines) + "\n"


def _line(moment: float, text: str) -> str:
    return f"AI-Rank-log {moment:.3f} {text}"


def _checksum(plan: Plan) -> str:
    """SHA-256 of the training set's annotation file: what was loaded."""
    annotations = Path(plan.train.annotations) if isinstance(plan, TrialPlan) else None
    return file_sha256(annotations) if annotations and annotations.is_file() else "unknown"


def _gib(value: float | None) -> str | None:
    return f"{value:.1f} GiB" if value is not None else None


def _known(name: str | None) -> str | None:
    return name if name and name != "unknown" else None
