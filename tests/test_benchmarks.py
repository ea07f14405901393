"""The benchmark's own arithmetic: what it counts, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks.measure import Row, table
from benchmarks.training import demo


def test_a_ratio_is_taken_between_neighbours_and_says_which_side_is_faster() -> None:
    durations = Row("a", "b", "s", (1.0, 2.0, 4.0), (2.0, 6.0, 4.0), 2.0, higher_is_better=False)
    assert durations.ratios == [2.0, 3.0, 1.0]
    assert durations.ratio == 2.0 and durations.reached
    rates = Row("a", "b", "images/s", (1.0,), (2.0,), 0.6, higher_is_better=True)
    assert rates.ratio == 0.5 and not rates.reached
    assert "**below**" in table([rates]) and "reached" in table([durations])


@pytest.mark.train
def test_operations_are_counted_forward_and_backward() -> None:
    plan = demo(2, recipe="plain")
    flops, waits = gpu.flops_and_waits(plan)
    # The first 3 x 3 convolution of a residual block: 64 x 64 channels on 24 x 24 pixels of 8 images, three passes.
    one = 3 * 2 * 8 * 24 * 24 * 64 * 64 * 9
    assert 10 * one < flops < 100 * one
    assert waits == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main() == 2
    assert "no GPU" in capsys.readouterr().err
