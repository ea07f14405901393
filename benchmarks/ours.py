"""Runs this program's worker in a separate process without Ray and without a driver.

Also the entry point for torchrun, against which the launcher's overhead is measured:
`torchrun --nproc-per-node 2 -m benchmarks.ours PLAN.json EVENTS.jsonl`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import turns
from trainers.contract.channel import Channel, Placement
from trainers.contract.events import Event
from trainers.contract.plan import TrialPlan


def train_in_process(plan: TrialPlan, push: Callable[[Event], None], before_step: Callable[[], None]) -> None:
    """Trains a trial of one worker in this process, or one rank of it under torchrun.

    Args:
        plan: The trial.
        push: Called with every event.
        before_step: Called before every step.
    """
    entered = time.time()
    from trainers.rank import Rank

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    placement = Placement(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        host="localhost",
    )
    if plan.device == "cuda":
        torch.cuda.set_device(placement.local_rank)  # as Ray Train does before it calls a worker
    if world_size > 1:
        torch.distributed.init_process_group("nccl" if plan.device == "cuda" else "gloo")
    Path(plan.trial_dir).mkdir(parents=True, exist_ok=True)
    Rank(plan, 0, placement, Channel(push=push, beat=lambda _: "run"), before_step).train(entered)
    if world_size > 1:
        torch.distributed.destroy_process_group()


def main(plan_path: str, events_path: str) -> None:
    """Trains the plan of a JSON file and writes rank 0's events, a line each."""
    events: list[Event] = []
    plan = TrialPlan.from_dict(json.loads(Path(plan_path).read_text(encoding="utf-8")))
    train_in_process(plan, events.append, turns.waiting())
    if os.environ.get("RANK", "0") == "0":
        Path(events_path).write_text("".join(event.to_json() + "\n" for event in events), encoding="utf-8")


def write_plan(plan: TrialPlan, path: Path) -> None:
    """Writes a plan for `main`."""
    path.write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
