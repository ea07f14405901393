"""`make bench-gpu`: the real R50-FPN on this machine's GPU, this program against plain detectron2.

Besides the table it prints how often a step of ours makes the host wait for the device, and the share of the device's
peak that its arithmetic amounts to.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.utils.events import EventStorage
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Row, machine, table
from benchmarks.training import r50, recipe_row
from trainers import loading, mask_rcnn
from trainers.contract.plan import TrialPlan
from trainers.speedups.apply import process_settings
from trainers.training_order import training_epoch

PEAK_TFLOPS = {"V100": 125, "A100": 312, "A10": 125, "L4": 121, "L40S": 362, "H100": 989, "H200": 989, "B200": 2250}
"""Dense 16-bit peak of tensor cores by a word of the device's name (NVIDIA's data sheets; SXM where there are two)."""


def rows() -> list[Row]:
    """Both recipes, 800 px, batch 2, as the seed's one-GPU protocol has it."""
    return [
        recipe_row(f"{recipe}_r50_800", target, lambda name: r50(60, 8, name, size=800, device="cuda"), recipe)
        for recipe, target in (("reference", 1.0), ("fast", 1.5))
    ]


def flops_and_waits(plan: TrialPlan) -> tuple[int, int]:
    """Operations of one training step, forward and backward, and how often the host waits for the device in it.

    Args:
        plan: The trial; its first batch is taken, after one step to warm up.

    Returns:
        Floating-point operations (a multiplication and an addition are two), and waits (0 on a CPU).
    """
    cfg = mask_rcnn.build_config(plan)
    mask_rcnn.register(cfg, plan.train)
    images = loading.training_images(cfg, plan, loading.training_records(cfg, plan))
    epoch = training_epoch(cfg, images.records, plan.seed)
    batch = next(iter(loading.training_loader(cfg, plan, images, epoch, rank=0, skip=0, num_processes=0))).inputs
    model = mask_rcnn.build_detector(cfg, plan)

    def step() -> None:
        torch.stack(list(model(batch).values())).sum().backward()

    with EventStorage(0), process_settings(plan.recipe, torch.device(plan.device)):
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        with _waits() as waits:
            step()
    return counter.get_total_flops(), len(waits)


@contextmanager
def _waits() -> Iterator[list[warnings.WarningMessage]]:
    """Collects torch's warnings of calls that wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        waits: list[warnings.WarningMessage] = []
        try:
            yield waits
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            waits += [warning for warning in caught if "synchroniz" in str(warning.message)]


def main() -> int:
    """Prints the table and the two figures; returns the exit code."""
    if not torch.cuda.is_available():
        print("make bench-gpu: torch finds no GPU here; `make bench` measures on CPUs", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    found = rows()
    print(f"{name}; {machine()}\n\n{table(found)}")
    plan = r50(60, 8, "fast", size=800, device="cuda")
    flops, waits = flops_and_waits(plan)
    per_second = flops / plan.solver.global_batch_size * statistics.median(found[-1].ours) / 1e12
    peak = next((peak for word, peak in PEAK_TFLOPS.items() if word in name.replace("-", " ").split()), None)
    share = f", {per_second / peak:.1%} of its 16-bit peak" if peak else ""
    print(f"\nfast recipe: {waits} waits for the device a step, {per_second:.1f} TFLOP/s{share}")
    return 0 if all(row.reached is not False for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
