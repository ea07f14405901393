"""Processes on nodes that measure how fast they are: one on each, which keeps all of the node's GPUs for the time."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.execution.nodes import Node
from trainers.acceptance.probe import NodeProbe
from trainers.contract.acceptance import Measured, Meeting, ProbeRequest, ProbeStarted

CLOCK_READINGS = 5
"""How often a node's clock is read; the reading with the fastest answer counts."""

ANSWER_TIMEOUT_SECONDS = 10.0
"""Longest wait for the reading of a clock."""


class Probes:
    """The measuring processes within the `with` block, at whose end they are killed.

    Args:
        requests: What each node is to measure on.
        timeout: Longest wait for them to start (seconds).
    """

    def __init__(self, requests: Mapping[Node, ProbeRequest], timeout: float) -> None:
        self._requests, self._timeout = requests, timeout
        self._actors: dict[Node, Any] = {}
        self._lost: set[Node] = set()
        self.started: dict[Node, ProbeStarted | Exception] = {}
        """What each node is, or why it cannot be measured."""

    def __enter__(self) -> Probes:
        self._start(self._requests)
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def measure(self, keys: Mapping[Node, tuple[str, ...]], timeout: float) -> dict[Node, list[Measured] | Exception]:
        """Measures some quantities of each of some nodes, on all of them at once."""
        return self._wait({node: self._actors[node].measure.remote(wanted) for node, wanted in keys.items()}, timeout)

    def meet(
        self,
        groups: Iterable[Sequence[Node]],
        message_bytes: tuple[int, ...],
        seconds: float,
        timeout: float,
        gpu: int = 0,
    ) -> dict[tuple[Node, ...], list[Measured] | Exception]:
        """Measures the links within groups of nodes, of all groups at once.

        A process that dies or does not answer in time, as NCCL's do where a link hangs, is replaced before its node's
        next meeting.

        Args:
            groups: Groups that have no node in common.
            message_bytes: Sizes of the messages.
            seconds: How long each size is measured.
            timeout: Longest wait (seconds).
            gpu: Which of each node's GPUs takes part.
        """
        members = [tuple(group) for group in groups]
        self._start([node for group in members for node in group if node in self._lost])
        found: dict[tuple[Node, ...], list[Measured] | Exception] = {}
        calls: dict[tuple[tuple[Node, ...], int], Any] = {}
        for group in members:
            if failed := [error for node in group if isinstance(error := self.started[node], Exception)]:
                found[group] = failed[0]
                continue
            first, name, address, size = self.started[group[0]], uuid.uuid4().hex, group[0].address, len(group)
            assert isinstance(first, ProbeStarted)
            for rank, node in enumerate(group):
                meeting = Meeting(
                    name, rank, size, address, first.port, message_bytes, seconds, timeout_seconds=timeout / 2, gpu=gpu
                )
                calls[group, rank] = self._actors[node].meet.remote(meeting)
        for (group, rank), outcome in self._wait(calls, timeout).items():
            if isinstance(outcome, (RayActorError, TimeoutError)):
                ray.kill(self._actors[group[rank]])  # another call would wait for the one that is stuck
                self._lost.add(group[rank])
            if rank == 0 or (isinstance(outcome, Exception) and not isinstance(found[group], Exception)):
                found[group] = outcome
        return found

    def clock_offsets(self, nodes: Iterable[Node]) -> dict[Node, tuple[float, float]]:
        """How far the clocks of some nodes are ahead of this process's, and how uncertain that is (seconds).

        The node's reading is set against the middle between question and answer (F. Cristian, Probabilistic clock
        synchronization, 1989).
        """
        offsets: dict[Node, tuple[float, float]] = {}
        for node in nodes:
            actor = self._actors[node]
            for _ in range(CLOCK_READINGS):
                asked = time.time()
                reading = self._wait({node: actor.now.remote()}, ANSWER_TIMEOUT_SECONDS)[node]
                half = (time.time() - asked) / 2
                if isinstance(reading, Exception):
                    break
                if node not in offsets or half < offsets[node][1]:
                    offsets[node] = (reading - (asked + half), half)
        return offsets

    def _start(self, nodes: Iterable[Node]) -> None:
        """Starts the processes of some nodes, those that were lost again, and waits for them."""
        kind = ray.remote(num_cpus=0, max_restarts=0)(NodeProbe)
        calls = {}
        for node in nodes:
            request = self._requests[node]
            num_gpus = node.num_gpus if request.device == "cuda" else 0
            place = NodeAffinitySchedulingStrategy(node.id, soft=False)
            actor: Any = kind.options(num_gpus=num_gpus, scheduling_strategy=place).remote(request, node.address)
            self._actors[node], calls[node] = actor, actor.start.remote()
        self._lost -= calls.keys()
        self.started |= self._wait(calls, self._timeout)

    def _wait(self, calls: Mapping[Any, Any], timeout: float) -> dict[Any, Any]:
        """What each call returned or raised; a TimeoutError where it did not return in time."""
        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout) if calls else ([], [])
        ready, outcomes = set(done), {}
        for name, call in calls.items():
            try:
                outcomes[name] = ray.get(call) if call in ready else TimeoutError(f"no answer within {timeout:g} s")
            except Exception as error:  # noqa: BLE001 - whatever the node's process or a broken installation raises
                outcomes[name] = error
        return outcomes
