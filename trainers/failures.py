"""Classifies what ended a rank's training: the kind decides whether starting again can help."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

import torch

from trainers.checkpoints import StorageError
from trainers.contract.events import FailureKind
from trainers.loading import BadInputError
from trainers.loop import NotFiniteError
from trainers.mask_rcnn import ConfigurationError

_KINDS: list[tuple[type[BaseException] | tuple[type[BaseException], ...], FailureKind]] = [
    (BadInputError, "bad_input"),
    ((NotFiniteError, FloatingPointError), "not_finite"),  # the second is detectron2's, of its proposals
    (ConfigurationError, "configuration"),
    ((torch.OutOfMemoryError, MemoryError), "out_of_memory"),
    ((torch.distributed.DistError, ConnectionError), "communication"),
    (StorageError, "storage"),
    (BrokenProcessPool, "worker_lost"),
]


def classify(error: BaseException) -> FailureKind:
    """The kind of failure that an exception is."""
    for kind, failure in _KINDS:
        if isinstance(error, kind):
            return failure
    text = str(error)
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:  # torch on CPU
        return "out_of_memory"
    if isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection", "ProcessGroup")):
        return "communication"
    return "unknown"


def in_short(error: BaseException) -> str:
    """An exception in one line, without the traceback that a loader process puts into its text."""
    text = str(error)
    return text.strip().splitlines()[-1] if "Original Traceback" in text else f"{type(error).__name__}: {text}"
