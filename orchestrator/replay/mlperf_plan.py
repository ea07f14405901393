"""Reads the settings of a run, and what it ran on, from an MLPerf log and its place in a submission."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from orchestrator.figures.logged_plan import LoggedDataset, LoggedPlan, LoggedSolver
from orchestrator.replay.mllog import MllogRun, description_file, finite, system_name
from orchestrator.replay.trial import COCO_TARGETS, Targets

_WORKERS = re.compile(r"^(\d+) x (.+)$")
"""A platform as this program writes it: `8 x NVIDIA V100`; others count nodes there (`1xNVIDIA DGX A100`)."""


@dataclass(frozen=True, slots=True)
class System:
    """What a run ran on."""

    num_accelerators: int | None = None
    num_nodes: int | None = None
    accelerator: str = ""
    """Model name; empty where it is not known."""


def mlperf_plan(run: MllogRun, name: str, targets: Targets | None) -> LoggedPlan:
    """The settings that a run's log prints; what it does not print is None."""
    values, system, division = run.values, system_of(run), run.values.get("submission_division")
    if targets is None:
        targets = Targets(*COCO_TARGETS) if division == "closed" else Targets(None, None)
    decays = values.get("opt_learning_rate_decay_steps")
    return LoggedPlan(
        name=name,
        source=str(run.source.absolute()),
        world_size=system.num_accelerators or 1,
        num_nodes=system.num_nodes,
        recipe_name=" ".join(filter(None, (_platform(run), system_name(run.source)))),
        precision=None,
        seed=_integer(values.get("seed")),
        scaling="weak",
        protocol="time_to_train",
        weights=None,
        train=LoggedDataset("coco_2017_train" if division == "closed" else None),
        val=LoggedDataset("coco_2017_val" if division == "closed" else None),
        solver=LoggedSolver(
            global_batch_size=count(values.get("global_batch_size")),
            base_lr=finite(values.get("opt_base_learning_rate")),
            max_iter=None,
            steps=tuple(map(int, filter(None, map(finite, decays)))) if isinstance(decays, list) else None,
            warmup_iters=_integer(values.get("opt_learning_rate_warmup_steps")),
            eval_period=None,
            checkpoint_period=None,
        ),
        throughput_warmup_iters=0,
        target_box_ap=targets.box,
        target_mask_ap=targets.mask,
        device="cuda" if re.search("NVIDIA|Tesla", system.accelerator) else None,
    )


def system_of(run: MllogRun) -> System:
    """What a run ran on: by the submission's description of the system where its folder is there, else by the log."""
    if file := description_file(run.source):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            nodes, each = int(found["number_of_nodes"]), int(found["accelerators_per_node"])
            return System(nodes * each, nodes, str(found["accelerator_model_name"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a file that somebody copied out of its submission
    if own := _WORKERS.match(str(run.values.get("submission_platform", ""))):
        return System(int(own[1]), accelerator=own[2])
    batch, each_batch = (finite(run.values.get(key)) for key in ("global_batch_size", "d_batch_size"))
    number = max(run.num_processes, round(batch / each_batch) if batch and each_batch else 0)
    return System(number if number > 1 else None)


def count(value: Any) -> int | None:
    """A number of things, of which there is at least one."""
    number = _integer(value)
    return number if number is not None and number > 0 else None


def _platform(run: MllogRun) -> str:
    """Its submitter and platform, without the number of workers in front of it."""
    platform = str(run.values.get("submission_platform", ""))
    own = _WORKERS.match(platform)
    return own[2] if own else " ".join(filter(None, (str(run.values.get("submission_org", "")), platform)))


def _integer(value: Any) -> int | None:
    number = finite(value)
    return None if number is None else int(number)
