"""Which iterations of a trial were trained with how many workers, where it did not always run with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from orchestrator.figures.figure import rate_text
from orchestrator.figures.logged_plan import Plan
from orchestrator.figures.records import Segment
from orchestrator.figures.sections import LoopRun
from orchestrator.figures.steps import throughput
from trainers.contract.events import StepsDone


def segments(
    plan: Plan, runs: Sequence[LoopRun], sizes: Mapping[int, int], steps: Sequence[StepsDone]
) -> list[Segment]:
    """Cuts the iterations of a trial's final state where the number of workers changed.

    Args:
        plan: The trial as it was planned.
        runs: Its attempts that reached the training loop, in order.
        sizes: Attempt to its number of workers.
        steps: The windows of all ranks and attempts.

    Returns:
        Segments in order, each from the end of the one before; none where all attempts had the planned workers.
    """
    if all(sizes.get(run.attempt, plan.world_size) == plan.world_size for run in runs):
        return []
    # What is trained again later is not of the final state, but its windows were measured.
    firsts = [run.first_iteration for run in runs]
    done = [run.steps[-1].iteration if run.steps else run.first_iteration for run in runs]
    ends = [min([end, *firsts[number:]]) for number, end in enumerate(done, start=1)]
    kept = [(run, last) for run, last in zip(runs, ends, strict=True) if run.first_iteration < last]
    found = []
    for size, group in groupby(kept, lambda each: sizes.get(each[0].attempt, plan.world_size)):
        members = list(group)
        attempts = {run.attempt for run, _ in members}
        found.append(
            Segment(
                first_iteration=members[0][0].first_iteration,
                iteration=members[-1][1],
                world_size=size,
                global_batch_size=plan.solver.global_batch_size,
                base_lr=plan.solver.base_lr,
                images_per_second=throughput(
                    [window for window in steps if window.attempt in attempts], plan.throughput_warmup_iters
                ),
            )
        )
    return found


def segments_text(found: Sequence[Segment]) -> str:
    """Segments in a line."""
    return "; ".join(
        f"{each.first_iteration:,} to {each.iteration:,}: {each.world_size} worker{'s' * (each.world_size > 1)}, "
        f"{rate_text(each.images_per_second)} images/s"
        for each in found
    )
