"""Checks the keypoints of COCO annotations, and counts what a model of keypoints needs to know of them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.entries import NULL, REGENERATE, Annotation, Problem, SplitSummary, decoded, is_number, shorten
from orchestrator.findings import FindingList

VISIBILITIES = {0, 1, 2}
"""Not labelled, labelled and hidden, labelled and visible (cocodataset.org)."""


def check_keypoints(
    entries: list[Annotation],
    crowd: NDArray[np.bool_],
    summary: SplitSummary,
    findings: FindingList,
    *,
    for_scoring: bool,
) -> None:
    """Checks that keypoints are numbers, of known visibility, and somewhere if they are labelled; fills in `summary`.

    `crowd` says which of the entries are crowds, whose keypoints are not read.
    """
    num_points: Counter[int] = Counter()
    for entry, is_crowd in zip(entries, crowd.tolist(), strict=True):
        values: Any = None if entry.keypoints is NULL else decoded(entry.keypoints)
        place = f"annotation {entry.id}"
        if not values:
            num_points[0] += not is_crowd
        elif type(values) is not list or not all(map(is_number, values)):
            what = f"its keypoints are {shorten(values)}, not a list of numbers"
            findings.error("keypoints_entry", summary.annotations, place, what, REGENERATE)
        else:
            num_points[len(values) // 3] += not is_crowd
            is_broken = len(values) % 3 != 0
            if not is_broken and not is_crowd and (problem := _check_values(values, for_scoring=for_scoring)):
                findings.warning(problem.code, summary.annotations, place, problem.what, problem.hint)
                is_broken = for_scoring and problem.code == "keypoint_not_finite"
            summary.num_broken_keypoints += is_broken
    summary.objects_of_points = {number: count for number, count in sorted(num_points.items()) if count}


def _check_values(values: list[float], *, for_scoring: bool) -> Problem | None:
    if VISIBILITIES.issuperset(values[2::3]) and all(map(math.isfinite, values)):
        return None
    points = list(zip(values[::3], values[1::3], values[2::3], strict=True))
    for number, (x, y, visibility) in enumerate(points):
        if visibility > 0 and not (math.isfinite(x) and math.isfinite(y)):
            effect = "COCO's scorer would match it with anything" if for_scoring else "it is taken as not labelled"
            what = f"keypoint {number} is at {[x, y]}; {effect}"
            return Problem("keypoint_not_finite", what, "Write 0, 0, 0 for a keypoint that is not labelled")
    for number, (_, _, visibility) in enumerate(points):
        if visibility not in VISIBILITIES:
            effect = "labelled" if visibility > 0 else "not labelled"
            what = f"keypoint {number} has visibility {visibility}, not 0, 1 or 2; it is taken as {effect}"
            return Problem("keypoint_visibility", what, "Write 0 (not labelled), 1 (hidden) or 2 (visible)")
    return None
