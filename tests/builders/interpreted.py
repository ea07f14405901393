"""Runs functions where Triton's kernels are interpreted on the CPU."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

Interpreter = Callable[..., Any]
"""Calls a function of a module with arguments in the interpreting process and returns its result."""


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    """A separate process in which kernels are interpreted: Triton reads TRITON_INTERPRET when it is imported.

    One process serves many calls, so use it as a fixture of a test module's scope.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_interpret) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
