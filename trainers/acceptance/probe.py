"""The object that a node's measuring process holds; the driver calls its methods, one after the other."""

from __future__ import annotations

import time

import torch

from trainers.acceptance.gpus import cuda_devices, measure_gpus
from trainers.acceptance.host import measure_host
from trainers.acceptance.links import measure_links, open_store
from trainers.contract.acceptance import Measured, Meeting, ProbeRequest, ProbeStarted
from trainers.machine import processor_name


class NodeProbe:
    """Measures one node.

    Args:
        request: What is measured on.
        address: The node's, as other nodes reach it.
    """

    def __init__(self, request: ProbeRequest, address: str) -> None:
        self._request = request
        self._store = open_store(address)

    def start(self) -> ProbeStarted:
        """What the node is."""
        gpus = cuda_devices() if self._request.device == "cuda" else []
        names = tuple(torch.cuda.get_device_name(gpu) for gpu in gpus)
        return ProbeStarted(processor_name(), names, self._store.port)

    def now(self) -> float:
        """The node's clock (Unix seconds)."""
        return time.time()

    def measure(self, keys: tuple[str, ...]) -> list[Measured]:
        """Measures some quantities of the node; those it does not have are left out."""
        found = list(measure_host(self._request, keys))
        if self._request.device == "cuda":
            found += measure_gpus(cuda_devices(), keys, self._request.seconds)
        return found

    def meet(self, meeting: Meeting) -> list[Measured]:
        """Measures the links to other nodes; they are called at the same time."""
        return measure_links(meeting, self._store, self._request.device)
