"""What `device: auto` becomes is up to the cluster that a run joins, before anything is refused or rehearsed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator import drive
from orchestrator.execution import cluster as execution
from orchestrator.experiment import plan as plans
from orchestrator.experiment.plan import Hardware
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import SpecError
from orchestrator.findings import Finding
from orchestrator.preflight import cluster as preflight_cluster
from orchestrator.preflight import local, ray_setup, rehearsal
from tests.builders.commands import run_command
from tests.builders.experiments import tiny_experiment, write_experiment
from trainers.contract.plan import TrialPlan

GPUS = Hardware(num_gpus=16, num_cpus=128, num_hosts=2)
ADDRESS = "10.0.0.10:6379"


class Machine:
    """A machine without GPUs, with stand-ins for what talks to Ray; `calls` has what was done, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.calls = folder, list[str]()
        self.rehearsed: list[TrialPlan] = []
        self.checked: list[TrialPlan] = []
        self.ray_problems: list[Finding] = []
        monkeypatch.setattr(plans, "list_gpus", list)
        monkeypatch.setattr(execution, "start_ray", self.start_ray)
        monkeypatch.setattr(ray_setup, "check_ray", lambda _: self.ray_problems)
        monkeypatch.setattr(local, "preflight", self.preflight)
        monkeypatch.setattr(rehearsal.Rehearsal, "start", lambda _: None)
        monkeypatch.setattr(rehearsal.Rehearsal, "findings", lambda _: [])
        monkeypatch.setattr(preflight_cluster, "preflight_cluster", self.preflight_cluster)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def start_ray(self, address: str | None, *_: Any, **__: Any) -> execution.Cluster:
        self.calls.append("ray")
        return execution.Cluster(GPUS if address else Hardware(num_cpus=2), None)

    def preflight(self, _: Any, trials: list[TrialPlan], **__: Any) -> list[Finding]:
        self.calls.append("checks")
        self.rehearsed = trials
        return self.ray_problems

    def preflight_cluster(self, _: Any, trials: list[TrialPlan], __: set[str]) -> list[Finding]:
        self.checked = trials
        return []

    def check(self, **resources: Any) -> int:
        """Preflight's exit code."""
        values = tiny_experiment(resources=resources, storage={"path": str(self.folder)})
        experiment = parse_experiment(values, "test")
        console = Console(file=sys.stderr)
        return drive.check(drive.Request(experiment, self.folder / "run", None, console, True, None, False, False))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_a_cluster_of_gpus_decides_before_anything_is_refused_or_rehearsed(machine: Machine) -> None:
    assert machine.check(address=ADDRESS, evaluation={"gpus": 1}) == drive.DONE
    assert machine.calls == ["ray", "checks"]
    (rehearsed,), (checked,) = machine.rehearsed, machine.checked
    assert (rehearsed.device, rehearsed.evaluation_gpus) == ("cuda", 1)
    assert rehearsed == checked


def test_what_the_cluster_cannot_do_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "start_ray", lambda *_, **__: execution.Cluster(Hardware(num_cpus=8), None))
    with pytest.raises(SpecError, match="the workers train on CPUs"):
        machine.check(address=ADDRESS, evaluation={"gpus": 1})


@pytest.mark.parametrize("resources", [{}, {"device": "cpu"}, {"address": ADDRESS, "device": "cuda"}])
def test_where_the_device_is_known_checks_come_before_ray(machine: Machine, resources: dict[str, Any]) -> None:
    assert machine.check(**resources) == drive.DONE
    assert machine.calls == ["checks", "ray"]


@pytest.mark.parametrize("resources", [{}, {"evaluation": {"gpus": 1}}])
def test_a_cluster_that_does_not_answer_is_a_finding(machine: Machine, resources: dict[str, Any]) -> None:
    machine.ray_problems = [Finding("error", "ray_unreachable", "resources.address", ADDRESS, "no", "Start it")]
    assert machine.check(address=ADDRESS, **resources) == drive.UNFIT
    assert machine.calls == ["checks"]


def test_a_dry_run_says_what_it_took_the_cluster_for(tmp_path: Path) -> None:
    def dry_run(**resources: Any) -> tuple[int, str, str]:
        config = write_experiment(tmp_path, tiny_experiment(resources=resources))
        done = run_command(config, "--dry-run", "--json", cwd=tmp_path, CUDA_VISIBLE_DEVICES="", RAY_ADDRESS="")
        plan = json.loads(done.stdout)[0] if done.returncode == 0 else {}
        return done.returncode, plan.get("device", ""), done.stderr

    code, device, said = dry_run(address=ADDRESS)
    assert (code, device) == (0, "cpu") and "resources.device: auto is taken as cpu" in said
    code, device, said = dry_run(address=ADDRESS, evaluation={"gpus": 1})
    assert (code, device) == (0, "cuda") and "resources.device: auto is taken as cuda" in said
    code, _, said = dry_run(evaluation={"gpus": 1})
    assert code == 2 and "the workers train on CPUs" in said
