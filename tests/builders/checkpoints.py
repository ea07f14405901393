"""A store of checkpoints whose states differ by their iteration."""

from __future__ import annotations

from pathlib import Path

import torch

from trainers.checkpoints import CheckpointStore


def state(iteration: int, size: int = 64) -> dict[str, object]:
    return {"model": {"w": torch.full((size,), float(iteration))}, "iteration": iteration}


def store(folder: Path | str, keep: int = 2, attempt: int = 0, **options: object) -> CheckpointStore:
    return CheckpointStore(str(folder), keep, attempt, options.pop("on_saved", lambda **saved: None), **options)  # type: ignore[arg-type]


def save(target: CheckpointStore, *iterations: int, scores: dict[int, float] | None = None) -> None:
    for iteration in iterations:
        target.save(iteration, state(iteration), (scores or {}).get(iteration))
    target.wait()


def newest(folder: Path | str) -> int | None:
    found = store(folder).load_newest()
    assert found is None or found[0]["model"]["w"][0] == found[0]["iteration"]
    return found[0]["iteration"] if found else None
