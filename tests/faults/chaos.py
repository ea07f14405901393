"""A soak: runs of the whole command with random faults, each compared with an undisturbed one: `make chaos SEEDS=20`.

Faults come at random moments, with a mean time between failures, from the catalogue of
`tests/builders/chaos_faults.py`: what can happen to workers, and to everything else that a run consists of. Exit code 1
when an invariant did not hold: the same weights bit for bit, the same AP, every metric row in MLflow exactly once, no
process and no file left, the right exit code, the right cause and rank in the record, and the goodput that
`--min-goodput` asks for.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tests.builders.chaos_checks import Control, broken, log_tail, trial_of
from tests.builders.chaos_faults import KINDS, NEEDS_SMALL_DISK, Fired, Kind, fits
from tests.builders.chaos_run import ChaosRun, soak_experiment
from tests.builders.mlflow_server import MlflowServer
from tests.builders.s3 import free_port

POLL_INTERVAL_SECONDS = 0.1

MAX_SECONDS = 1800.0
"""A run that has not ended by then has hung."""

MAX_STARTS = 30
"""A command that was started so often comes to no end."""

Schedule = Iterator[tuple[float, dict[str, Kind]]]
"""Seconds until the next fault, and kinds by name of which one is drawn that can happen then."""

HEADER = """| seed | faults: kind rank@second | exit codes | restarts | recovery, s | goodput | run, s | verdict |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    """What one seed came to."""

    seed: int
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
            ", ".join(self.faults) or "none",
            ", ".join(map(str, self.codes)),
            ", ".join(self.restarts) or "–",
            ", ".join(f"{each:.0f}" for each in self.recovery_seconds) or "–",
            f"{self.useful_seconds / self.wall_seconds:.0%}" if self.wall_seconds else "–",
            f"{self.run_seconds:.0f}",
            "; ".join(self.problems) or "held",
        )
        return f"| {' | '.join(str(value).replace('|', '/') for value in values)} |"


class Soak:
    """Runs commands, with faults and without, one after the other.

    Args:
        folder: For their files.
        disk: For their run folders.
        server: Where they are tracked.
        values: The experiment of a run of a name.
        busy: See `ChaosRun`.
    """

    def __init__(
        self, folder: Path, disk: Path, server: MlflowServer, values: Callable[[str], dict[str, Any]], *, busy: bool
    ) -> None:
        self.folder, self.disk, self.server, self.values, self.busy = folder, disk, server, values, busy

    def run(self, name: str, schedule: Schedule, chance: random.Random) -> Disturbed:
        """A run to its end.

        Args:
            name: Of the run.
            schedule: Of the faults; one that is due waits until the run is where any of its kinds can happen.
            chance: Of kinds, and of what the faults draw.
        """
        values = self.values(name)
        run, faults = ChaosRun(self.folder / name, self.disk, self.server, values, busy=self.busy), list[Fired]()
        began = last = time.monotonic()
        after, kinds = next(schedule, (math.inf, {}))
        try:
            run.start()
            while True:
                time.sleep(POLL_INTERVAL_SECONDS)
                now = time.monotonic()
                if run.look():
                    if self._is_over(run):
                        break
                    run.start()
                elif now - began > MAX_SECONDS:
                    run.problems.append(f"did not end within {MAX_SECONDS:.0f} s")
                    break
                elif now - last >= after and (fitting := [each for each in kinds if fits(run, kinds[each])]):
                    (fault,) = chance.choices(fitting, weights=[kinds[each].share for each in fitting])
                    faults.append(self._fire(run, fault, kinds[fault], chance, now - began))
                    after, kinds = next(schedule, (math.inf, {}))
                    last = now
        finally:
            run.end()
        return Disturbed(run, faults, time.monotonic() - began)

    def remove(self, run: ChaosRun) -> None:
        """Removes the files of a run."""
        for folder in (run.folder, run.run_dir):
            shutil.rmtree(folder, ignore_errors=True)

    def _fire(self, run: ChaosRun, name: str, kind: Kind, chance: random.Random, seconds: float) -> Fired:
        events, training, working, attempt = len(run.events), run.training, run.working, run.attempt
        try:
            rank = kind.fire(run, chance)
        except Exception as error:  # noqa: BLE001 - a fault that could not be made is a finding of this run
            run.problems.append(f"{name} did not fire: {error!r}")
            rank = None
        if kind.causes and kind.must and working:
            run.disturbed = max(attempt, run.disturbed)
        return Fired(name, kind, rank, events, seconds, training)

    @staticmethod
    def _is_over(run: ChaosRun) -> bool:
        """Whether a start was the last: it ended well, or as nothing has asked for."""
        return run.codes[-1] == 0 or run.codes[-1] not in run.fine or len(run.codes) > MAX_STARTS


@dataclass(frozen=True)
class Disturbed:
    """A run that has ended, and the faults that it met."""

    run: ChaosRun
    faults: list[Fired]
    seconds: float


def drawn(chance: random.Random, kinds: dict[str, Kind], mtbf: float) -> Schedule:
    """Faults without end, with a mean time between them in seconds."""
    while True:
        yield chance.expovariate(1 / mtbf), kinds


def row(seed: int, ended: Disturbed, control: Control) -> Row:
    """What one seed came to, and what did not hold."""
    run, faults = ended.run, ended.faults
    trial = trial_of(run) if (run.run_dir / "results.json").exists() else None
    where = trial.sections if trial else None
    return Row(
        seed=seed,
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


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 64 MiB; a plain folder where it cannot be mounted (root is needed)."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


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
        f"A mean time between failures of {options.mtbf:g} s, {options.iterations} iterations a run, {hours:.1f} "
        f"hours. {held} of {len(rows)} seeds held all invariants. {sum(kinds.values())} faults: "
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


def keep(run: ChaosRun, folder: Path) -> None:
    """Keeps what a run left that did not hold, to look into."""
    shutil.copytree(run.run_dir, folder / run.folder.name, dirs_exist_ok=True)
    shutil.copy(run.folder / "output.txt", folder / run.folder.name)


def main() -> int:
    """Runs the seeds that have no row yet, prints a table, and leaves a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--mtbf", type=float, default=60.0, help="mean time between failures, in seconds")
    parser.add_argument(
        "--only",
        action="append",
        choices=KINDS,
        help="this kind, once, as soon as it can happen; repeatable, in that order",
    )
    parser.add_argument("--iterations", type=int, default=300, help="of a run; 40 seconds on two quiet cores")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies time-outs, for a machine that is busy")
    parser.add_argument("--min-goodput", type=float, default=0.0, help="exit code 1 below it (0 to 1)")
    parser.add_argument("--to", type=Path, help="folder of rows, summary and broken runs; seeds with a row are kept")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started must end, too
    options.to = options.to or Path("runs") / "chaos" / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}"
    options.to.mkdir(parents=True, exist_ok=True)
    stored = options.to / "rows.jsonl"
    rows = [Row(**json.loads(line)) for line in stored.read_text().splitlines()] if stored.exists() else []
    seeds = [seed for seed in range(options.first, options.first + options.seeds) if seed not in {r.seed for r in rows}]
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        server = MlflowServer(folder, free_port())
        with small_disk(folder / "disk") as disk, server:
            values = partial(
                soak_experiment, uri=server.uri, iterations=options.iterations, workers=2, patience=options.patience
            )
            soak = Soak(folder, disk, server, values, busy=options.patience > 1)
            undisturbed = soak.run("control", iter(()), random.Random(0)).run  # noqa: S311 - nothing is drawn
            if undisturbed.codes[-1] != 0 or undisturbed.problems:
                print(log_tail(undisturbed.folder), *undisturbed.problems, sep="\n", file=sys.stderr)
                return 1
            control, trial = Control.of(undisturbed), trial_of(undisturbed)
            wall = trial.sections.wall if trial.sections else 0.0
            print(f"undisturbed: {wall:.0f} s, goodput {trial.goodput or 0:.0%}\n\n{HEADER}", flush=True)
            kinds = {name: KINDS[name] for name in KINDS if disk.is_mount() or name not in NEEDS_SMALL_DISK}
            forced = [(0.0, {name: KINDS[name]}) for name in options.only or ()]
            for seed in seeds:
                chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
                schedule = iter(forced) if forced else drawn(chance, kinds, options.mtbf)
                ended = soak.run(f"seed{seed}", schedule, chance)
                if forced and len(ended.faults) < len(forced):
                    ended.run.problems.append("not every fault fired")
                rows.append(new := row(seed, ended, control))
                print(new, flush=True)
                with stored.open("a") as file:
                    file.write(json.dumps(asdict(new)) + "\n")
                (options.to / "summary.md").write_text(summary(rows, options))
                if new.problems:
                    keep(ended.run, options.to)
                soak.remove(ended.run)
    print(f"\n{summary(rows, options).split('| seed')[0].strip()}\nin {options.to}/summary.md")
    return 1 if any(row.problems for row in rows) or goodput(rows) < options.min_goodput else 0


if __name__ == "__main__":
    sys.exit(main())
