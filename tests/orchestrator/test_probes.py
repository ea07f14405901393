"""A measuring process that dies or hangs in a meeting costs that meeting, and no later one of its node."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from orchestrator.execution import probes as probes_module
from orchestrator.execution.cluster import shutdown, start_ray
from orchestrator.execution.nodes import Node, list_nodes
from orchestrator.execution.probes import Probes
from tests.builders.waiting import DEADLINE_SECONDS
from trainers.acceptance.probe import NodeProbe
from trainers.contract.acceptance import Measured, Meeting, ProbeRequest, ProbeStarted


class Fragile(NodeProbe):
    """Does what the files in its node's folder say: an NCCL link that hangs ends its processes, or stops them."""

    def __init__(self, request: ProbeRequest, address: str) -> None:
        super().__init__(request, address)
        self.folder = Path(request.checkpoint_folder or "")

    def start(self) -> ProbeStarted:
        if (self.folder / "broken").exists():
            raise RuntimeError("no driver")
        return super().start()

    def meet(self, meeting: Meeting) -> list[Measured]:
        if (self.folder / "dies").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.folder / "hangs").exists():
            threading.Event().wait()
        return super().meet(meeting)


@dataclass
class Cluster:
    """Three nodes, which are this machine, and their processes."""

    probes: Probes
    nodes: Sequence[Node]
    folders: Sequence[Path]

    def meet(self, first: int, second: int, timeout: float = DEADLINE_SECONDS) -> list[Measured] | Exception:
        pair = self.nodes[first], self.nodes[second]
        return self.probes.meet([pair], (2**16,), 0.01, timeout)[pair]

    def meet_while(self, fault: str, timeout: float = DEADLINE_SECONDS) -> list[Measured] | Exception:
        """Of the first two nodes, while both have a fault."""
        for folder in self.folders[:2]:
            (folder / fault).touch()
        outcome = self.meet(0, 1, timeout)
        for folder in self.folders[:2]:
            (folder / fault).unlink()
        return outcome


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    before = dict(os.environ)
    try:
        start_ray(None)  # as all tests of this process do: Ray reads once whether it asks for a token
        (machine,) = list_nodes()
        nodes = [replace(machine, host=host) for host in "abc"]
        folders = [tmp_path_factory.mktemp(node.host) for node in nodes]
        requests = {
            node: ProbeRequest("cpu", 1, 0.01, 2**10, None, str(folder))
            for node, folder in zip(nodes, folders, strict=True)
        }
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(probes_module, "NodeProbe", Fragile)
            with Probes(requests, DEADLINE_SECONDS) as probes:
                yield Cluster(probes, nodes, folders)
    finally:
        shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize(
    ("fault", "timeout", "error"), [("dies", DEADLINE_SECONDS, RayActorError), ("hangs", 1.0, TimeoutError)]
)
def test_a_process_that_is_lost_in_a_meeting_is_replaced_before_the_next(
    fault: str, timeout: float, error: type[Exception], cluster: Cluster
) -> None:
    assert not [each for each in cluster.probes.started.values() if isinstance(each, Exception)]
    assert isinstance(cluster.meet_while(fault, timeout), error)
    for first, second in [(0, 2), (2, 1), (0, 1)]:
        found = cluster.meet(first, second)
        assert isinstance(found, list), found
        assert [each.key for each in found] == ["latency", "all_reduce"]


def test_a_node_on_which_no_process_starts_again_is_the_reason_of_its_links_alone(cluster: Cluster) -> None:
    cluster.meet_while("dies")
    (cluster.folders[0] / "broken").touch()
    for pair in [(0, 2), (2, 0)]:
        assert "no driver" in str(cluster.meet(*pair))
    assert isinstance(cluster.meet(2, 1), list)
