"""One Ray and one undisturbed run for all tests of faults."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.builders.fault_bench import Bench, Outcome
from trainers.faults import VARIABLE


@pytest.fixture(scope="package")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A Ray with two CPUs whose workers look for faults."""
    from orchestrator.execution.cluster import shutdown, start_ray

    folder = tmp_path_factory.mktemp("faults")
    faults_file = folder / "faults.json"
    before = dict(os.environ)
    os.environ[VARIABLE] = str(faults_file)
    start_ray(None)
    yield Bench(folder, faults_file)
    shutdown()
    os.environ.clear()  # of Ray's settings as well, for other tests of this process
    os.environ.update(before)


@pytest.fixture(scope="package")
def undisturbed(bench: Bench) -> Outcome:
    """The healthy control: the same trial without any fault."""
    outcome = bench.run()
    assert outcome.ended.status == "FINISHED" and not outcome.fired
    return outcome
