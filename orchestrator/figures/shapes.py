"""Figures of the shapes of training batches: how many there are, what they cost, and what was trained without them."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from trainers.contract.events import StepsDone

NOT_EAGER = ("warm-up", "batch not padded")
"""Reasons for no CUDA graph that are none of their own: every graph begins so; the batch has a reason."""


def shape_figures(steps: Sequence[StepsDone]) -> dict[str, Any]:
    """The fields of a trial's record on the shapes of its batches, from the windows of all ranks and attempts."""
    noted = [e for e in steps if e.new_shapes is not None]
    pixels = sum(e.pixels or 0 for e in noted)
    asked = sum((e.iteration - e.first_iteration) * e.batches_per_step for e in steps if e.eager_batches is not None)
    eager: Counter[str] = Counter()
    captures: dict[int, float] = defaultdict(float)
    for event in steps:
        if event.capture_seconds is not None:
            captures[event.rank] += event.capture_seconds
        eager.update(event.eager_batches or {})
        eager.update({reason: count for reason, count in event.eager_steps.items() if reason not in NOT_EAGER})
    return {
        "num_shapes": len({shape for e in noted for shape in e.new_shapes or ()}) if noted else None,
        "new_shape_seconds": _new_shape_seconds(noted),
        "num_graphs": max((e.num_graphs for e in steps if e.num_graphs is not None), default=None),
        "capture_seconds": max(captures.values(), default=None),
        "wasted_pixel_share": sum(e.wasted_pixels or 0 for e in noted) / pixels if pixels else None,
        "eager_step_share": eager.total() / asked if asked else None,
        "eager_steps": dict(eager.most_common()),
    }


def _new_shape_seconds(steps: Sequence[StepsDone]) -> float | None:
    """What steps with a new shape, and captures, took above the median step of their rank; of the slowest rank."""
    windows: dict[int, list[StepsDone]] = defaultdict(list)
    for event in steps:
        if event.step_seconds:
            windows[event.rank].append(event)
    seconds = []
    for events in windows.values():
        median = statistics.median(each for e in events for each in e.step_seconds)
        new = (e.step_seconds[number] - median for e in events for number in (e.new_shapes or {}).values())
        seconds.append(sum(max(0.0, each) for each in new) + sum(e.capture_seconds or 0.0 for e in events))
    return max(seconds, default=None)
