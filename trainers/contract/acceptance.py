"""What crosses between the driver and the process on each node that measures how fast the node is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """What a node is to measure on."""

    device: Literal["cuda", "cpu"]
    """What workers compute on."""
    num_cpus: int
    """CPUs that Ray gives to tasks on the node."""
    seconds: float
    """How long each rate is measured."""
    num_bytes: int
    """Size of the file that is written to the storage of checkpoints, and the most that is read of the data."""
    data_folder: str | None
    """Folder of images that is read; None to read the written file instead."""
    checkpoint_folder: str | None
    """Existing folder that is written to; None where checkpoints go to an address."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One value of a node, of one of its GPUs, or of a group of nodes."""

    key: str
    """Which quantity: a key of `orchestrator.acceptance.quantities`."""
    value: float | None
    """In the quantity's unit; None where it could not be measured."""
    part: str = ""
    """`GPU 3`, or the size of the message (`16 MiB`); "" for the whole node."""
    reason: str = ""
    """Why there is no value, or how to read it."""


@dataclass(frozen=True, slots=True)
class ProbeStarted:
    """What a node says of itself when its measuring process is up."""

    processor: str
    gpus: tuple[str, ...]
    """Model names of the GPUs, in the order of their parts."""
    port: int
    """Where groups meet whose rank 0 is on this node."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """A group of nodes that measures the links between them; the same for all but for the rank."""

    name: str
    """Different for each group and time."""
    rank: int
    size: int
    """Number of nodes."""
    address: str
    """Host of rank 0."""
    port: int
    """`ProbeStarted.port` of rank 0."""
    message_bytes: tuple[int, ...]
    """Sizes of the messages."""
    seconds: float
    """How long each size is measured."""
    timeout_seconds: float
    """For meeting, and for each all-reduce."""
    gpu: int = 0
    """Which of each node's GPUs takes part."""
