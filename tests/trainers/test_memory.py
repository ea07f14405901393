"""Out of memory is recognised in every library's words, and names a batch that would fit where it can be computed."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch
from torch.distributed import DistBackendError

from tests.builders.trials import plan
from trainers.checkpoints import StorageError
from trainers.contract.memory import Memory, batch_hint, fitting_batch, is_out_of_memory
from trainers.loading import BadInputError
from trainers.rank import classify

TORCH_ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "256000000 bytes. Error code 12 (Cannot allocate memory)"
)
TORCH_ON_GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is free."
)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError(TORCH_ON_CPU),
        torch.OutOfMemoryError(TORCH_ON_GPU),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        RuntimeError("MemoryError: std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("unable to mmap 1048576 bytes from file </torch_1>: Cannot allocate memory (12)"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                     "workers are out of shared memory."),
        ImportError("libtorch_cpu.so: failed to map segment from shared object: Cannot allocate memory"),
        StorageError("the checkpoint could not be written: [Errno 12] Cannot allocate memory"),
        ValueError("Unable to allocate 3.1 GiB for an array"),
        Exception("OpenCV(4.10) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes in function "
                  "'OutOfMemoryError'"),
    ],
    ids=lambda error: str(error)[:40],
)  # fmt: skip
def test_an_exhausted_memory_is_out_of_memory_in_any_librarys_words(error: Exception) -> None:
    assert classify(error) == "out_of_memory"


def test_an_error_that_memory_caused_is_out_of_memory() -> None:
    error = RuntimeError("the step failed")
    error.__cause__ = MemoryError()
    assert classify(error) == "out_of_memory"


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (RuntimeError("could not create a primitive descriptor for a convolution"), "unknown"),
        (ImportError("libgomp.so.1: cannot allocate memory in static TLS block"), "configuration"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "unknown"),
        (RuntimeError("NCCL communicator was aborted"), "communication"),
        (BadInputError.of("a.png", "OSError: image file is truncated"), "bad_input"),
        (OSError(errno.ENOSPC, "No space left on device"), "unknown"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_failures_stay_what_they_are(error: Exception, failure: str) -> None:
    assert classify(error) == failure and not is_out_of_memory(error)


EXHAUST = """
import resource, sys, psutil, torch
from torch import nn
from trainers.rank import classify
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
net(torch.zeros(1, 3, 32, 32)).sum().backward()
limit = psutil.Process().memory_info().vms + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    net(torch.zeros(7, 3, int(sys.argv[1]), int(sys.argv[1]) + 3)).sum().backward()
except BaseException as error:
    print(classify(error), error)
"""


@pytest.mark.parametrize(("size", "room"), [(30, 0), (1000, 10**8)], ids=["oneDNN", "a tensor"])
def test_a_process_that_meets_its_limit_is_out_of_memory(size: int, room: int) -> None:
    command = [sys.executable, "-c", EXHAUST, str(size), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("out_of_memory"), done.stdout + done.stderr


GIB = 2.0**30


def test_the_batch_that_would_fit_is_computed_from_what_the_images_used() -> None:
    # 2 GiB before, 0.5 GiB of weights, so 1 GiB of gradients and momentum: 7 GiB for images, of which each takes 1.
    before, failed = Memory(2 * GIB, 2 * GIB, 10 * GIB), Memory(9 * GIB, 9 * GIB, 10 * GIB)
    asked = "CUDA out of memory. Tried to allocate 1.00 GiB."
    assert fitting_batch(8, before, 0.5 * GIB, failed, asked) == 7
    assert fitting_batch(8, before, 0.5 * GIB, failed, "could not create a primitive") is None, "7 of 7 GiB: no excess"
    assert fitting_batch(1, before, 0.5 * GIB, failed, asked) == 0
    assert fitting_batch(8, before, 0.5 * GIB, Memory(9 * GIB, 9 * GIB, 100 * GIB), asked) is None, "another limit"


def test_the_setting_that_makes_a_trial_fit_is_named() -> None:
    before, failed = Memory(2 * GIB, 2 * GIB, 10 * GIB), Memory(10 * GIB, 10 * GIB, 10 * GIB)

    def hint(**fields: object) -> str:
        return batch_hint(plan(**fields), before, 0.5 * GIB, failed, "")

    assert hint(global_batch_size=16, scaling="weak").endswith("at most 7 would fit (trials.batch_per_worker: 7)")
    assert hint(global_batch_size=16).endswith("at most 7 would fit (model.overrides.SOLVER.IMS_PER_BATCH: 14)")
    assert "and so is one image: make INPUT.MIN_SIZE_TRAIN" in hint(global_batch_size=2)
