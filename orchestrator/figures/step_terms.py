"""The terms that the time of a step is made of over the number of workers, and their fit by least squares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations


def terms_at(num_workers: int, share: float) -> dict[str, float]:
    """The terms of a step by whole numbers of workers, each to be multiplied by its seconds.

    `computation` goes with the images of a worker (Amdahl's law, 1967), `serial` is the same at every size, and
    `communication` grows with the rounds of a tree all-reduce, log2(N). A ring's (N - 1) / N is no term of a whole
    step: it is 1 - 1 / N, which the others make by themselves. Of communication that was measured apart it is one
    (`ring_term`).

    Args:
        num_workers: N.
        share: Images of a worker in a step, in any unit that is the same at all sizes.
    """
    return {"computation": share, "serial": 1.0, "communication": math.log2(num_workers)}


def ring_term(num_workers: int) -> float:
    """What each worker of a ring all-reduce sends, in parts of the gradients: 2 (N - 1) / N."""
    return 2 * (num_workers - 1) / num_workers


def fit_terms(points: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> dict[str, float]:
    """Least squares of relative errors by the first term and as many more as the points allow, none negative.

    Args:
        points: The terms at each measured point, in the order in which they are preferred where too few points separate
            them.
        seconds: The step, or part of it, that was measured at each point; all positive.

    Returns:
        Seconds by term; with fewer points than terms, a term that they cannot separate is left out.
    """
    from scipy.optimize import nnls

    first, *others = points[0]
    solutions = []
    for chosen in combinations(others, min(len(others), len(points) - 1)):
        names = (first, *chosen)
        rows = [[point[name] / each for name in names] for point, each in zip(points, seconds, strict=True)]
        found, residual = nnls(rows, [1.0] * len(rows))
        solutions.append((round(float(residual), 9), dict(zip(names, map(float, found), strict=True))))
    best = min(solutions, key=lambda solution: solution[0])[1]  # the first of equals
    if len(points) > len(others):
        return best
    return {name: value for name, value in best.items() if value or name == first}
