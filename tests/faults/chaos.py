"""Many runs with random faults, each compared with an undisturbed one: `make chaos SEEDS=20`.

Faults come at random iterations, with a mean time between failures, on random ranks and at random places of the loop;
now and then the newest checkpoint is damaged as well before the workers are started again. Exit code 1 when an
invariant did not hold: the same weights bit for bit, the same AP, every metric row in MLflow exactly once.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from orchestrator.experiment.spec import Faults, Timeouts
from orchestrator.figures.trial import trial_result
from tests.builders.fault_bench import ITERATIONS, Bench, Outcome
from trainers.contract.events import Event, TrialRestarted
from trainers.faults import VARIABLE, Fault

KINDS = {"kill": 6, "crash": 2, "raise": 2, "freeze": 1, "stall": 1}
"""How often each kind is drawn."""

DAMAGE_SHARE = 0.25
"""Share of restarts before which the newest checkpoint is damaged."""

TIMEOUTS = Timeouts(step=40, heartbeat=30)


def draw(chance: random.Random, mean_iterations: float) -> list[Fault]:
    """The faults of one run: one per attempt, the next one later than the one before, until training would be done."""
    faults: list[Fault] = []
    iteration = -1
    for attempt in range(ITERATIONS):
        # Strictly later than the last: the same place twice is a fault of another kind, and ends a trial.
        iteration += 1 + int(chance.expovariate(1 / mean_iterations))
        if iteration >= ITERATIONS:
            break
        (kind,) = chance.choices(list(KINDS), weights=list(KINDS.values()))
        part = chance.choice(["data", "forward", "backward", "optimizer"])
        ranks = (0, 1) if kind == "kill" and chance.random() < 0.2 else (chance.randrange(2),)
        faults += [Fault(kind, rank, iteration, attempt, part=part) for rank in ranks]  # type: ignore[arg-type]
    return faults


class Damage:
    """Flips a byte of the newest checkpoint before some of the restarts."""

    def __init__(self, chance: random.Random, bench: Bench) -> None:
        self.chance, self.bench, self.count = chance, bench, 0

    def __call__(self, event: Event) -> None:
        valid = sorted(self.bench.run_dir.glob("*/checkpoints/iter_*/manifest.json"))
        if isinstance(event, TrialRestarted) and valid and self.chance.random() < DAMAGE_SHARE:
            state = max(valid[-1].parent.glob("state-*.pt"))
            content = bytearray(state.read_bytes())
            content[self.chance.randrange(len(content))] ^= 0xFF
            state.write_bytes(content)
            self.count += 1


def broken(outcome: Outcome, control: Outcome) -> list[str]:
    """The invariants that do not hold."""
    if outcome.ended.status != "FINISHED":
        return [f"{outcome.ended.status}: {outcome.ended.reason}"]
    missing, doubled = control.rows - outcome.rows, outcome.rows - control.rows
    checks = {
        "other weights": outcome.state != control.state,
        "other AP": outcome.scores != control.scores,
        f"rows missing: {sorted(missing)[:3]}": bool(missing),
        f"rows too many: {sorted(doubled)[:3]}": bool(doubled),
    }
    return [name for name, failed in checks.items() if failed]


def main() -> int:
    """Runs the seeds and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--mean-iterations", type=float, default=10.0, help="mean time between failures, in iterations")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        faults_file = Path(folder) / "faults.json"
        os.environ[VARIABLE] = str(faults_file)
        from orchestrator.execution.cluster import shutdown, start_ray

        start_ray(None)
        bench = Bench(Path(folder), faults_file)
        control = bench.run()
        print(f"control: state {control.state[:12]}, {sum(control.rows.values())} metric rows\n")
        print("| seed | faults: kind rank@iteration | damaged | restarts | recovery, s | run, s | verdict |")
        print("|---|---|---|---|---|---|---|")
        recoveries: list[float] = []
        kinds: Counter[str] = Counter()
        failed = 0
        for seed in range(options.first, options.first + options.seeds):
            chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
            faults = draw(chance, options.mean_iterations)
            damage = Damage(chance, bench)
            started = time.monotonic()
            outcome = bench.run(
                *faults, policy=Faults(max_failures=20), timeouts=TIMEOUTS.model_dump(), listeners=[damage]
            )
            seconds = time.monotonic() - started
            problems = broken(outcome, control)
            due = {(fault.attempt, fault.kind) for fault in faults}
            if {(fault["attempt"], fault["kind"]) for fault in outcome.fired} != due:
                problems.append("not every fault fired")
            failed += bool(problems)
            restarts = trial_result(outcome.plan, outcome.events).restarts
            recoveries += (own := [r.recovery_seconds for r in restarts if r.recovery_seconds is not None])
            kinds += Counter(fault["kind"] for fault in outcome.fired)
            what = ", ".join(f"{fault['kind']} {fault['rank']}@{fault['iteration']}" for fault in outcome.fired)
            took = ", ".join(f"{each:.0f}" for each in own) or "–"
            verdict = "; ".join(problems) or "held"
            row = (seed, what or "none", damage.count, len(restarts), took, f"{seconds:.0f}", verdict)
            print(f"| {' | '.join(map(str, row))} |", flush=True)
        print(f"\n{options.seeds - failed} of {options.seeds} seeds held all invariants; {sum(kinds.values())} faults:")
        print(", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()) or "none")
        if recoveries:
            worst, middle = max(recoveries), statistics.median(recoveries)
            print(f"recovery, from the failure to the end of the next step: median {middle:.1f} s, worst {worst:.1f} s")
        shutdown()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
