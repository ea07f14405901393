"""Recognises an exhausted memory, which every library reports in words of its own, and names a batch that would fit."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from trainers.contract.plan import TrialPlan

_SAYS_SO = re.compile(
    r"""out\ of\ (shared\ )?memory | OutOfMemory | bad_alloc | ALLOC_FAILED | not\ enough\ memory
    | (can't|cannot|unable\ to|failed\ to)\ (allocate|mmap)(?!\ memory\ in\ static\ TLS)
    | could\ not\ (create|initialize)\ a\ (primitive|memory)(?!\ desc)""",
    re.IGNORECASE | re.VERBOSE,
)
"""As in torch's allocators, cuDNN and cuBLAS, C++, numpy, OpenCV, the loader, and oneDNN."""

_REQUESTED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMG]iB)")
"""As torch says it, on GPU and CPU."""

_BYTES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or what caused it, says that there was no memory left."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or _SAYS_SO.search(str(error)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process: on its GPU, else of the machine, as far as it is limited there; all in bytes."""

    used: float
    peak: float
    """Most that has been used so far."""
    limit: float
    """Most that can be used."""


def fitting_batch(batch: int, before: Memory, weights: float, failed: Memory, message: str) -> int | None:
    """The largest batch per worker that would have fitted, 0 for none; None where that cannot be computed.

    Args:
        batch: Images per worker of the step that failed after its forward pass, when all of them take their memory.
        before: Memory before the first step of the process.
        weights: Bytes of the weights that are trained. A first step also makes their gradients and momentum.
        failed: Memory when it failed.
        message: What the allocator said; the excess is known only where it says what it was asked for.
    """
    asked = _REQUESTED.search(message)
    if asked is None:
        return None
    images = failed.peak + float(asked[1]) * _BYTES[asked[2]] - before.used
    room = failed.limit - before.used - 2 * weights
    if images <= 0 or room >= images:  # the limit that was met is another one
        return None
    return max(0, min(int(room / (images / batch)), batch - 1))


def batch_hint(plan: TrialPlan, fitting: int | None) -> str:
    """The end of a message about a step of a plan that ran out of memory; `fitting` as from `fitting_batch`."""
    if plan.batch_per_worker == 1 or fitting == 0:
        return "; not even one image fits: make INPUT.MIN_SIZE_TRAIN or the model smaller"
    batch = fitting or plan.batch_per_worker // 2
    setting = f"trials.batch_per_worker: {batch}"
    if plan.scaling == "strong":
        setting = f"model.overrides.SOLVER.IMS_PER_BATCH: {batch * plan.world_size * plan.batches_per_step}"
    images = plan.batch_per_worker
    parts = next(number for number in range(1, images + 1) if images % number == 0 and images // number <= batch)
    advice = f"{batch} images would fit" if fitting else f"try {batch} images"
    same = f"{images // parts} with trials.accumulate: {parts * plan.accumulate} make the same step"
    return f"; {advice} per worker instead of {images} ({setting}; {same})"
