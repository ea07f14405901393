"""Which kind of failure an exception is: that decides whether starting a trial again can help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from detectron2.utils import comm

from trainers.checkpoints import StorageError
from trainers.contract.events import FailureKind
from trainers.contract.memory import is_out_of_memory
from trainers.contract.problems import ConfigurationError
from trainers.contract.storage import is_storage_failure
from trainers.loading import BadInputError
from trainers.loop import NotFiniteError

FAILURES: list[tuple[type[BaseException] | tuple[type[BaseException], ...], FailureKind]] = [
    (BadInputError, "bad_input"),
    ((NotFiniteError, FloatingPointError), "not_finite"),  # the second is detectron2's, of its proposals
    ((ConfigurationError, ImportError), "configuration"),  # the second: a package that a setting needs
    ((torch.distributed.DistError, ConnectionError), "communication"),
    (StorageError, "storage"),
]
"""The first match counts."""


def classify(error: BaseException) -> FailureKind:
    """The kind of failure that an exception is."""
    if is_out_of_memory(error):  # whatever the library makes of it
        return "out_of_memory"
    if isinstance(error, RuntimeError) and "use_deterministic_algorithms" in str(error):
        return "configuration"  # torch's refusal of an operation, which comes again at each start
    for kind, failure in FAILURES:
        if isinstance(error, kind):
            return failure
    if is_storage_failure(error):  # of another file of the run than a checkpoint, or of a library's
        return "storage"
    text = str(error)
    if isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection", "ProcessGroup")):
        return "communication"
    return "unknown"


def in_short(error: BaseException) -> str:
    """An exception in one line, without the traceback that a loader process puts into its text."""
    text = str(error)
    return text.strip().splitlines()[-1] if "Original Traceback" in text else f"{type(error).__name__}: {text}"


@contextmanager
def ending_together() -> Iterator[None]:
    """A block that ranks which fail together leave together: Ray Train ends them all with the first that ends."""
    try:
        yield
    except NotFiniteError:
        with suppress(Exception):  # one of them has been lost meanwhile
            comm.synchronize()
        raise
