"""What a soak came to: a row for each run, and all of them as Markdown."""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from tests.builders.chaos_checks import Control, broken, trial_of
from tests.builders.chaos_faults import Fired
from tests.builders.chaos_run import ChaosRun

HEADER = """| seed | workers | faults: kind rank@second | codes | restarts | recovery, s | goodput | run, s | verdict |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Disturbed:
    """A run that has ended, and the faults that it met."""

    run: ChaosRun
    faults: list[Fired]
    seconds: float


@dataclass(frozen=True)
class Row:
    """What one seed came to."""

    seed: int
    workers: int
    faults: list[str]
    kinds: list[str]
    codes: list[int]
    restarts: list[str]
    recovery_seconds: list[float]
    useful_seconds: float
    """Of steps whose result was kept."""
    startup_seconds: float
    """From the start of the trial to its first batch."""
    wall_seconds: float
    """Of the trial, stops included."""
    run_seconds: float
    """Of the commands, the checks before and the report after the trial included."""
    problems: list[str]

    def __str__(self) -> str:
        values = (
            self.seed,
            self.workers,
            ", ".join(self.faults) or "none",
            ", ".join(map(str, self.codes)),
            ", ".join(self.restarts) or "–",
            ", ".join(f"{each:.0f}" for each in self.recovery_seconds) or "–",
            f"{self.useful_seconds / self.wall_seconds:.0%}" if self.wall_seconds else "–",
            f"{self.run_seconds:.0f}",
            "; ".join(self.problems) or "held",
        )
        return f"| {' | '.join(str(value).replace('|', '/') for value in values)} |"


def row(seed: int, ended: Disturbed, control: Control) -> Row:
    """What one seed came to, and what did not hold."""
    run, faults = ended.run, ended.faults
    trial = trial_of(run) if (run.run_dir / "results.json").exists() else None
    where = trial.sections if trial else None
    return Row(
        seed=seed,
        workers=run.world_size,
        faults=[f"{f.name}{'' if f.rank is None else f' {f.rank}'}@{f.seconds:.0f}" for f in faults],
        kinds=[fault.name for fault in faults],
        codes=run.codes,
        restarts=[restart.cause for restart in trial.restarts] if trial else [],
        recovery_seconds=[r.recovery_seconds for r in trial.restarts if r.recovery_seconds] if trial else [],
        useful_seconds=(trial.goodput or 0.0) * where.wall if trial and where else 0.0,
        startup_seconds=where.startup if where else 0.0,
        # A clock that was set ahead, and then a new driver: the record cannot know how long there was none.
        wall_seconds=min(where.wall, ended.seconds) if where else 0.0,
        run_seconds=ended.seconds,
        problems=broken(run, faults, control),
    )


def summary(rows: list[Row], options: argparse.Namespace) -> str:
    """All seeds as Markdown, for `benchmarks/results`."""
    held = sum(not row.problems for row in rows)
    kinds = Counter(kind for row in rows for kind in row.kinds)
    recoveries = sorted(seconds for row in rows for seconds in row.recovery_seconds)
    hours = sum(row.run_seconds for row in rows) / 3600
    wall, useful = (sum(getattr(row, f"{name}_seconds") for row in rows) for name in ("wall", "useful"))
    startup = sum(row.startup_seconds for row in rows)
    lines = [
        f"# {datetime.now(UTC):%Y-%m-%d}, `make chaos SEEDS={len(rows)}`",
        "",
        f"A mean time between failures of {options.mtbf:g} s while workers train, {options.iterations} iterations a "
        f"run, {hours:.1f} hours. {held} of {len(rows)} seeds held all invariants. {sum(kinds.values())} faults: "
        + (", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()) or "none")
        + ".",
        f"Goodput: {goodput(rows):.1%} once training had begun ({useful:.0f} s of {wall - startup:.0f} s), "
        f"{useful / wall if wall else 0:.1%} with the first start of every run ({wall:.0f} s).",
    ]
    if recoveries:
        lines.append(
            f"Recovery, from the failure to the end of the next step, {len(recoveries)} times: median "
            f"{statistics.median(recoveries):.1f} s, worst {recoveries[-1]:.1f} s."
        )
    return "\n".join([*lines, "", HEADER, *map(str, rows), ""])


def goodput(rows: list[Row]) -> float:
    """Useful seconds of all runs over those since their first batch.

    A run of a minute says nothing about how often one of days is started for the first time.
    """
    wall = sum(row.wall_seconds - row.startup_seconds for row in rows)
    return sum(row.useful_seconds for row in rows) / wall if wall else 0.0
