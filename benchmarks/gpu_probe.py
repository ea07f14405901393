"""What a training process does before each step while it is measured: it waits for an order, and carries it out.

An order is about a block of steps, which run as they would without it, end to end, loader and optimizer included. The
device is idle at both ends of a block, and its seconds are the host's between them.
"""

from __future__ import annotations

import functools
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_trace import read_trace

MAX_WAITING_LINES = 10
"""Lines of code that are named for making the host wait most often."""

WAIT = "called a synchronizing CUDA operation"
"""What torch warns of at a call that makes the host wait; a warning of its own, once in a process, is of the mode."""


@dataclass(frozen=True, slots=True)
class Order:
    """A block of steps to measure."""

    kind: Literal["time", "waits", "trace", "flops", "end"]
    """`time`: time the steps, with nothing else; `waits`: count waits for the device; `trace`: profile; `flops`: count
    the arithmetic; `end`: end the training."""
    seconds: float = 0.0
    """The block ends at the first step after as many seconds …"""
    steps: int = 1
    """… and as many steps."""


class EndTraining(BaseException):
    """The measurement is over; nothing in the training may catch it."""


class Probe:
    """Is called before every step of a training.

    Args:
        conductor: Where orders come from and results, dicts, go to. The first one describes the device.
        on_gpu: Whether training is on a GPU, the current one; elsewhere figures that need one are None.
    """

    def __init__(self, conductor: Connection, on_gpu: bool) -> None:
        self._conductor, self._on_gpu = conductor, on_gpu
        self._energy = EnergyCounter() if on_gpu else None
        self._order: Order | None = None
        self._scope = ExitStack()
        self._found: dict[str, Any] = {}
        self._marks: list[Any] = []
        self._began = 0.0
        self._joules: float | None = None
        self.num_steps = 0
        """Steps so far."""

    def __call__(self) -> None:
        """Continues with a block, or reports it and waits for the next order; raises EndTraining."""
        order = self._order
        if order is None:
            self._conductor.send(self._description())
        else:
            self.num_steps += 1
            self._mark()
            if len(self._marks) <= order.steps or time.perf_counter() - self._began < order.seconds:
                return
            self._conductor.send(self._finish(order))
        self._order = self._conductor.recv()
        self._begin(self._order)

    def _begin(self, order: Order) -> None:
        if order.kind == "end":
            raise EndTraining
        self._synchronize()
        if self._on_gpu and order.kind == "time":
            torch.cuda.reset_peak_memory_stats()
        self._found = {}
        collectors = {"waits": count_waits, "trace": trace, "flops": count_flops}
        if order.kind in collectors:
            self._scope.enter_context(collectors[order.kind](self._found, self._on_gpu))
        self._joules = self._energy.joules() if self._energy else None
        self._began = time.perf_counter()
        self._marks = []
        self._mark()

    def _finish(self, order: Order) -> dict[str, Any]:
        self._synchronize()
        found = self._found
        found["seconds"] = time.perf_counter() - self._began
        joules = self._energy.joules() if self._energy else None
        found["joules"] = joules - self._joules if joules is not None and self._joules is not None else None
        found["first_step"], found["steps"] = self.num_steps - len(self._marks) + 1, len(self._marks) - 1
        if order.kind == "time":
            found["step_seconds"] = [self._seconds(*marks) for marks in pairwise(self._marks)]
            found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30 if self._on_gpu else None
            found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30 if self._on_gpu else None
        self._scope.close()
        return found

    def _description(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name() if self._on_gpu else "cpu",
            "device_memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if self._on_gpu else None,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "no_energy": self._energy.problem if self._energy else "it is measured on GPUs only",
        }

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000 if self._on_gpu else end - begin

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


class EnergyCounter:
    """The current GPU's energy since its driver was loaded, as NVML counts it."""

    def __init__(self) -> None:
        self.problem = ""
        """Why there is none; empty where there is."""
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._millijoules = functools.partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
            self._millijoules()
        except Exception as error:  # noqa: BLE001 - NVML's errors, a missing package, a torch without UUIDs
            self.problem = f"NVML does not count it here: {type(error).__name__}: {error}"

    def joules(self) -> float | None:
        """So far; None where NVML does not count."""
        return None if self.problem else float(self._millijoules()) / 1000


@contextmanager
def count_waits(found: dict[str, Any], on_gpu: bool) -> Iterator[None]:
    """Sets `waits`, a step's calls that made the host wait for the device, and the `waiting_lines` that made them."""
    if not on_gpu:
        yield
        found |= {"waits": None, "waiting_lines": None}
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if WAIT in str(each.message)]
    lines = Counter(f"{'/'.join(Path(each.filename).parts[-3:])}:{each.lineno}" for each in waits)
    found["waits"] = len(waits) / found["steps"]
    found["waiting_lines"] = {line: count / found["steps"] for line, count in lines.most_common(MAX_WAITING_LINES)}


@contextmanager
def trace(found: dict[str, Any], on_gpu: bool) -> Iterator[None]:
    """Sets `trace` to what `read_trace` finds, or to None and `no_trace` to the reason: CUPTI may be out of reach."""
    found |= {"trace": None, "no_trace": "" if on_gpu else "it is taken on GPUs only"}
    profiler = None
    if on_gpu:
        try:
            profiler = profile(activities=[ProfilerActivity.CUDA])
            profiler.start()
        except (AssertionError, RuntimeError) as error:
            profiler, found["no_trace"] = None, f"{type(error).__name__}: {error}"
    yield
    if profiler is None:
        return
    profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = orjson.loads(file.read_bytes())["traceEvents"]
    found["trace"] = read_trace(events, found["seconds"], found["steps"])
    if found["trace"] is None:
        found["no_trace"] = "the profiler saw no kernel"


@contextmanager
def count_flops(found: dict[str, Any], on_gpu: bool) -> Iterator[None]:  # noqa: ARG001 - the interface of a collector
    """Sets `flops` of a step, both passes; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        yield
    found["flops"] = counter.get_total_flops() / found["steps"]
