"""Compiles Triton's kernels into the machine code of GPUs that this machine does not have.

What the compiler needs of a GPU is its architecture alone, and its assembler comes with Triton. So a driver stands in
that knows nothing else, and what calls a kernel is called with tensors on the CPU: the kernel is compiled for the types
and the divisibility of its arguments as Triton finds them, and not started.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

AMPERE, HOPPER = 80, 90
"""Compute capabilities of an A100 and an H100, times ten."""


class Driver:
    """A GPU of an architecture, with nothing to run on."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, _device: int) -> int:
        return 0


def compiled(capability: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls a function that launches kernels and returns what they compile to (`triton.compiler.CompiledKernel`)."""
    kernels = []
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        assert all(0 < number < limit for number, limit in zip(grid, (2**31, 2**16, 2**16), strict=False)), grid
        kernels.append(run(kernel, *args, grid=grid, **options | {"warmup": True}))

    driver.set_active(Driver(capability))
    try:
        with mock.patch.object(triton.JITFunction, "run", compile_only):
            function(*arguments)
    finally:
        driver.set_active(None)  # the next user looks for one
    return kernels


def resources(kernel: Any) -> tuple[int, int]:
    """The registers of a thread of a compiled kernel, and its bytes of local memory: those that did not fit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    (registers, stack), *_ = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return int(registers), int(stack)


def float_operations(kernel: Any) -> Counter[str]:
    """How often each operation on floats is in a compiled kernel, such as `fma.rn.f32`."""
    return Counter(re.findall(r"\b(?:add|sub|mul|div|fma|mad|min|max)\.[\w.]*f(?:32|64)\b", kernel.asm["ptx"]))
