"""Out of memory is recognised in every library's words, and names a batch that would fit where it can be computed."""

from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import DistBackendError

from tests.builders.commands import ROOT
from tests.builders.memory_group import memory_group
from tests.builders.trials import plan
from trainers.checkpoints import StorageError
from trainers.contract.memory import (
    Memory,
    batch_hint,
    fitting_batch,
    is_out_of_memory,
    lost_loader_text,
    oom_kills,
    oom_kills_text,
)
from trainers.failures import classify
from trainers.loading import BadInputError

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
        (OSError(errno.ENOSPC, "No space left on device"), "storage"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_failures_stay_what_they_are(error: Exception, failure: str) -> None:
    assert classify(error) == failure and not is_out_of_memory(error)


EXHAUST = """
import resource, sys, threading, psutil, torch
from torch import nn
from trainers.failures import classify
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
net(torch.zeros(1, 3, 32, 32)).sum().backward()
def exhaust():
    limit = psutil.Process().memory_info().vms + int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        net(torch.zeros(7, 3, int(sys.argv[1]), int(sys.argv[1]) + 3)).sum().backward()
    except BaseException as error:
        print(classify(error), error)

# Where no room is left, the main thread's stack cannot grow, which crashes a process; another one has all of its own.
thread = threading.Thread(target=exhaust)
thread.start()
thread.join()
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
    assert fitting_batch(8, before, 0.5 * GIB, failed, "could not create a primitive") is None, "by how much?"
    assert fitting_batch(1, before, 0.5 * GIB, failed, asked) == 0
    assert fitting_batch(8, before, 0.5 * GIB, Memory(9 * GIB, 9 * GIB, 100 * GIB), asked) is None, "another limit"


def test_the_setting_that_makes_a_trial_fit_is_named() -> None:
    weak, strong = plan(global_batch_size=16, scaling="weak"), plan(global_batch_size=16)
    same = "4 with trials.accumulate: 2 make the same step"
    assert batch_hint(weak, 7) == f"; 7 images would fit per worker instead of 8 (trials.batch_per_worker: 7; {same})"
    assert batch_hint(strong, 7).endswith(f"instead of 8 (model.overrides.SOLVER.IMS_PER_BATCH: 14; {same})")
    half = batch_hint(weak, None)
    assert half.endswith(f"; try 4 images per worker instead of 8 (trials.batch_per_worker: 4; {same})")
    halves = dataclasses.replace(strong, accumulate=2)
    assert batch_hint(halves, 3) == (
        "; 3 images would fit per worker instead of 4 (model.overrides.SOLVER.IMS_PER_BATCH: 12; "
        "2 with trials.accumulate: 4 make the same step)"
    )
    for hint in (batch_hint(weak, 0), batch_hint(plan(global_batch_size=2), None)):
        assert hint == "; not even one image fits: make INPUT.MIN_SIZE_TRAIN or the model smaller"


TRAIN_WITH_A_LIMIT = """
import resource, sys, threading, psutil
from pathlib import Path
from tests.builders.training import plan_of
from trainers.contract.channel import Channel, Placement
from trainers.contract.events import WorkerFailed
from trainers.rank import Rank

def limit():
    there = psutil.Process().memory_info().vms + 2**20
    resource.setrlimit(resource.RLIMIT_AS, (there, there))

def train():
    events = []
    plan = plan_of(Path(sys.argv[1]), "mask_rcnn")
    try:
        Rank(plan, 0, Placement(0, 1, 0, 1, "here"), Channel(events.append, lambda _: "run"), limit).train(0.0)
    except Exception:
        (failed,) = [event for event in events if isinstance(event, WorkerFailed)]
        print("FAILED", failed.failure, failed.section, failed.message)

thread = threading.Thread(target=train)  # as above
thread.start()
thread.join()
"""


@pytest.mark.train
def test_a_worker_whose_memory_is_limited_fails_for_that_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAIN_WITH_A_LIMIT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert "FAILED out_of_memory step" in done.stdout, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    assert "; try 2 images per worker instead of 4 (" in done.stdout


V2 = {
    "proc/self/cgroup": "0::/pods/worker\n",
    "sys/fs/cgroup/pods/memory.events": "oom 4\noom_kill 3\noom_group_kill 0\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/docker/7\n4:memory:/docker/7\n0::/\n",
    "sys/fs/cgroup/memory/docker/7/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
}
SEEN_AS_ROOT = {"proc/self/cgroup": "0::/host/path\n", "sys/fs/cgroup/memory.events": "oom_kill 5\n"}
MACHINE = {"proc/vmstat": "pgfault 9\noom_kill 1\n"}


@pytest.mark.parametrize(
    ("files", "count"),
    [(V2 | MACHINE, 3), (V1 | MACHINE, 2), (SEEN_AS_ROOT | MACHINE, 5), (MACHINE, 1), ({"proc/vmstat": "a 1\n"}, None)],
    ids=["cgroup v2", "cgroup v1", "a container", "no cgroup", "an old kernel"],
)
def test_the_kernels_own_count_of_what_it_killed_is_read(
    files: dict[str, str], count: int | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == count


def test_only_a_count_that_rose_says_that_the_kernel_killed() -> None:
    assert oom_kills_text(2, 2) == oom_kills_text(None, 3) == oom_kills_text(3, None) == ""
    assert "the kernel has killed a process on its node for lack of memory" in oom_kills_text(2, 3)
    assert "killed 2 processes" in oom_kills_text(0, 2)
    lost = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    assert lost_loader_text(lost, oom_kills()) == "", "for another reason"
    assert lost_loader_text(lost, -1) and not lost_loader_text(RuntimeError("another error"), -1)


TRAIN_WITH_HUNGRY_LOADERS = """
import dataclasses, multiprocessing, sys
from pathlib import Path
from tests.builders.training import plan_of
from trainers import loading
from trainers.contract.channel import Channel, Placement
from trainers.contract.events import WorkerFailed
from trainers.rank import Rank

mapped = loading._mapped

def hungry(mapper, record):
    if multiprocessing.parent_process():
        Path("/proc/self/oom_score_adj").write_text("1000")
        print(len(b"x" * 2**32))
    return mapped(mapper, record)

loading._mapped = hungry
events = []
plan = dataclasses.replace(plan_of(Path(sys.argv[1]), "mask_rcnn"), loader_workers=1)
try:
    Rank(plan, 0, Placement(0, 1, 0, 1, "here"), Channel(events.append, lambda _: "run")).train(0.0)
except Exception:
    (failed,) = [event for event in events if isinstance(event, WorkerFailed)]
    print("FAILED", failed.failure, failed.section, failed.message)
"""


@pytest.mark.train
def test_a_loader_process_that_the_kernel_killed_is_out_of_memory(tmp_path: Path) -> None:
    with memory_group() as group:
        group.limit(2 * 2**30)
        command = group.command(sys.executable, "-c", TRAIN_WITH_HUNGRY_LOADERS, str(tmp_path))
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert "FAILED out_of_memory step RuntimeError: DataLoader worker" in done.stdout, done.stdout + done.stderr
    assert "the kernel has killed a process on its node for lack of memory" in done.stdout
