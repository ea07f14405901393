"""Measures two ways of doing the same work against each other, and formats the table.

A machine's speed drifts, so both sides run in turns (`benchmarks.turns` lets trainings take turns step by step), the
ratio is taken between neighbours, and the table shows the median of these ratios with the smallest and the greatest.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "sal-detectron2", "detectron2", "pycocotools", "hotcoco", "numpy",
            "opencv-python-headless", "pillow", "ray", "mlflow")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    """Name for `--only`."""
    against: str
    """The peer's work."""
    unit: str
    """Unit of the two sides' figures."""
    ours: tuple[float, ...]
    """This program's figures, in the order they were taken."""
    peer: tuple[float, ...]
    """The peer's figures, each taken next to ours."""
    target: float | None
    """Smallest ratio that is good enough; None for a row that is only reported."""
    higher_is_better: bool
    """Whether the figures are rates; else they are durations."""
    note: str = ""
    """What a reader must know to understand the row."""

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as the peer, for each pair of neighbours."""
        pairs = zip(self.ours, self.peer, strict=True)
        return [ours / peer if self.higher_is_better else peer / ours for ours, peer in pairs]

    @property
    def ratio(self) -> float:
        """Median of `ratios`."""
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool | None:
        """Whether the target is met; None without a target."""
        return None if self.target is None else self.ratio >= self.target

    @property
    def target_text(self) -> str:
        """The target for a person."""
        return "–" if self.target is None else f"{self.target:g}"

    def to_dict(self) -> dict[str, Any]:
        """The row with its ratio, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "ratios": self.ratios, "reached": self.reached}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(ours: Callable[[], float], peer: Callable[[], float], repeats: int) -> tuple[list[float], list[float]]:
    """Measures one side, then the other, `repeats` times."""
    pairs = [(ours(), peer()) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def by_blocks(
    ours: Sequence[float], peer: Sequence[float], images: int, blocks: int = 5
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Images per second in equal blocks of steps.

    Args:
        ours: Seconds of this program's steps.
        peer: Seconds of the peer's steps, each taken next to ours.
        images: Images of a step.
        blocks: Number of blocks; steps that are left over at the end do not count.
    """
    each = min(len(ours), len(peer)) // blocks
    cuts = [slice(i * each, (i + 1) * each) for i in range(blocks)]
    found, theirs = (tuple(images * each / sum(side[cut]) for cut in cuts) for side in (ours, peer))
    return found, theirs


def timed(
    name: str,
    against: str,
    target: float,
    ours: Callable[[], object],
    peer: Callable[[], object],
    repeats: int = 5,
    note: str = "",
) -> Row:
    """A row of durations: each side is called once to warm up, then both in turns."""
    ours(), peer()
    found, theirs = alternate(lambda: seconds(ours), lambda: seconds(peer), repeats)
    return Row(name, against, "s", tuple(found), tuple(theirs), target, higher_is_better=False, note=note)


_VERDICTS = {True: "reached", False: "**below**", None: ""}


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| row | against | ours | peer | ratio | spread | target | |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        low, high = min(row.ratios), max(row.ratios)
        ours, peer = statistics.median(row.ours), statistics.median(row.peer)
        lines.append(
            f"| {row.name} | {row.against} | {ours:.4g} {row.unit} | {peer:.4g} {row.unit} | {row.ratio:.2f} "
            f"| {low:.2f} – {high:.2f} | {row.target_text} | {_VERDICTS[row.reached]} |"
        )
    notes = [f"{row.name}: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def report(rows: list[Row], measured_on: dict[str, Any]) -> str:
    """A result file in Markdown: the machine, the versions, the table.

    Args:
        rows: The rows.
        measured_on: From `machine`.
    """
    versions = ", ".join(f"{package} {number}" for package, number in measured_on["versions"].items())
    return (
        f"# {measured_on['time']}\n\n"
        f"- Processor: {measured_on['processor']}, {measured_on['cpus']} CPUs, load average "
        f"{measured_on['load_average']:.1f} at the end\n"
        f"- System: {measured_on['system']}, Python {measured_on['python']}\n"
        f"- Versions: {versions}\n\n"
        f"{table(rows)}\n"
    )


def machine() -> dict[str, Any]:
    """The machine and the versions that figures are taken with."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": model,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()) + " UTC",
    }
