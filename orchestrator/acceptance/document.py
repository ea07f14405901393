"""What an acceptance leaves: `acceptance.json`, with every value, and what was found in them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from orchestrator.files import is_folder, write_atomically
from trainers.contract.acceptance import Measured

FILE_NAME = "acceptance.json"

FIT, BEHIND, NOT_MEASURED = 0, 1, 2
"""Exit codes: all nodes and links are as good as their peers; one falls behind or is faulty; one cannot be measured."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What was measured of a node."""

    host: str
    address: str
    num_cpus: int
    """CPUs that Ray offers."""
    processor: str = ""
    gpus: tuple[str, ...] = ()
    """Model names of its GPUs."""
    values: tuple[Measured, ...] = ()
    """The best of each quantity's measurements."""
    clock_offset_seconds: float | None = None
    """How far its clock is ahead of the driver's."""
    clock_uncertainty_seconds: float | None = None
    reason: str = ""
    """Why it could not be measured; "" where it was."""


@dataclass(frozen=True, slots=True)
class LinkRecord:
    """What was measured between nodes: two, or all of them at once."""

    hosts: tuple[str, ...]
    gpu: int | None
    """Which of each node's GPUs took part; None for CPUs."""
    values: tuple[Measured, ...] = ()
    reason: str = ""
    """Why it could not be measured; "" where it was."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Something that is not as it should be."""

    level: Literal["behind", "hint"]
    """`behind`: worse than its peers, or faulty. `hint`: worth a look; the cluster is accepted."""
    hosts: tuple[str, ...]
    """The node; or the two whose link it is."""
    key: str
    """Quantity, `link` or `gpu_fault`."""
    part: str
    what: str
    """A sentence with the value, its peers' and the unit."""
    value: float | None = None
    typical: float | None = None
    """Median of the peers."""

    @property
    def place(self) -> str:
        """`host a`, or `link a - b`."""
        return f"host {self.hosts[0]}" if len(self.hosts) == 1 else f"link {' - '.join(self.hosts)}"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A whole acceptance."""

    experiment: str
    started: str
    """UTC, ISO 8601."""
    device: Literal["cuda", "cpu"]
    short: bool
    """Whether only what preflight measures was measured."""
    nodes: tuple[NodeRecord, ...]
    links: tuple[LinkRecord, ...]
    """Pairs, then all nodes together."""
    verdicts: tuple[Verdict, ...]
    seconds: float
    """How long it took."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """`NOT_MEASURED` wins: a node that is silent may be worse than one that is slow."""
        if not self.nodes or any(node.reason for node in self.nodes):
            return NOT_MEASURED
        return BEHIND if any(verdict.level == "behind" for verdict in self.verdicts) else FIT

    def slow_hosts(self) -> tuple[str, ...]:
        """Nodes that fall behind by themselves; a slow link accuses neither of its ends."""
        slow = (each.hosts[0] for each in self.verdicts if each.level == "behind" and len(each.hosts) == 1)
        return tuple(dict.fromkeys(slow))

    def medians(self) -> dict[tuple[str, str], float]:
        """Median of each quantity over nodes, GPUs and pairs, by key and, of links, size of the message."""
        values: dict[tuple[str, str], list[float]] = defaultdict(list)
        for node in self.nodes:
            for each in node.values:
                if each.value is not None and each.key != "gpu_fault":
                    values[each.key, ""].append(each.value)
        for link in self.links:
            together = "" if len(link.hosts) == 2 else "all nodes"
            for each in link.values:
                if each.value is not None:
                    values[each.key, ", ".join(filter(None, (each.part, together)))].append(each.value)
        return {name: statistics.median(found) for name, found in values.items()}


def write_document(acceptance: Acceptance, folder: Path) -> Path:
    """Writes `acceptance.json` into a folder and returns its path. Raises OSError."""
    path = folder / FILE_NAME
    write_atomically(path, msgspec.json.format(msgspec.json.encode(acceptance)))
    return path


def read_document(path: Path) -> Acceptance:
    """Reads what `write_document` has written, from the file or the folder that holds it.

    Raises:
        OSError: It cannot be read.
        ValueError: It is something else.
    """
    file = path / FILE_NAME if is_folder(path) else path
    try:
        return msgspec.json.decode(file.read_bytes(), type=Acceptance)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{file} is not the result of an acceptance: {error}") from error
