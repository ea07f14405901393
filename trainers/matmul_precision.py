"""Puts the precision in which torch multiplies matrices on GPUs back to what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def restored_matmul_precision() -> Iterator[None]:
    """Puts the process's switch for TF32 in products of matrices back at the end of the block.

    torch has it twice: `allow_tf32`, and the newer `fp32_precision`, whose value `none` (a wider switch decides) is
    lost when the older one is set.
    """
    matmul = torch.backends.cuda.matmul
    before, inherits = matmul.allow_tf32, matmul.fp32_precision == "none"
    try:
        yield
    finally:
        matmul.allow_tf32 = before
        if inherits:
            matmul.fp32_precision = "none"
