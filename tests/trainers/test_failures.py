"""Ranks that fail together end together."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.builders.ranks import spawn_ranks
from trainers.failures import ending_together
from trainers.loop import NotFiniteError


def _fail(error: Exception) -> None:
    with suppress(type(error)), ending_together():
        raise error


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=600)
    )
    said = Path(folder, "said")
    if rank == 0:
        _fail(RuntimeError("of one rank alone"))
        assert not said.exists(), "it waited"
    else:
        time.sleep(1)
        said.touch()
    _fail(NotFiniteError("of all"))
    assert said.exists()
    if rank == 0:
        dist.destroy_process_group()
    else:
        _fail(NotFiniteError("the other one is gone"))


def test_a_rank_whose_loss_is_not_finite_waits_until_all_have_said_why(tmp_path: Path) -> None:
    spawn_ranks(_rank, str(tmp_path))
