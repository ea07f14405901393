"""`python -m benchmarks.run [--only NAME …] [--json FILE]`: this program against plain detectron2, one table.

Exits 1 and names the rows that are below their target.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks import components, tracking, training
from benchmarks.measure import Row, machine, table

ROWS: dict[str, Callable[[], Row]] = {
    "mapper": components.mapper,
    "mask_targets": components.mask_targets,
    "roi_pooling": components.roi_pooling,
    "scoring_box": components.scoring_box,
    "scoring_mask": components.scoring_mask,
    "evaluation": training.evaluation,
    "evaluation_stall": training.evaluation_stall,
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
    arguments = parser.parse_args()
    # What was started stands still in turns: it must not be left so.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in arguments.only or ROWS:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows.append(ROWS[name]())
        print(f"{name}: {rows[-1].ratio:.2f} (target {rows[-1].target:g})", file=sys.stderr, flush=True)
        values = {"machine": machine(), "rows": [row.to_dict() for row in rows]}
        arguments.json.write_text(json.dumps(values, indent=2), encoding="utf-8")  # kept if a later row is interrupted
        gc.collect()
    print(table(rows))
    below = [row.name for row in rows if not row.reached]
    if below:
        print(f"below target: {', '.join(below)}", file=sys.stderr)
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
