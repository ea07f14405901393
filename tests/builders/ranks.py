"""Two ranks in processes of their own, without Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch.multiprocessing as mp


def spawn_ranks(run_rank: Callable[..., None], *arguments: object) -> None:
    """Calls `run_rank(rank, *arguments)` in two new processes, and waits for both.

    Raises:
        mp.ProcessRaisedException: One of them raised.
        mp.ProcessExitedException: One of them was killed.
    """
    mp.spawn(_run, args=(run_rank, arguments), nprocs=2)


def _run(rank: int, run_rank: Callable[..., None], arguments: tuple[object, ...]) -> None:
    run_rank(rank, *arguments)
    # The interpreter does not end: up to Python 3.13 it ends threads that ask for it then, which can abort gloo's.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
