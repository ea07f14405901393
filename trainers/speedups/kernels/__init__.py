"""Triton's kernels of the speed-ups, imported only where they run: on GPUs, and interpreted in tests."""
