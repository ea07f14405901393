"""Fetches torch's record of a process's last NCCL collectives from outside, while it hangs in one of them.

ProcessGroupNCCL keeps the record in a ring buffer, listens on a named pipe, and writes a file when anything comes
through it (`DumpPipe` and `TORCH_NCCL_DEBUG_INFO_PIPE_FILE` in torch's ProcessGroupNCCL.hpp). `torchfrtrace` reads such
files. No GPU has run this yet: a stand-in that does the same is tested.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

STEM_VARIABLE = "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"

ANSWER_TIMEOUT_SECONDS = 10.0
"""Longest wait for the file: torch looks at the pipe once a second."""

POLL_INTERVAL_SECONDS = 0.1


def settings(stem: str) -> dict[str, str]:
    """Variables for the processes of one attempt.

    Args:
        stem: Path of pipes and files without the rank at their end; another one for each attempt on a node.
    """
    return {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_FR_DUMP_TEMP_FILE": stem, STEM_VARIABLE: stem}


def hide(rank: int) -> None:
    """Removes the name of this process's pipe, so that nothing is left of a process that is killed.

    Whoever asks for the record finds the pipe among what the process has open.
    """
    if stem := os.environ.get(STEM_VARIABLE):
        Path(f"{stem}{rank}.pipe").unlink(missing_ok=True)


def fetch(pid: int) -> bytes | None:
    """The record of a process of this machine, pickled; None where it keeps none or does not answer."""
    with contextlib.suppress(OSError, psutil.Error):
        stem = psutil.Process(pid).environ().get(STEM_VARIABLE)
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            opened = str(descriptor.readlink()).removesuffix(" (deleted)")
            if stem and opened.startswith(stem) and opened.endswith(".pipe"):
                return _dump(descriptor, Path(opened).with_suffix(""))
    return None


def _dump(pipe: Path, file: Path) -> bytes | None:
    """Has torch write its record into a file, reads that, and removes it."""
    descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(descriptor, b"1")
    finally:
        os.close(descriptor)
    deadline, before, content = time.monotonic() + ANSWER_TIMEOUT_SECONDS, b"", b""
    while (not content or content != before) and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_SECONDS)
        before, content = content, file.read_bytes() if file.exists() else b""
    file.unlink(missing_ok=True)
    return content or None
