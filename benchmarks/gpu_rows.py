"""What one training on a GPU was measured to do, against what is to be reached."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.acceptance.data_sheets import sheet_rate

PEAK_TFLOPS = {"V100": 125, "A100": 312, "A10": 125, "L4": 121, "L40S": 362, "H100": 989, "H200": 989, "B200": 2250}
"""Dense 16-bit peak of tensor cores by a word of the device's name (NVIDIA's data sheets; SXM where there are two)."""

BELOW_SXM = {"MIG", "PCIE", "NVL"}
"""Words, in capitals, of the names of slices and PCIe cards, which have less than the SXM module of their name."""


def words_of(device: str) -> set[str]:
    """The words of a device's name, in capitals."""
    return set(device.upper().replace("-", " ").split())


def peak_tflops(device: str) -> float | None:
    """Dense 16-bit peak of a device by its name; None for one that is not in a table, as every slice (MIG)."""
    words = words_of(device)
    if words & BELOW_SXM:
        return sheet_rate(device, "gpu_matrix_fp16")
    return next((peak for word, peak in PEAK_TFLOPS.items() if word in words), None)


@dataclass(frozen=True, slots=True)
class Target:
    """What a row is to reach on one H100 (SXM)."""

    figure: str
    """Name of a property of `GpuRow`."""
    at_least: float
    aim: float
    higher_is_better: bool = True

    def reached(self, value: float | None) -> bool | None:
        """Whether a value reaches `at_least`; None for one that was not measured."""
        if value is None:
            return None
        return value >= self.at_least if self.higher_is_better else value <= self.at_least


TARGETS = {
    ("reference", 2): (Target("ratio", 1.1, 1.5),),
    ("fast", 2): (Target("ratio", 3, 5), Target("waits", 1, 0, higher_is_better=False)),
    ("fast", 16): (Target("images_per_second", 110, 150), Target("waits", 1, 0, higher_is_better=False)),
    ("fast, overlapped evaluation", 8): (Target("stall_seconds", 0.1, 0.04, higher_is_better=False),),
}
"""By a row's name and batch."""


@dataclass
class GpuRow:
    """One training; what was not measured is None."""

    name: str
    batch: int
    targets: tuple[Target, ...] = ()
    """What it is to reach."""
    problem: str = ""
    """Why it failed or was left out; empty where it did not and was not."""
    device: dict[str, Any] = field(default_factory=dict)
    """What its process says of its device."""
    warmup: dict[str, Any] | None = None
    """Its first block, which no figure includes."""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """Its timed blocks, as `Probe` reports them."""
    ratios: list[float] = field(default_factory=list)
    """To each block's neighbour: detectron2's, or in the ladder the first rung's."""
    waits: float | None = None
    """Calls a step that make the host wait for the device."""
    waiting_lines: dict[str, float] | None = None
    trace: dict[str, Any] | None = None
    """Of a step, as `read_trace` has it."""
    no_trace: str | None = None
    """Why there is none; empty where there is."""
    shapes: dict[str, Any] | None = None
    """Of the batches it trained on."""
    flops_per_image: float | None = None
    """Both passes of detectron2's model; the same for all rows of a batch."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What else is known of it: of the demo, its AP."""

    @property
    def rates(self) -> list[float]:
        """Images a second in each block."""
        return [block["steps"] * self.batch / block["seconds"] for block in self.blocks]

    @property
    def images_per_second(self) -> float | None:
        """Median over the blocks."""
        return statistics.median(self.rates) if self.blocks else None

    @property
    def ratio(self) -> float | None:
        """Median of `ratios`."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def step_ms(self) -> list[float]:
        """Milliseconds of every timed step."""
        return [1000 * seconds for block in self.blocks for seconds in block["step_seconds"]]

    @property
    def joules_per_image(self) -> float | None:
        """The whole GPU's energy while it trained; other trainings were suspended."""
        joules = [block["joules"] for block in self.blocks]
        if not joules or None in joules:
            return None
        return float(sum(joules) / sum(block["steps"] * self.batch for block in self.blocks))

    @property
    def peak_gib(self) -> float | None:
        """Most memory that torch held in a timed block; it counts no tensors in the replay of a graph."""
        return max((block["peak_reserved_gib"] for block in self.blocks if block["peak_reserved_gib"]), default=None)

    @property
    def tflops(self) -> float | None:
        """Arithmetic of detectron2's model a second, 10^12 operations."""
        rate = self.images_per_second
        return rate * self.flops_per_image / 1e12 if rate and self.flops_per_image else None

    @property
    def peak_share(self) -> float | None:
        """`tflops` as a share of the device's 16-bit peak."""
        peak = peak_tflops(str(self.device.get("device", "")))
        return self.tflops / peak if peak and self.tflops else None

    @property
    def stall_seconds(self) -> float | None:
        """For how long an evaluation stalls training."""
        stalls = self.figures.get("stalls")
        return statistics.median(stalls) if stalls else None

    def reached(self, target: Target) -> bool | None:
        """Whether it reaches a target; None where it was not measured."""
        return target.reached(getattr(self, target.figure))

    def quantile(self, share: float) -> float | None:
        """Milliseconds that a share of the timed steps do not exceed."""
        steps = sorted(self.step_ms)
        return steps[min(len(steps) - 1, int(share * len(steps)))] if steps else None

    def to_dict(self) -> dict[str, Any]:
        """The row with its figures, for JSON."""
        names = ("images_per_second", "ratio", "joules_per_image", "peak_gib", "tflops", "peak_share", "stall_seconds")
        figures = {name: getattr(self, name) for name in names}
        targets = [{**asdict(target), "reached": self.reached(target)} for target in self.targets]
        steps = {"median_step_ms": self.quantile(0.5), "p95_step_ms": self.quantile(0.95)}
        return {**asdict(self), **figures, **steps, "rates": self.rates, "targets": targets}
