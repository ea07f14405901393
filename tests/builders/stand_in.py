"""Workers whose computation is a stand-in, a sleep: as many independent machines as hosts, whatever cores there are.

What is real: processes on hosts of their own, gloo over links of a limited rate, clocks, and waiting for each other.
What is not: nothing is computed, so nothing is said of processors, memory or storage that workers share.

As a program it is one worker. It takes part in groups of several sizes in turn, a few steps each, so that whatever else
the machine does disturbs all sizes alike, and writes its steps as events.
"""

from __future__ import annotations

import math
import random
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from orchestrator.figures.trial import trial_result
from orchestrator.runlog.folder import TrialEvents
from tests.builders.hosts import SHARED, Host
from tests.builders.trials import TrialBuilder, plan
from trainers.contract.events import StepsDone, event_from_json

SIZES = (1, 2, 4)
BATCH = 2
"""Images of a worker."""

STEPS_OF_A_TURN, NUM_TURNS, WARMUP_STEPS = 10, 5, 10
GRADIENT_BYTES = 2**20
LINK = "rate 200mbit burst 64kb latency 100ms"
"""Of tc's token bucket filter: a gradient takes some 40 ms, against steps of some 200 ms."""

OWN_SECONDS, OWN_SPREAD, DATA_SECONDS = 0.15, 0.15, 0.01
"""Median computation and the spread of its logarithm, and the wait for data in it."""

PORT = 29411


def run_workers(hosts: list[Host], folder: Path) -> dict[int, TrialEvents]:
    """Runs a worker on each of four hosts to its end; returns the trial of each size.

    Args:
        hosts: The hosts, which share a folder.
        folder: That folder, as this machine sees it.
    """
    for host in hosts:
        host.check(f"tc qdisc add dev eth0 root tbf {LINK}")
    module = f"-m tests.builders.stand_in {hosts[0].address}"
    started = [
        host.start(f"cd {Path(__file__).parents[2]} && python {module} {rank}", folder / f"worker{rank}.log")
        for rank, host in enumerate(hosts)
    ]
    for rank, process in enumerate(started):
        assert process.wait(timeout=600) == 0, (folder / f"worker{rank}.log").read_text()
    return {size: _trial(size, folder) for size in SIZES}


def _trial(size: int, folder: Path) -> TrialEvents:
    """The trial of one size, from the events of its workers."""
    made = TrialBuilder(
        plan(
            name=f"stand-in-{size}", world_size=size, global_batch_size=BATCH * size, scaling="weak",
            throughput_warmup_iters=WARMUP_STEPS, max_iter=STEPS_OF_A_TURN * NUM_TURNS,
        )
    )  # fmt: skip
    made.started()
    made.workers(1.0)
    made.loop(2.0)
    for rank in range(size):
        lines = (folder / f"steps-{size}-{rank}.jsonl").read_text().splitlines()
        made.events += [replace(event_from_json(line), trial=made.trial.name) for line in lines]
    made.finished(3.0, made.trial.solver.max_iter)
    made.ended(4.0)
    result = trial_result(made.trial, made.events)
    return TrialEvents(made.trial.name, result, made.events, made.trial, folder)


def work(address: str, rank: int) -> None:
    """One worker: its steps in the groups of all sizes that it belongs to, in turn."""
    import torch
    import torch.distributed as dist

    everything = f"tcp://{address}:{PORT}"
    dist.init_process_group("gloo", everything, timedelta(seconds=300), world_size=max(SIZES), rank=rank)
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    chance = random.Random(rank)  # noqa: S311 - nothing secret is drawn
    gradients = torch.zeros(GRADIENT_BYTES // 4)
    for turn in range(NUM_TURNS):
        for size, group in groups.items():
            dist.barrier()
            if rank >= size:
                continue
            steps: list[tuple[float, float]] = []
            for _ in range(STEPS_OF_A_TURN):
                started = time.perf_counter()
                time.sleep(DATA_SECONDS + OWN_SECONDS * math.exp(chance.gauss(0, OWN_SPREAD)))
                ready = time.perf_counter()
                if size > 1:
                    dist.all_reduce(gradients, group=group)
                steps.append((time.perf_counter() - started, time.perf_counter() - ready))
            _write(size, rank, turn, steps)
    dist.destroy_process_group()


def _write(size: int, rank: int, turn: int, steps: list[tuple[float, float]]) -> None:
    whole, waits = (tuple(values) for values in zip(*steps, strict=True))
    data = (DATA_SECONDS,) * len(steps)
    parts = {"data": sum(data), **({"communication": sum(waits)} if size > 1 else {})}
    event = StepsDone(
        trial="", attempt=0, rank=rank, time=2.5, first_iteration=turn * len(steps), iteration=(turn + 1) * len(steps),
        num_images=BATCH * len(steps), seconds=sum(whole), step_seconds=whole, data_seconds=data, part_seconds=parts,
        step_part_seconds={"communication": waits} if size > 1 else {}, losses={}, learning_rate=None,
        peak_memory_gib=None,
    )  # fmt: skip
    with (Path(SHARED) / f"steps-{size}-{rank}.jsonl").open("a", encoding="utf-8") as file:
        file.write(event.to_json() + "\n")


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
