"""Recognises an exhausted memory, which every library reports in words of its own, and names a batch that would fit."""

from __future__ import annotations

import errno
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainers.contract.plan import TrialPlan

_SAYS_SO = re.compile(
    r"""out\ of\ (shared\ )?memory | OutOfMemory | bad_alloc | ALLOC_FAILED | not\ enough\ memory
    | (can't|cannot|unable\ to|failed\ to)\ (allocate|mmap)(?!\ memory\ in\ static\ TLS)
    | could\ not\ (create|initialize)\ a\ (primitive|memory)(?!\ desc)""",
    re.IGNORECASE | re.VERBOSE,
)
"""As in torch's allocators, cuDNN and cuBLAS, C++, numpy, OpenCV, the loader, and oneDNN."""

_LOADER_LOST = re.compile(r"DataLoader worker \(.*\) (is killed by signal: Killed|exited unexpectedly)")
"""As torch says it; the second form where no main thread waits for the loader's processes."""

_REQUESTED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMG]iB)")
"""As torch says it, on GPU and CPU."""

_BYTES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or what caused it, says that there was no memory left."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or _SAYS_SO.search(str(error)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes the kernel has killed so far for lack of memory; None where nothing counts them.

    Counted for the control group that this process is in (in cgroup v2 with those below it), else for the machine.

    Args:
        root: Where `proc` and `sys` are.
    """
    groups = root / "sys/fs/cgroup"
    files = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                mounted, name = (groups / "memory", "memory.oom_control") if controllers else (groups, "memory.events")
                folder = mounted / path.lstrip("/")
                # In a container, the path may be the host's: then only its own group is to be seen, as the uppermost.
                seen = [each for each in (folder, *folder.parents) if each.is_relative_to(mounted)]
                files += [each / name for each in seen]
    for file in [*files, root / "proc/vmstat"]:
        with suppress(OSError):
            if counted := re.search(r"^oom_kill (\d+)$", file.read_text(encoding="ascii"), re.MULTILINE):
                return int(counted[1])
    return None


def oom_kills_text(before: int | None, now: int | None) -> str:
    """Says that the kernel killed processes between two counts by `oom_kills`; "" where it did not, as far as known."""
    if before is None or now is None or now <= before:
        return ""
    number = "a process" if now == before + 1 else f"{now - before} processes"
    return f"since it started, the kernel has killed {number} on its node for lack of memory (its count oom_kill)"


def lost_loader_text(error: BaseException, before: int | None) -> str:
    """`oom_kills_text` since a count, for an exception by which torch says that a loader process is gone; else ""."""
    return oom_kills_text(before, oom_kills()) if _LOADER_LOST.search(str(error)) else ""


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
