"""A cluster whose measurements are drawn: healthy spread, the noise of a busy machine, and what somebody broke."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

from orchestrator.acceptance.quantities import QUANTITIES
from orchestrator.execution.nodes import Node
from trainers.acceptance.links import size_name
from trainers.contract.acceptance import Measured, ProbeStarted

TYPICAL = {
    "usable_cpus": 8.0, "cpu_share": 95.0, "decode": 800.0, "cpu_matrix": 900.0, "shm_size": 32.0, "shm_write": 2.0,
    "data_read": 500.0, "checkpoint_write": 300.0, "gpu_matrix_fp32": 50.0, "gpu_matrix_tf32": 380.0,
    "gpu_matrix_fp16": 650.0, "gpu_matrix_bf16": 680.0, "gpu_memory": 2900.0, "gpu_clock": 1700.0,
    "host_to_gpu": 50.0, "gpu_to_host": 50.0, "gpu_to_gpu": 350.0, "latency": 60.0, "all_reduce": 1.2,
}  # fmt: skip
EXACT = ("usable_cpus", "shm_size")
OF_GPUS = {key for key, row in QUANTITIES.items() if row.device == "cuda"}
H100 = "NVIDIA H100 80GB HBM3"
HEALTHY_SPREAD = 0.25
"""Standard deviation between healthy devices, in tolerances of the quantity."""


class SimulatedCluster:
    """Stands for the processes that measure.

    Args:
        size: Number of nodes, named n0, n1, …
        seed: Of all draws.
        num_gpus: GPUs of each node.
        factors: How much better or worse than healthy the quantity of a host, a part of it or a pair is.
        noise: Called with a generator for each measurement of a rate; what it leaves of the rate.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        num_gpus: int = 0,
        factors: Mapping[tuple[str, ...], float] | None = None,
        noise: Callable[[random.Random], float] = lambda draw: 1 - 0.5 * draw.betavariate(1, 12),
    ) -> None:
        self._draw, self._noise = random.Random(seed), noise  # noqa: S311
        self._factors = dict(factors or {})
        self.nodes = [Node(f"id{i}", f"n{i}", f"10.0.0.{i + 1}", num_gpus, 8) for i in range(size)]
        gpus = (H100,) * num_gpus
        self.started: dict[Node, ProbeStarted | Exception] = {n: ProbeStarted("EPYC", gpus, 1) for n in self.nodes}
        self.broken: dict[tuple[str, ...], str] = {}
        self.offsets: dict[str, float] = {}
        self.num_calls = 0
        parts = ["", *(f"GPU {i}" for i in range(num_gpus))]
        self._true = {
            (node.host, part, key): self._healthy(key)
            for node in self.nodes for part in parts for key in TYPICAL if (key in OF_GPUS) == bool(part)
        }  # fmt: skip
        self._links = {
            (frozenset((a, b)), key): self._healthy(key)
            for a, b in combinations(self.nodes, 2) for key in ("latency", "all_reduce")
        }  # fmt: skip

    def _healthy(self, key: str) -> float:
        if key in EXACT:
            return TYPICAL[key]
        return TYPICAL[key] * self._draw.lognormvariate(0.0, HEALTHY_SPREAD * QUANTITIES[key].tolerance)

    def _measured(self, key: str, true: float, *names: tuple[str, ...]) -> float:
        for name in names:
            true *= self._factors.get((*name, key), 1.0)
        if key in EXACT or key in OF_GPUS:
            return true
        left = self._noise(self._draw)
        return true / left if QUANTITIES[key].less_is_better else true * left

    def measure(self, keys: Mapping[Node, tuple[str, ...]], timeout: float) -> dict[Node, list[Measured] | Exception]:
        self.num_calls += 1
        return {
            node: [
                Measured(key, self._measured(key, true, (host,), (host, part)), part)
                for (host, part, key), true in self._true.items()
                if host == node.host and key in wanted
            ]
            for node, wanted in keys.items()
        }

    def meet(
        self,
        groups: Iterable[Sequence[Node]],
        message_bytes: tuple[int, ...],
        seconds: float,
        timeout: float,
        gpu: int = 0,
    ) -> dict[tuple[Node, ...], list[Measured] | Exception]:
        found: dict[tuple[Node, ...], list[Measured] | Exception] = {}
        for group in groups:
            hosts = tuple(node.host for node in group)
            if reason := next((r for names, r in self.broken.items() if set(names) <= set(hosts)), ""):
                found[tuple(group)] = RuntimeError(reason)
                continue
            names = [*((host,) for host in hosts), hosts]
            pair = frozenset(group[:2])
            values = [Measured("latency", self._measured("latency", self._links[pair, "latency"], *names))]
            rate = self._links[pair, "all_reduce"]
            values += [
                Measured("all_reduce", self._measured("all_reduce", rate, *names), size_name(n)) for n in message_bytes
            ]
            found[tuple(group)] = values
        return found

    def clock_offsets(self, nodes: Iterable[Node]) -> dict[Node, tuple[float, float]]:
        return {node: (self.offsets.get(node.host, 0.0), 0.001) for node in nodes}
