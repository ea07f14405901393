"""How often a checkpoint is worth its cost, given how often training fails. Standard library only."""

from __future__ import annotations

import math

NODE_FAILURES_PER_DAY = 6.5e-3
"""Failures of one node: 6.50 per 1,000 node-days, as Meta measured on its cluster of 16,000 A100 GPUs (RSC-1; 2.34 on
RSC-2; Kokolis et al. 2025, "Revisiting Reliability in Large-Scale Machine Learning Research Clusters",
arXiv:2410.21680). The higher rate: too many checkpoints cost less than too few."""


def default_mtbf_seconds(num_nodes: int) -> float:
    """Mean time between failures of a trial on so many nodes before it has had one: any node's failure ends it."""
    return 86_400 / (NODE_FAILURES_PER_DAY * num_nodes)


def advised_checkpoint_seconds(stall_seconds: float, mtbf_seconds: float) -> float:
    """Training time between checkpoints that loses the least in all: sqrt(2 * stall * MTBF).

    A checkpoint costs its stall each time, a failure half an interval on average. The first-order optimum of Young
    ("A first order approximation to the optimum checkpoint interval", 1974), which Daly's ("A higher order estimate of
    the optimum checkpoint interval for restart dumps", 2006) comes to where a stall is short against the MTBF.

    Args:
        stall_seconds: How long training is stalled for one checkpoint; writing that overlaps training is not in it.
        mtbf_seconds: Mean time between failures of the whole trial.
    """
    return math.sqrt(2 * stall_seconds * mtbf_seconds)
