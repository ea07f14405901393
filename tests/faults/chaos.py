"""A soak: runs of the whole command with random faults, each compared with an undisturbed one: `make chaos SEEDS=20`.

Faults come at random moments, with a mean time between failures, from the catalogue of
`tests/builders/chaos_faults.py`: what can happen to workers, and to everything else that a run consists of. Each kind
comes at its own rate, and does not come while what it happens to is not there. Exit code 1 when an invariant did not
hold: the same weights bit for bit, the same AP, every metric row in MLflow exactly once, no process and no file left,
the right exit code, the right cause and rank in the record, and the goodput that `--min-goodput` asks for.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tests.builders.chaos_checks import Control, log_tail
from tests.builders.chaos_faults import KINDS, NEEDS_SMALL_DISK, Fired, Kind, fits
from tests.builders.chaos_run import ChaosRun, soak_experiment
from tests.builders.chaos_summary import HEADER, Disturbed, Row, goodput, row, summary
from tests.builders.mlflow_server import MlflowServer
from tests.builders.s3 import free_port

POLL_INTERVAL_SECONDS = 0.1

WORKERS = (2, 1)
"""Numbers of workers that seeds have in turn; two share both cores of a small machine with whatever else starts."""

MAX_SECONDS = 1800.0
"""A run that has not ended by then has hung."""

MAX_STARTS = 30
"""A command that was started so often comes to no end."""

Schedule = Iterator[tuple[float, str, Kind]]
"""Seconds until the next fault, and its kind with its name."""


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

    def run(self, name: str, schedule: Schedule, chance: random.Random, *, wait: bool = True) -> Disturbed:
        """A run to its end.

        Args:
            name: Of the run.
            schedule: Of the faults.
            chance: Of what the faults draw.
            wait: Whether one that is due waits until it can happen; else it does not happen then.
        """
        values = self.values(name)
        run, faults = ChaosRun(self.folder / name, self.disk, self.server, values, busy=self.busy), list[Fired]()
        began = last = time.monotonic()
        due = next(schedule, None)
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
                elif due and now - last >= due[0] and ((fitting := fits(run, due[2])) or not wait):
                    if fitting:
                        faults.append(self._fire(run, *due[1:], chance, now - began))
                    due, last = next(schedule, None), now
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


def drawn(chance: random.Random, kinds: dict[str, Kind], mtbf: float) -> Schedule:
    """Faults without end, with a mean time between them in seconds, each kind as often as its share says."""
    shares = [kind.share for kind in kinds.values()]
    while True:
        (name,) = chance.choices(list(kinds), shares)
        yield chance.expovariate(1 / mtbf), name, kinds[name]


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


def keep(run: ChaosRun, folder: Path) -> None:
    """Keeps what a run left that did not hold, to look into."""
    shutil.copytree(run.run_dir, folder / run.folder.name, dirs_exist_ok=True)
    shutil.copy(run.folder / "output.txt", folder / run.folder.name)


def main() -> int:
    """Runs the seeds that have no row yet, prints a table, and leaves a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--mtbf", type=float, default=60.0, help="mean time between failures while workers train, in seconds"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=KINDS,
        help="this kind, once, as soon as it can happen; repeatable, in that order",
    )
    parser.add_argument("--iterations", type=int, default=250, help="of a run; some 35 seconds on two quiet cores")
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
            soaks = []
            for workers in WORKERS:
                common = {"uri": server.uri, "iterations": options.iterations, "patience": options.patience}
                values = partial(soak_experiment, workers=workers, **common)
                soak = Soak(folder, disk, server, values, busy=options.patience > 1)
                chance = random.Random(0)  # noqa: S311 - nothing is drawn
                undisturbed = soak.run(f"undisturbed{workers}", iter(()), chance)
                if undisturbed.run.codes[-1] != 0 or undisturbed.run.problems:
                    print(log_tail(undisturbed.run.folder), *undisturbed.run.problems, sep="\n", file=sys.stderr)
                    return 1
                soaks.append((soak, Control.of(undisturbed.run)))
                found = goodput([row(-1, undisturbed, soaks[-1][1])])
                print(f"{workers} workers undisturbed: {undisturbed.seconds:.0f} s, goodput {found:.0%}", flush=True)
            print(f"\n{HEADER}", flush=True)
            kinds = {name: KINDS[name] for name in KINDS if disk.is_mount() or name not in NEEDS_SMALL_DISK}
            forced = [(0.0, name, KINDS[name]) for name in options.only or ()]
            for seed in seeds:
                soak, control = soaks[seed % len(soaks)]
                chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
                schedule = iter(forced) if forced else drawn(chance, kinds, options.mtbf)
                ended = soak.run(f"seed{seed}", schedule, chance, wait=bool(forced))
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
