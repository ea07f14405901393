"""Joins the windows of all ranks into one: what the progress display and the curves show.

The trap it protects against: rank 0's rate times the number of workers is not the rate of the cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainers import clock
from trainers.contract.events import StepsDone, WorkerStarted


@dataclass(frozen=True, slots=True)
class JointWindow:
    """The same steps on all ranks.

    Attributes:
        iteration: Iterations done at its end.
        time: When the last rank ended it (Unix seconds).
        images_per_second: Images of all ranks over the seconds of the slowest.
        losses: Mean over the window and the ranks.
        learning_rate: At its last step.
        step_seconds_p50: Median step of all ranks, in seconds; None where single steps are not known.
        step_seconds_p95: 95th percentile.
        data_seconds: Mean wait for data of a step, in seconds; None where not measured.
        peak_memory_gib: Most memory any rank used so far.
    """

    iteration: int
    time: float
    images_per_second: float
    losses: dict[str, float]
    learning_rate: float
    step_seconds_p50: float | None
    step_seconds_p95: float | None
    data_seconds: float | None
    peak_memory_gib: float


class WindowJoin:
    """Collects windows of one trial until every rank's has arrived.

    Args:
        world_size: Number of ranks, where an attempt's workers do not say otherwise.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._sizes: dict[int, int] = {}
        self._waiting: dict[tuple[int, int], dict[int, StepsDone]] = {}

    def expect(self, worker: WorkerStarted) -> None:
        """Takes from a worker how many ranks its attempt has."""
        self._sizes[worker.attempt] = worker.world_size or self._world_size

    def add(self, event: StepsDone) -> JointWindow | None:
        """Takes one rank's window; returns the joint one when it was the last of them."""
        ranks = self._waiting.setdefault((event.attempt, event.iteration), {})
        ranks[event.rank] = event
        if sum(window.num_ranks for window in ranks.values()) < self._sizes.get(event.attempt, self._world_size):
            return None
        del self._waiting[event.attempt, event.iteration]
        steps = [seconds for window in ranks.values() for seconds in window.step_seconds]
        data = [w for w in ranks.values() if "data" in w.part_seconds]
        waits = [w.part_seconds["data"] / (w.iteration - w.first_iteration) for w in data]
        return JointWindow(
            iteration=event.iteration,
            time=max(window.time for window in ranks.values()),
            images_per_second=sum(w.num_images for w in ranks.values()) / max(w.seconds for w in ranks.values()),
            losses=ranks[0].losses,
            learning_rate=ranks[0].learning_rate,
            step_seconds_p50=clock.quantile(steps, 0.5),
            step_seconds_p95=clock.quantile(steps, 0.95),
            data_seconds=sum(waits) / len(waits) if waits else None,
            peak_memory_gib=max(window.peak_memory_gib for window in ranks.values()),
        )
