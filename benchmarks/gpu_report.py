"""The results of `make bench-gpu` as a JSON file and as a Markdown page for a person."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import BELOW_SXM, PEAK_TFLOPS, GpuRow, Target, peak_tflops, words_of

MEASURED_ON = {"H100", "H200"}
"""Words of the devices on which a target counts as reached or not; slices and PCIe cards have less than is asked of."""

VERDICTS = {True: "reached", False: "**below**", None: "not measured"}

DISSECTED = ("detectron2", "fast")
"""Rows whose kernels and waiting lines are on the page; those of all rows are in the JSON file."""


RATES = (
    "TFLOP/s is the arithmetic of detectron2's model for an image, both passes, times images/s; the peak is that of 16",
    "bits. Joules are the whole GPU's. The peak of memory is what torch held of the device, what it keeps for reuse",
    "included: it counts no tensors in the replay of a graph.",
)
ANATOMY = (
    "Waits are a step's calls in which torch makes the host wait for the device (`set_sync_debug_mode`). Stream waits",
    "are CUDA's own in a trace, as are launches, of which a graph is one, and the time in which the device was busy. A",
    "new shape is one that a process meets for the first time, its share that of the second half of its steps. Padding",
    "is what a canvas has beyond detectron2's own.",
)
"""What the columns of the tables mean."""


@dataclass
class Results:
    """All that was measured."""

    machine: dict[str, Any]
    """From `benchmarks.measure.machine`."""
    data: str
    """What was trained on, in words."""
    settings: dict[str, Any]
    command: str = ""
    rows: list[GpuRow] = field(default_factory=list)
    ladder: list[GpuRow] = field(default_factory=list)
    demo: list[GpuRow] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """Why a part ended before its last row."""
    seconds: float = 0.0
    """That it took."""

    @property
    def everything(self) -> list[GpuRow]:
        """The rows of all parts."""
        return [*self.rows, *self.ladder, *self.demo]

    @property
    def device(self) -> dict[str, Any]:
        """What the first process that reached its first step said of its device."""
        return next((row.device for row in self.everything if row.device), {})

    @property
    def counts(self) -> bool:
        """Whether it was measured on a device that the targets are for."""
        words = words_of(str(self.device.get("device")))
        return bool(words & MEASURED_ON) and not words & BELOW_SXM

    @property
    def cut(self) -> list[GpuRow]:
        """Rows that there was no time for."""
        return [row for row in self.everything if row.problem.startswith("cut")]

    @property
    def failed(self) -> list[GpuRow]:
        """Rows with a failure."""
        return [row for row in self.everything if row.problem and not row.problem.startswith("cut")]

    @property
    def below(self) -> list[str]:
        """Targets that were measured on the device that they are for, and not reached."""
        if not self.counts:
            return []
        pairs = [(row, target) for row in self.everything for target in row.targets if row.reached(target) is False]
        return [f"{row.name}, batch {row.batch}: {target.figure}" for row, target in pairs]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        parts = {part: [row.to_dict() for row in getattr(self, part)] for part in ("rows", "ladder", "demo")}
        return {
            "command": self.command, "machine": self.machine,
            "device": self.device, "data": self.data, "settings": self.settings, "seconds": self.seconds, **parts,
            "cut": [row.name for row in self.cut], "failed": [row.name for row in self.failed], "below": self.below,
            "problems": self.problems,
        }  # fmt: skip


def file_stem(results: Results) -> str:
    """The date and the device, as files of results are named."""
    name = str(results.device.get("device", "no-device"))
    words = words_of(name)
    known = next((word for word in PEAK_TFLOPS if word in words and not words & BELOW_SXM), name)
    return f"{results.machine['time'][:10]}_{re.sub(r'[^a-z0-9]+', '-', known.lower()).strip('-')}-bench-gpu"


def write(results: Results, files: tuple[Path, Path]) -> None:
    """Writes the JSON and the Markdown file."""
    as_json, as_markdown = files
    as_json.parent.mkdir(parents=True, exist_ok=True)
    as_json.write_text(json.dumps(results.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    as_markdown.write_text(page(results), encoding="utf-8")


def new_files(results: Results, folder: Path) -> tuple[Path, Path]:
    """Names of files that do not exist: a measurement never overwrites an older one."""
    stem = folder / file_stem(results)
    number = 1
    while (base := stem if number == 1 else Path(f"{stem}-{number}")).with_suffix(".json").exists():
        number += 1
    return base.with_suffix(".json"), base.with_suffix(".md")


def page(results: Results) -> str:
    """The results in Markdown."""
    device, machine = results.device, results.machine
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    memory = f", {device['device_memory_gib']:.0f} GiB" if device.get("device_memory_gib") else ""
    peak = peak_tflops(str(device.get("device")))
    head = [
        f"# {machine['time'][:10]}, {device.get('device', 'no device')}",
        "",
        f"`{results.command}`, {results.seconds / 60:.1f} minutes. Plain detectron2 is its own",
        "`DefaultTrainer`, set up as `tools/train_net.py` does, with as many loader processes as ours.",
        "Trainings of a batch size take turns of a few seconds, end to end, the others suspended with their loaders. A",
        "ratio is between neighbours, a spread from the smallest to the greatest.",
        "",
        f"- Device: {device.get('device')}{memory}, CUDA {device.get('cuda')}, cuDNN {device.get('cudnn')}; "
        + (f"16-bit peak {peak} TFLOP/s" if peak else "its 16-bit peak is not in the table"),
        f"- Machine: {machine['processor']}, {machine['cpus']} CPUs, {machine['system']}, Python {machine['python']}",
        f"- Versions: {versions}",
        f"- Data: {results.data}",
        "- Model: Mask R-CNN R50-FPN from random weights: few proposals are positive, and detectron2's mask head has",
        "  little to do",
    ]
    if problem := device.get("no_energy"):
        head.append(f"- Energy was not measured: {problem}")
    if reasons := {row.no_trace for row in results.rows if row.no_trace}:
        head.append(f"- Launches and kernels were not traced: {'; '.join(sorted(reasons))}")
    head += [f"- Failed: {part}: {problem}" for part, problem in results.problems.items()]
    head += [f"- Failed: {row.name}, batch {row.batch}: {row.problem}" for row in results.failed]
    head += [f"- Not measured: {row.name}, batch {row.batch}: {row.problem}" for row in results.cut]
    parts = [head, _rates(results.rows), _targets(results), _anatomy(results.rows), _ladder(results.ladder)]
    parts += [_demo(results.demo), *(_kernels(row) for row in results.rows if row.name in DISSECTED)]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _rates(rows: list[GpuRow]) -> list[str]:
    heads = ("row", "batch", "images/s", "of detectron2", "spread", "step p50, p95 (ms)", "peak GiB", "J/image",
             "TFLOP/s", "of peak")  # fmt: skip
    table = _table("Rates", heads, [
        (row.name, row.batch, _figure(row.images_per_second), _figure(row.ratio, ".2f"), _spread(row.ratios, ".2f"),
         f"{_figure(row.quantile(0.5), '.0f')}, {_figure(row.quantile(0.95), '.0f')}", _figure(row.peak_gib),
         _figure(row.joules_per_image, ".2f"), _figure(row.tflops, ".3g"), _figure(row.peak_share, ".1%"))
        for row in rows
    ])  # fmt: skip
    return [*table, "", *RATES] if table else []


def _targets(results: Results) -> list[str]:
    def verdict(row: GpuRow, target: Target) -> str:
        reached = row.reached(target)
        return VERDICTS[reached] if results.counts or reached is None else "(for an H100)"

    return _table("Targets on one H100", ("row", "batch", "figure", "measured", "target", "aim", ""), [
        (row.name, row.batch, target.figure, _figure(getattr(row, target.figure), ".3g"),
         f"{'≥' if target.higher_is_better else '≤'} {target.at_least:g}", f"{target.aim:g}", verdict(row, target))
        for row in results.everything for target in row.targets
    ])  # fmt: skip


def _anatomy(rows: list[GpuRow]) -> list[str]:
    heads = ("row", "batch", "waits", "stream waits", "launches", "graphs", "device busy", "shapes", "new shapes",
             "step with a new one, without (ms)", "padding", "graphs captured in (s)", "eager")  # fmt: skip
    lines = []
    for row in rows:
        trace, shapes = row.trace or {}, row.shapes or {}
        eager = {**shapes.get("eager_batches", {}), **shapes.get("eager_steps", {})}
        busy = f"{_figure(trace.get('device_ms'))} ms, {_figure(trace.get('busy'), '.0%')}" if trace else "–"
        lines.append((
            row.name, row.batch, _figure(row.waits), _figure(trace.get("synchronizations")),
            _figure(trace.get("launches"), ".0f"), _figure(trace.get("graph_launches")), busy,
            _figure(shapes.get("distinct"), "d"), _figure(shapes.get("new"), ".0%"),
            f"{_figure(shapes.get('new_ms'), '.0f')}, {_figure(shapes.get('other_ms'), '.0f')}",
            _figure(shapes.get("waste"), ".0%"), _captured(shapes),
            "; ".join(f"{count} {reason}" for reason, count in eager.items()) or "–",
        ))  # fmt: skip
    table = _table("A step", heads, lines)
    return [*table, "", *ANATOMY] if table else []


def _captured(shapes: dict[str, Any]) -> str:
    return f"{shapes['graphs']}, {shapes['capture_seconds']:.1f}" if shapes.get("graphs") else "–"


def _ladder(rows: list[GpuRow]) -> list[str]:
    lines: list[tuple[str, ...]] = []
    before: float | None = None
    for row in rows:
        rate = row.images_per_second
        gain = rate / before if rate and before else None
        lines.append((f"`{row.name}`", _figure(rate), _spread(row.rates, ".1f"), _figure(gain, ".2f"),
                      _figure(row.ratio, ".2f"), _figure(row.peak_gib)))  # fmt: skip
        before = rate or before
    heads = ("switch", "images/s", "spread", "of the row before", "of the reference", "peak GiB")
    batch = rows[0].batch if rows else 0
    return _table(f"From the reference to the fast recipe, switch by switch, batch {batch}", heads, lines)


def _demo(rows: list[GpuRow]) -> list[str]:
    heads = ("recipe", "box AP", "mask AP", "iterations", "stall of an evaluation (s)")
    return _table("The demo to its targets, one seed, all at the same time", heads, [
        (row.name, _figure(row.figures.get("box_ap")), _figure(row.figures.get("mask_ap")),
         _figure(row.figures.get("iterations"), "d"), _figure(row.stall_seconds, ".3f"))
        for row in rows
    ])  # fmt: skip


def _kernels(row: GpuRow) -> list[str]:
    lines: list[str] = []
    if row.trace and row.trace["kernels"]:
        lines += _table(f"Longest kernels of a step: {row.name}, batch {row.batch}", ("ms", "calls", "kernel"), [
            (_figure(kernel["ms"], ".2f"), _figure(kernel["calls"], ".0f"), f"`{kernel['name'].replace('|', '')}`")
            for kernel in row.trace["kernels"]
        ])  # fmt: skip
    if row.waiting_lines:
        waiting = ", ".join(f"`{line}` {_figure(count)}" for line, count in row.waiting_lines.items())
        lines += ["", f"Waits a step by line: {waiting}"]
    return lines


def _table(title: str, heads: tuple[str, ...], lines: list[tuple[Any, ...]]) -> list[str]:
    if not lines:
        return []
    rows = [f"| {' | '.join(map(str, line))} |" for line in (heads, ("---",) * len(heads), *lines)]
    return [f"## {title}", "", *rows]


def _figure(value: float | None, form: str = ".1f") -> str:
    return "–" if value is None else format(value, form)


def _spread(values: list[float], form: str) -> str:
    return f"{min(values):{form}} – {max(values):{form}}" if values else "–"
