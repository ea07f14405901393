"""The kernel kills a worker for lack of memory: its control group, Ray included, is limited from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.commands import ROOT
from tests.builders.memory_group import MARKER, memory_group
from tests.builders.waiting import wait_for
from trainers.worker import BEFORE_STEP_VARIABLE

TRIAL = """
import sys
from pathlib import Path
from orchestrator.execution.cluster import shutdown, start_ray
from tests.builders.fault_bench import Bench, experiment
from trainers.contract.events import TrialRestarted

folder = Path(sys.argv[1])
start_ray(None)
bench = Bench(folder, folder / "faults.json")
outcome = bench.run(values=experiment(trials={"world_sizes": [1], "scaling": "strong"}))
shutdown()
for event in outcome.of(TrialRestarted):
    print(event.failure, event.message)
print(outcome.ended.status, outcome.ended.reason)
"""


@pytest.mark.train
@pytest.mark.soak
def test_a_worker_that_the_kernel_kills_for_lack_of_memory_is_out_of_memory(tmp_path: Path) -> None:
    marker = tmp_path / "filling"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        MARKER: str(marker),
        BEFORE_STEP_VARIABLE: "tests.builders.memory_group:filling",
    }
    with memory_group() as group:
        command = group.command(sys.executable, "-c", TRIAL, str(tmp_path))
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        wait_for(marker.exists, seconds=300)
        group.limit(2**26)
        wait_for(lambda: group.kills > 0, seconds=60)
        group.lift()
        output, _ = process.communicate(timeout=600)
    *_, restart, end = output.splitlines()
    assert restart.startswith("out_of_memory rank 0: its process died: since it started, the kernel has killed")
    assert "images per worker instead of" in restart and end.strip() == "FINISHED"
