"""Two trials at a time on this machine, by the real command: each ends as it does alone, whatever the other meets."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.bundle.verify import verify
from orchestrator.figures.records import ExperimentResult, TrialResult
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.commands import run_command
from tests.builders.experiments import tiny_experiment, write_experiment
from tests.builders.training import last, train
from tests.builders.waiting import wait_for
from trainers.contract.events import CheckpointSaved, Event, LoopFinished, TrialStarted, WorkerStarted
from trainers.contract.plan import TrialPlan
from trainers.faults import VARIABLE, Fault, fired

pytestmark = pytest.mark.train

SEEDS = ["reference-1xcpu-seed0", "reference-1xcpu-seed1"]


@dataclass
class Run:
    """A run of two trials that are held in the same step until somebody lets them go on."""

    folder: Path
    process: subprocess.Popen[str]

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8")

    def events(self) -> list[Event]:
        return [event for event, _ in Outbox(self.run_dir / FILE_NAME).read()]

    def wait_until_both_are_held(self) -> None:
        def held() -> bool:
            assert self.process.poll() is None, self.output
            return len(fired(self.folder / "faults.json")) == 2

        wait_for(held, lambda: self.output[-3000:])

    def go_on(self) -> None:
        (self.folder / "faults.json").unlink()

    def trials(self) -> list[TrialResult]:
        return ExperimentResult.model_validate_json((self.run_dir / "results.json").read_bytes()).trials


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    values = tiny_experiment(
        trials={"world_sizes": [1], "scaling": "strong", "seeds": [0, 1], "concurrent": 2, "allow_shared_nodes": True},
        protocol={"iterations": 12, "eval_period_iterations": 6, "warmup_iterations": 2},
        storage={"checkpoint_period_iterations": 3},
        log_period_iterations=3,
    )
    config = write_experiment(tmp_path, values)
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> Run:
        hold = Fault("hold", rank=0, iteration=7)
        (tmp_path / "faults.json").write_text(json.dumps([dataclasses.asdict(hold)]))
        with (tmp_path / "output.txt").open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.run", *map(str, arguments or (config, "--output", "run"))],
                cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "COLUMNS": "200", VARIABLE: str(tmp_path / "faults.json")},
            )  # fmt: skip
        started.append(process)
        return Run(tmp_path, process)

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(600)


def states_alone(run: Run) -> list[str]:
    """Hashes of the state that each trial ends with where it is trained in this process, by itself."""
    found = []
    for event in run.events():
        if isinstance(event, TrialStarted):
            folder = str(run.folder / "alone" / event.trial)
            own = {"trial_dir": folder, "checkpoint_dir": f"{folder}/checkpoints"}
            plan = dataclasses.replace(TrialPlan.from_dict(event.plan), **own)
            Path(folder).mkdir(parents=True)
            found.append(str(last(train(plan), LoopFinished).state_sha256))
    return found


@pytest.mark.soak
def test_a_killed_trial_recovers_next_to_another_and_both_end_as_they_do_alone(start: Callable[..., Run]) -> None:
    run = start()
    run.wait_until_both_are_held()  # at the same time: none of them is over when the other is in its seventh step
    pids = {event.trial: event.pid for event in run.events() if isinstance(event, WorkerStarted)}
    killed = pids[SEEDS[1]]
    assert set(pids) == set(SEEDS) and killed is not None
    os.kill(killed, signal.SIGKILL)
    run.go_on()
    assert run.process.wait(600) == 0, run.output

    trials = run.trials()
    assert [trial.name for trial in trials] == SEEDS, "in the order of the plan, whichever ended first"
    assert [[restart.cause for restart in trial.restarts] for trial in trials] == [[], ["worker_lost"]]
    assert [trial.state_sha256 for trial in trials] == states_alone(run)
    assert {event.attempt for event in run.events() if event.trial == SEEDS[0]} == {0}, "it has felt nothing"
    assert Outbox(run.run_dir / FILE_NAME).damage() == {}

    assert [trial.ran_with for trial in trials] == [[SEEDS[1]], [SEEDS[0]]]
    assert all(trial.shared_hosts == trial.hosts for trial in trials)
    assert "up to 2 trials at a time, on shared hosts" in run.output
    assert all(f"{name} iteration 3/12" in run.output for name in SEEDS) and "ETA of the run" in run.output
    assert f"ran at the same time as {SEEDS[0]}" in (run.run_dir / "report.md").read_text(encoding="utf-8")
    client = MlflowClient(f"sqlite:///{run.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    tags: dict[str, Any] = {r.info.run_name: r.data.tags for r in client.search_runs([experiment.experiment_id])}
    assert [tags[name]["ran_with"] for name in SEEDS] == SEEDS[::-1]
    packed = run_command("run", "--to", "b.zip", module="orchestrator.bundle", cwd=run.folder)
    assert packed.returncode == 0, packed.stderr
    assert verify(run.folder / "b.zip", run.folder / "to").findings == []


@pytest.mark.soak
def test_a_stop_is_a_last_checkpoint_of_both_and_resuming_goes_on_with_both(start: Callable[..., Run]) -> None:
    run = start()
    run.wait_until_both_are_held()
    run.process.send_signal(signal.SIGINT)
    logs = [run.run_dir / name / "log.txt" for name in SEEDS]
    wait_for(lambda: all("The driver's command: stop" in log.read_text(encoding="utf-8") for log in logs))
    run.go_on()
    assert run.process.wait(600) == 130, run.output
    saved = {event.trial: event.iteration for event in run.events() if isinstance(event, CheckpointSaved)}
    assert [(trial.status, trial.iterations) for trial in run.trials()] == [("KILLED", saved[name]) for name in SEEDS]

    again = start("--resume", "run")
    again.go_on()
    assert again.process.wait(600) == 0, again.output
    trials = again.trials()
    assert [(trial.status, trial.iterations, trial.num_restarts) for trial in trials] == [("FINISHED", 12, 1)] * 2
    assert [trial.state_sha256 for trial in trials] == states_alone(again)
