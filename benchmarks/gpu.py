"""`make bench-gpu`: the seed's model on this machine's GPU, this program against plain detectron2, in eight minutes.

Every row is a process. Those of a batch size train end to end in turns, a few seconds each, the others suspended with
their loaders. A row that fails says why, and the others go on; what there is no time left for is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import gpu_plans
from benchmarks.gpu_plans import CONTENDERS, DEMO, DETECTRON2, TINY, Settings, with_all_loaders
from benchmarks.gpu_probe import Order
from benchmarks.gpu_report import Results, new_files, page, write
from benchmarks.gpu_rows import TARGETS, GpuRow
from benchmarks.gpu_side import START_SECONDS, Kind, Side, SideError
from benchmarks.measure import machine
from trainers.contract.plan import TrialPlan

T = TypeVar("T")

PARTS = ("batches", "demo", "ladder")
"""What is measured, in this order."""

SLACK_SECONDS = 60.0
"""What a block may take beyond its seconds: kernels are compiled and graphs captured in it."""

DEMO_SECONDS = 120.0
"""Longest time of the demo's trainings, which run at the same time."""

SETTLING_SECONDS = 4.0
"""For the estimate of what there is time for: what a training needs before and after its blocks."""


@dataclass
class Entry:
    """A row while it is measured."""

    row: GpuRow
    kind: Kind
    plan: TrialPlan
    side: Side | None = None

    def attempt(self, work: Callable[[Side], T]) -> T | None:
        """Does something with the training, starting it if need be; where that fails, the row says why."""
        if self.row.problem:
            return None
        try:
            self.side = self.side or Side(self.kind, self.plan)
            return work(self.side)
        except SideError as error:
            self.row.problem = str(error)
        except Exception as error:  # noqa: BLE001 - whatever fails is this row's, and no other's
            traceback.print_exc()
            self.row.problem = f"{type(error).__name__}: {error}"
        if self.side:
            self.side.kill()
        return None

    def block(self, order: Order) -> dict[str, Any] | None:
        """What a block of steps was measured to be; None where it failed."""
        return self.attempt(lambda side: side.ask(order, order.seconds + SLACK_SECONDS))

    def end(self) -> None:
        """Ends the training."""
        self.row.shapes = (self.attempt(Side.end) or {}).get("shapes")


@dataclass
class Bench:
    """Measures the parts within a time, and keeps their results."""

    settings: Settings
    data: dict[str, Any]
    results: Results
    deadline: float
    """By `time.monotonic`."""
    folder: Path
    """For the trainings' output."""
    entries: list[Entry] = field(default_factory=list)

    def entry(self, name: str, kind: Kind, recipe: Any, batch: int) -> Entry:
        """A row of the seed's model, not begun."""
        folder = self.folder / str(len(self.entries))
        plan = gpu_plans.training_plan(self.settings, self.data, recipe, batch, folder)
        entry = Entry(GpuRow(name, batch), kind, with_all_loaders(plan))
        self.entries.append(entry)
        return entry

    def has_time_for(self, seconds: float, rows: Sequence[GpuRow]) -> bool:
        """Whether so much time is left; else the rows say so."""
        left = self.deadline - time.monotonic()
        for row in rows if left < seconds else ():
            row.problem = f"cut: it takes some {seconds:.0f} s, {max(left, 0):.0f} s were left"
        return left >= seconds

    def batches(self) -> None:
        """Rows of every recipe and of detectron2, in turns."""
        for batch in self.settings.batches:
            entries = [self.entry(name, *what, batch) for name, what in CONTENDERS.items()]
            for entry in entries:
                entry.row.targets = TARGETS.get((entry.row.name, batch), ())
            self.results.rows += [entry.row for entry in entries]
            base, others = entries[0], entries[1:]
            at_once = self.settings.at_once if batch >= 16 else len(others)
            for first in range(0, len(others), at_once):
                self._in_turns(base, others[first : first + at_once])
            base.end()
            for entry in entries:
                entry.row.flops_per_image = base.row.flops_per_image

    def _in_turns(self, base: Entry, others: list[Entry]) -> None:
        settings, everyone = self.settings, [base, *others]
        new = [entry for entry in everyone if entry.side is None]
        each = settings.rounds * settings.block_seconds + settings.warmup_seconds + SETTLING_SECONDS
        if not self.has_time_for(each * len(everyone), [entry.row for entry in new]):
            return
        self._begin(new)
        for number in range(settings.rounds):
            latest: dict[str, float] = {}
            for entry in everyone if number % 2 == 0 else reversed(everyone):
                if block := entry.block(settings.block):
                    entry.row.blocks.append(block)
                    latest[entry.row.name] = entry.row.rates[-1]
            for entry in others:
                if {entry.row.name, DETECTRON2} <= set(latest):
                    entry.row.ratios.append(latest[entry.row.name] / latest[DETECTRON2])
        for entry in new:
            self._dissect(entry)
        if base in new and (counted := base.block(Order("flops"))):
            base.row.flops_per_image = counted["flops"] / base.row.batch
        for entry in others:
            entry.end()

    def _begin(self, entries: list[Entry], warm: bool = True) -> None:
        """Starts trainings at the same time, then lets each take its first steps alone."""
        began = time.monotonic()
        for entry in entries:
            entry.attempt(lambda side: side)
        for entry in entries:
            left = began + START_SECONDS - time.monotonic()
            entry.row.device = entry.attempt(lambda side, left=left: side.receive(left)) or {}  # type: ignore[misc]
        for entry in entries if warm else ():
            entry.row.warmup = entry.block(self.settings.warmup)

    def _dissect(self, entry: Entry) -> None:
        steps = self.settings.block_steps
        found = (entry.block(Order("waits", steps=steps)) or {}) | (entry.block(Order("trace", steps=steps)) or {})
        for name in ("waits", "waiting_lines", "trace", "no_trace"):
            setattr(entry.row, name, found.get(name))

    def ladder(self) -> None:
        """A row for each switch of the fast recipe, added to those of the row before."""
        settings, batch = self.settings, self.settings.ladder_batch
        entries = [self.entry(name, "ours", recipe, batch) for name, recipe in gpu_plans.ladder().items()]
        self.results.ladder += [entry.row for entry in entries]
        each = 2 * settings.block_seconds + settings.warmup_seconds + SETTLING_SECONDS
        if self.has_time_for(START_SECONDS / 4 + each, [entry.row for entry in entries]):
            self._begin(entries, warm=False)
        counted = {row.batch: row.flops_per_image for row in self.results.rows}
        for entry in entries:
            entry.row.flops_per_image = counted.get(batch)
            if entry.row.problem or not self.has_time_for(each, [entry.row]):
                continue
            entry.row.warmup = entry.block(dataclasses.replace(settings.warmup, steps=1))
            blocks = [entry.block(settings.block) for _ in range(2)]
            entry.row.blocks = [block for block in blocks if block]
            entry.end()
            rates = entries[0].row.images_per_second
            entry.row.ratios = [rate / rates for rate in entry.row.rates] if rates else []

    def demo(self) -> None:
        """The demo's AP under each recipe; they train at the same time, so their seconds are no measurement."""
        entries = []
        for name, recipe in DEMO.items():
            plan = gpu_plans.demo_plan(self.settings, recipe, self.folder / name)
            batch = plan.solver.global_batch_size
            entries.append(Entry(GpuRow(name, batch, TARGETS.get((name, batch), ())), "to_the_end", plan))
        self.entries += entries
        self.results.demo += [entry.row for entry in entries]
        if not self.has_time_for(DEMO_SECONDS / 2, [entry.row for entry in entries]):
            return
        until = min(time.monotonic() + DEMO_SECONDS, self.deadline)
        for entry in entries:
            entry.attempt(lambda side: side)
        for entry in entries:
            entry.row.figures = entry.attempt(lambda side: side.receive(until - time.monotonic())) or {}

    def close(self) -> None:
        """Ends whatever still trains."""
        for entry in self.entries:
            if entry.side:
                entry.side.kill()


def measure(settings: Settings, parts: Sequence[str], minutes: float, to: Path, command: str = "") -> Results:
    """Measures and writes the results after each part, so that none is lost with a later one.

    Args:
        settings: How large and how long.
        parts: Some of `PARTS`.
        minutes: Rows that would end later are cut.
        to: Folder for the two files.
        command: What a person typed, for the page.
    """
    began = time.monotonic()
    what, data = gpu_plans.dataset(settings)
    results = Results(machine(), what, dataclasses.asdict(settings), command)
    files: tuple[Path, Path] | None = None
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(settings, data, results, began + 60 * minutes, Path(name))
        try:
            for part in parts:
                print(f"{part} … ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
                try:
                    getattr(bench, part)()
                except Exception as error:  # noqa: BLE001 - whatever fails is this part's, and no other's
                    traceback.print_exc()
                    results.problems[part] = f"{type(error).__name__}: {error}"
                results.seconds = time.monotonic() - began
                files = files or new_files(results, to)
                write(results, files)
        finally:
            bench.close()
    print(page(results))
    print(f"written: {', '.join(map(str, files or ()))}", file=sys.stderr)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns 1 where a row failed or is below its target, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="images of a step (default: 2 16)")
    parser.add_argument("--ladder-batch", type=int, metavar="N", help="the same for the ladder (default: 16)")
    parser.add_argument("--minutes", type=float, default=7.8, help="rows are cut that would end later (default: 7.8)")
    parser.add_argument("--to", type=Path, default=Path("benchmarks/results"), help="folder for the two files")
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model on the CPU: no measurement")
    given = parser.parse_args(arguments)
    if not given.tiny and not torch.cuda.is_available():
        print("make bench-gpu: torch finds no GPU here; `make bench` measures on CPUs", file=sys.stderr)
        return 2
    settings = TINY if given.tiny else Settings()
    changes = {"batches": given.batches and tuple(given.batches), "ladder_batch": given.ladder_batch}
    settings = dataclasses.replace(settings, **{key: value for key, value in changes.items() if value})
    command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    results = measure(settings, given.only, given.minutes, given.to, command)
    if results.failed or results.below or results.problems:
        names = [f"{row.name}, batch {row.batch}: {row.problem}" for row in results.failed]
        lines = ["failed or below target:", *names, *results.below, *map(str, results.problems.items())]
        print("\n".join(lines), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Suspended processes must not be left behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
