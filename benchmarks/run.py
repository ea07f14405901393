"""`python -m benchmarks.run [--only NAME …] [--json FILE] [--to FILE.md]`: this program against plain detectron2.

Prints one table; exits 1 and names the rows that are below their target.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks import components, evaluation_rows, tracking, training
from benchmarks.measure import Row, machine, report, table

ROWS: dict[str, Callable[[], Row]] = {
    "mapper": components.mapper,
    "decoding": components.decoding,
    "mask_targets": components.mask_targets,
    "roi_pooling": components.roi_pooling,
    "scoring_box": components.scoring_box,
    "scoring_mask": components.scoring_mask,
    "evaluation": training.evaluation,
    "evaluation_stall": evaluation_rows.evaluation_stall,
    "evaluation_rate": evaluation_rows.evaluation_rate,
    "reference_recipe": training.reference_recipe,
    "fast_recipe": training.fast_recipe,
    "fast_r50": training.fast_r50,
    "tracking": tracking.tracking,
    "launcher_tax": training.launcher_tax,
    "first_step": training.first_step,
    "time_to_target": training.time_to_target,
    "dataset_ready": components.dataset_ready,
}


def main() -> int:
    """Runs the rows and returns the exit code."""
    parser = argparse.ArgumentParser(description="This program against plain detectron2, side by side.")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help=f"rows to run: {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks.json"), help="where the figures go")
    parser.add_argument("--to", type=Path, metavar="FILE.md", help="write machine, versions and table there as well")
    arguments = parser.parse_args()
    # Processes that wait for their turn must not be left behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in arguments.only or ROWS:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows.append(ROWS[name]())
        print(f"{name}: {rows[-1].ratio:.2f} (target {rows[-1].target_text})", file=sys.stderr, flush=True)
        values = {"machine": machine(), "rows": [row.to_dict() for row in rows]}
        arguments.json.write_text(json.dumps(values, indent=2), encoding="utf-8")  # whatever interrupts a later row
    print(table(rows))
    if arguments.to:
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        arguments.to.write_text(report(rows, machine()), encoding="utf-8")
    below = [row.name for row in rows if row.reached is False]
    if below:
        print(f"below target: {', '.join(below)}", file=sys.stderr)
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
