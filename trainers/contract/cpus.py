"""The CPUs that a process may use: on a batch system or in a container, often fewer than the machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> float:
    """CPUs that this process may use: by its affinity and by the quotas of its control groups (versions 1 and 2)."""
    limits = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    for folder in control_groups():
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            limits.append(float(quota.replace("max", "inf")) / float(period))
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            limits.append(float(quota) / float(period) if float(quota) > 0 else limits[0])
    return min(limits)


def num_usable_cpus() -> int:
    """Whole CPUs that this process may use, 1 at least."""
    return max(1, int(usable_cpus()))


def control_groups() -> Iterator[Path]:
    """The folders of the control groups for CPUs that this process is in, with those above, as far as it sees them."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            for root in (CGROUPS / controllers, CGROUPS / "cpu") if controllers else (CGROUPS, CGROUPS / "unified"):
                folder = root / path.lstrip("/")
                yield from (each for each in (folder, *folder.parents) if each.is_relative_to(root) and each.is_dir())


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
