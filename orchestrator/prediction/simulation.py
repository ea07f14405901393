"""SIMULATES what no calibration reaches: thousands of workers, the links between them, failures and checkpoints.

Nothing here was measured; every output that shows it says so, with its assumptions (`ASSUMPTIONS`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from orchestrator.experiment.prediction_file import SimulatedRun
from trainers.contract.checkpoint_interval import advised_checkpoint_seconds, default_mtbf_seconds

WORKERS_PER_HOST = 8
"""Accelerators of a host, for the number of hosts that may fail."""

BUCKET_BYTES = 25 * 2**20
"""DistributedDataParallel's bucket (`bucket_cap_mb`): the last one is exchanged when nothing is left to compute."""

NUM_RUNS = 200
"""Simulated trainings of which mean and interval are taken."""

SEED = 21
"""Of the failures: the same input gives the same output."""

MIN_RUNS, MAX_FAILURES = 20, 500_000
"""Fewer trainings are simulated where all of them together would have more failures than that."""

MIN_GOODPUT = 0.01
"""A training with less of it is one that never ends."""

Algorithm = Literal["ring", "tree"]

ASSUMPTIONS = (
    "SIMULATED: failures come at random (exponential, independent of what is trained), each costs the steps since the "
    "last checkpoint and a restart, which may fail, too; checkpoints come at the advised interval; a lost host is "
    "replaced at once",
    f"SIMULATED: the mean time between failures is that of {WORKERS_PER_HOST} workers to a host by "
    "`faults.mtbf_hours`, else 1,000 host-days over 6.5 failures (docs/faults.md); stall of a checkpoint and restart "
    "are the calibration's",
)
"""Behind every simulated training."""

LINK_ASSUMPTIONS = (
    "SIMULATED: all links are equal, as stated, and nobody else uses them; communication is hidden by the backward "
    "pass, except the last bucket and what is longer than it",
)
"""Behind simulated communication."""


@dataclass(frozen=True, slots=True)
class Links:
    """Links between workers as they are stated or were measured."""

    bytes_per_second: float
    """What a worker sends to another one."""
    latency_seconds: float
    """Of one message."""
    algorithm: Algorithm
    gradient_bytes: float
    """Of one exchange."""

    def __str__(self) -> str:
        """For a person."""
        rate, latency = self.bytes_per_second / 1e9, self.latency_seconds * 1e6
        return f"{self.algorithm}, {rate:.3g} GB/s, {latency:.3g} µs, {self.gradient_bytes / 1e6:.4g} MB of gradients"


def all_reduce_seconds(links: Links, world_size: int, num_bytes: float) -> float:
    """An all-reduce by the alpha-beta model, in closed form.

    Ring: 2 (N - 1) rounds of num_bytes / N (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for
    clusters of workstations"). Tree: log2(N) rounds up and down; as NCCL pipelines them, each round adds its latency,
    and the bytes pass a link twice.
    """
    if world_size == 1:
        return 0.0
    if links.algorithm == "ring":
        rounds, sent = 2 * (world_size - 1), 2 * (world_size - 1) / world_size * num_bytes
    else:
        rounds, sent = 2 * math.ceil(math.log2(world_size)), 2 * num_bytes
    return rounds * links.latency_seconds + sent / links.bytes_per_second


def exposed_seconds(links: Links, world_size: int, backward_seconds: float) -> float:
    """What the backward pass does not hide of an exchange: the last bucket, or what is longer than the pass."""
    whole = all_reduce_seconds(links, world_size, links.gradient_bytes)
    last = all_reduce_seconds(links, world_size, min(BUCKET_BYTES, links.gradient_bytes))
    return max(last, whole - backward_seconds)


def expected_wall_seconds(work: float, interval: float, checkpoint: float, restart: float, mtbf: float) -> float:
    """Daly's closed form of what a training takes, with exponential failures, all in seconds.

    "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006), eq. 13: a segment of an
    interval and its checkpoint is tried until it passes, and restarts may fail, too.
    """
    exponents = restart / mtbf, (interval + checkpoint) / mtbf
    if sum(exponents) > 700:  # beyond what a float holds
        return math.inf
    return mtbf * math.exp(exponents[0]) * math.expm1(exponents[1]) * work / interval


def simulated_walls(
    work: float, interval: float, checkpoint: float, restart: float, mtbf: float, num_runs: int = NUM_RUNS
) -> list[tuple[float, int]]:
    """Wall seconds and failures of so many trainings, drawn one failure after the other.

    Args:
        work: Seconds of steps; a last segment may be shorter than the interval.
        interval: Seconds of steps between checkpoints.
        checkpoint: Stall of each, seconds.
        restart: From a failure to the next step, seconds.
        mtbf: Mean time between failures of the whole training, seconds.
        num_runs: How many.
    """
    chance = np.random.default_rng(SEED)
    return [_simulated(chance, work, interval, checkpoint, restart, mtbf) for _ in range(num_runs)]


def _simulated(
    chance: np.random.Generator, work: float, interval: float, checkpoint: float, restart: float, mtbf: float
) -> tuple[float, int]:
    wall, done, failures, starting = 0.0, 0.0, 0, False
    until = float(chance.exponential(mtbf))
    """Until the next failure."""
    while done < work:
        # Whole segments that pass before the next failure are counted at once.
        segment = interval + checkpoint
        whole = 0 if starting else min(int(until // segment), int((work - done) // interval))
        if whole:
            wall, until, done = wall + whole * segment, until - whole * segment, done + whole * interval
            continue
        needed = restart if starting else min(interval, work - done) + checkpoint
        if needed <= until:
            wall, until = wall + needed, until - needed
            done, starting = (done if starting else done + interval), False
        else:
            wall, failures, starting = wall + until, failures + 1, True
            until = float(chance.exponential(mtbf))
    return wall, failures


def simulated_run(
    work: float, world_size: int, checkpoint: float, restart: float, mtbf_worker_hours: float | None
) -> SimulatedRun | None:
    """A training with failures and checkpoints at the advised interval.

    Args:
        work: Seconds of its steps.
        world_size: Workers.
        checkpoint: Stall of a checkpoint, seconds.
        restart: From a failure to the next step, seconds.
        mtbf_worker_hours: Mean time between failures of one worker with its share of a host; None for the default.

    Returns:
        None where a checkpoint costs nothing, so that no interval is best, or where it would hardly ever end.
    """
    hosts = math.ceil(world_size / WORKERS_PER_HOST)
    mtbf = mtbf_worker_hours * 3600 / world_size if mtbf_worker_hours else default_mtbf_seconds(hosts)
    advised = advised_checkpoint_seconds(checkpoint, mtbf)
    if advised <= 0:
        return None
    expected = expected_wall_seconds(work, advised, checkpoint, restart, mtbf)
    if expected > work / MIN_GOODPUT:
        return None
    num_runs = max(MIN_RUNS, min(NUM_RUNS, int(MAX_FAILURES * mtbf / expected)))
    runs = simulated_walls(work, advised, checkpoint, restart, mtbf, num_runs)
    walls = np.asarray([wall for wall, _ in runs])
    low, high = np.quantile(walls, (0.025, 0.975))
    return SimulatedRun(
        work_seconds=work,
        num_hosts=hosts,
        mtbf_seconds=mtbf,
        checkpoint_seconds=checkpoint,
        restart_seconds=restart,
        advised_checkpoint_seconds=advised,
        wall_seconds=float(walls.mean()),
        wall_seconds_low=float(low),
        wall_seconds_high=float(high),
        num_failures=float(np.mean([failures for _, failures in runs])),
        goodput=work / float(walls.mean()),
    )
