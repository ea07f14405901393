"""Lets the environment name a function that every rank calls before each step: the benchmark takes turns by it."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable

VARIABLE = "BENCHMARK_BEFORE_STEP"
"""Names a function as `module:function`; it is called once per rank and returns the function to call before steps."""


def from_environment() -> Callable[[], None]:
    """The function that `$BENCHMARK_BEFORE_STEP` asks for; one that does nothing where it is not set."""
    name = os.environ.get(VARIABLE)
    if not name:
        return lambda: None
    before_step: Callable[[], None] = pkgutil.resolve_name(name)()
    return before_step
