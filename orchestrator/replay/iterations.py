"""Finds after how many iterations each evaluation of a log took place, which the log does not say.

detectron2 evaluates before it prints the progress line of the same iteration, so that the line before an evaluation
names an earlier one; some trainers do it the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from orchestrator.replay.evaluations import LoggedEvaluation
from orchestrator.replay.launches import Launch

LOG_PERIOD = 20
"""Iterations between detectron2's progress lines."""

Gap = tuple[int, int | None]
"""Iterations of the progress lines around evaluations; None after the last."""


def evaluation_iterations(launch: Launch) -> tuple[list[int], list[str]]:
    """Iterations trained at each evaluation of a launch, and notes on those that are not certain."""
    known = [e.iteration for e in launch.evaluations if e.iteration is not None]
    if len(known) == len(launch.evaluations):
        return known, []
    rounds = _rounds(launch.evaluations)
    lines = [launch.first_iteration or 0, *(line.iteration for line in launch.progress)]
    gaps: list[Gap] = [*pairwise(lines), (lines[-1], None)]
    period, last = launch.integer("TEST.EVAL_PERIOD"), launch.integer("SOLVER.MAX_ITER")
    groups = [[one for one in rounds if one[0].after_iteration == gap[0]] for gap in gaps]
    # Before the first line of a log that lacks its beginning, anything may have happened.
    whole = list(zip(gaps, groups, strict=True))[launch.first_iteration is None : -1]
    late = not _fits(whole, period, last, late=False) and _fits(whole, period, last, late=True)
    found: dict[int, int] = {}
    notes: list[str] = []
    for gap, group in zip(gaps, groups, strict=True):
        training = [one for one in group if not one[0].after_training]
        numbers = _numbers(gap, len(training), period, last, late=late)
        if numbers is None:
            width = LOG_PERIOD if gap[1] is None else gap[1] - gap[0]
            notes.append(f"an evaluation's iteration is known to {width} iterations only")
            numbers = [gap[0] if gap[1] is None else gap[1]] * len(training)
        numbers += [gap[0]] * (len(group) - len(training))
        found.update({id(e): number for one, number in zip(group, numbers, strict=True) for e in one})
    return [found[id(evaluation)] for evaluation in launch.evaluations], notes


def _rounds(evaluations: Sequence[LoggedEvaluation]) -> list[list[LoggedEvaluation]]:
    """The evaluations by their time: one for each data set, where there are several."""
    rounds: list[list[LoggedEvaluation]] = []
    for evaluation in evaluations:
        current = rounds[-1] if rounds else []
        same_time = current and current[0].after_iteration == evaluation.after_iteration
        if same_time and evaluation.dataset and all(e.dataset not in (None, evaluation.dataset) for e in current):
            current.append(evaluation)
        else:
            rounds.append([evaluation])
    return rounds


def _due(gap: tuple[int, int], period: int, *, late: bool) -> list[int]:
    """Iterations at which an evaluation is due between two lines: that of the second is, unless they come `late`."""
    start, end = gap
    multiples = range(-(-start // period) * period, end + 1, period)
    return [i for i in multiples if (0 < i < end if late else i > start)]


def _fits(groups: Sequence[tuple[Gap, Sequence[object]]], period: int | None, last: int | None, *, late: bool) -> bool:
    """Whether there are as many evaluations between all lines as are due there."""
    if not period:
        return True
    for (start, end), group in groups:
        if end is None:
            continue
        due = _due((start, end), period, late=late)
        # At the end of training, newer versions evaluate after the last line only.
        if len(group) != len(due) and not (end == last and len(group) == len([i for i in due if i != last])):
            return False
    return True


def _numbers(gap: Gap, count: int, period: int | None, last: int | None, *, late: bool) -> list[int] | None:
    """Iterations of `count` evaluations in a gap; None where they are not certain."""
    start, end = gap
    if not count:
        return []
    if end is None:
        due = _due((start, start + LOG_PERIOD), period, late=late) if period else []
        return [start] * count if start == last else due[:count] if len(due) >= count else None
    if not period:
        return [end] if period == 0 and end == last and count == 1 else None
    for order in (late, not late):
        due = _due((start, end), period, late=order)
        if len(due) == count:
            return due
    return None
