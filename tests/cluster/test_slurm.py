"""The batch script on two hosts, with Ray's `symmetric-run` itself and stand-ins for Slurm's own commands."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest
import yaml

from tests.builders.commands import ROOT
from tests.builders.experiments import tiny_experiment
from tests.builders.hosts import SHARED, Network, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.soak]

STAND_INS = {
    "scontrol": '[ "$1" = show ] && printf "host11\\nhost12\\n" || echo "$*" >> "$CALLS"',
    # One task on each host: the other one waits for the command.
    "srun": f'printf "%q " "$@" > {SHARED}/task.new && mv {SHARED}/task.new {SHARED}/task && exec "$@"',
}
TASK = f"until [ -e {SHARED}/task ]; do sleep 0.1; done; cd {ROOT} && eval exec $(cat {SHARED}/task)"


def test_a_batch_job_trains_on_all_of_its_hosts(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    shared = tmp_path / "shared"
    (shared / "bin").mkdir(parents=True)
    for name, line in STAND_INS.items():
        (shared / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (shared / "bin" / name).chmod(0o755)
    script = (ROOT / "cluster/slurm.sh").read_text().replace("runs=/mnt/shared/runs", f"runs={SHARED}/runs")
    (shared / "slurm.sh").write_text(script)
    values = tiny_experiment(trials={"world_sizes": [2], "scaling": "strong"})
    values["resources"] |= {"num_nodes": 2}
    (shared / "tiny.yaml").write_text(yaml.safe_dump(values))
    environment = {
        "SLURM_JOB_NODELIST": "host[11-12]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42",
        "SLURM_JOB_NAME": "night", "CONFIG": f"{SHARED}/tiny.yaml", "CALLS": f"{SHARED}/calls",
    }  # fmt: skip
    token = secrets.token_hex(32)
    with Network() as network:
        first, second = (network.add(f"host{number}", number, shared, token) for number in (11, 12))
        other = second.start(TASK, tmp_path / "second.log", RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="600")
        done = first.run(f"export PATH={SHARED}/bin:$PATH; cd {ROOT} && bash {SHARED}/slurm.sh", **environment)
        output = f"{done.stdout}\n{(tmp_path / 'second.log').read_text()}"
        assert done.returncode == 0, output[-4000:]
        other.wait(timeout=120)
    events = [json.loads(line) for line in (shared / "runs/night/events.jsonl").read_text().splitlines()]
    started = [event for event in events if event["kind"] == "worker_started"]
    assert {event["host"] for event in started} == {"10.77.0.11", "10.77.0.12"}
    (trial,) = json.loads((shared / "runs/night/results.json").read_text())["trials"]
    assert (trial["status"], trial["num_nodes"]) == ("FINISHED", 2)
    assert not (shared / "calls").exists(), "it was queued again"
