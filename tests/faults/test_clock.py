"""The clock is set back in mid-run, or another machine's is off: durations stay what they were, and it is noted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.figures.records import ExperimentResult
from orchestrator.runlog.outbox import FILE_NAME, Outbox
from tests.builders.commands import ROOT
from tests.builders.experiments import write_experiment
from tests.builders.fault_bench import Bench, experiment
from tests.builders.waiting import wait_for
from trainers.contract import clock
from trainers.contract.events import ClockChanged, Evaluated
from trainers.faults import VARIABLE, Fault, fired

pytestmark = pytest.mark.train

SET_BACK = """
# Every Python process of the run imports this file at its start.
import os, pathlib, time
_real, _folder = time.time, pathlib.Path(__file__).parent
def _time():
    if not (_folder / "set-back").exists():
        return _real()
    (_folder / f"seen-by-{os.getpid()}").touch()
    return _real() - 7200
time.time = _time
"""


@pytest.mark.soak
def test_a_clock_that_is_set_back_in_mid_run_changes_no_duration_and_is_noted(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SET_BACK)
    faults, run = tmp_path / "faults.json", tmp_path / "run"
    faults.write_text(json.dumps([dataclasses.asdict(Fault("hold", rank=0, iteration=5))]))
    values = experiment(trials={"world_sizes": [1], "scaling": "strong"})
    command = [sys.executable, "-m", "orchestrator.run", write_experiment(tmp_path, values), "--output", run]
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, VARIABLE: str(faults), "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )  # fmt: skip
    try:
        wait_for(lambda: fired(faults) or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        (tmp_path / "set-back").touch()
        noted: list[ClockChanged] = []

        def look() -> bool:
            events = [event for event, _ in Outbox(run / FILE_NAME).read()]
            noted[:] = [event for event in events if isinstance(event, ClockChanged)]
            return bool(noted) or process.poll() is not None

        wait_for(look)
        faults.unlink()
        output = process.communicate(timeout=600)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert len(list(tmp_path.glob("seen-by-*"))) > 1, "the driver and the worker met the other time"
    assert len(noted) == 1 and noted[0].seconds == pytest.approx(-7200, abs=5)
    result = ExperimentResult.model_validate_json((run / "results.json").read_bytes())
    (trial,) = result.trials
    assert trial.sections is not None and trial.schedule_seconds is not None
    assert 0 < trial.schedule_seconds < trial.sections.wall < 3600
    spent = {
        name: seconds for name, seconds in trial.sections.model_dump().items() if name not in ("other", "step_other")
    }
    assert all(seconds is None or seconds >= 0 for seconds in spent.values()), spent
    assert result.ended is not None and result.started <= result.ended
    assert any("7,200 s behind" in note for note in trial.notes)
    assert "7,200 s behind" in output and "7,200 s behind" in (run / "report.md").read_text()
    info = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(str(trial.mlflow_run_id)).info
    assert info.status == "FINISHED" and info.start_time < info.end_time


@pytest.mark.soak
def test_a_worker_on_a_machine_with_another_clock_takes_the_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_offset", clock._offset - 7200)  # all workers are two hours ahead of this driver
    anchors = iter([clock.anchor()])  # for the actor that takes events; to the workers, it is another machine's
    monkeypatch.setattr(clock, "anchor", lambda: next(anchors, "another-boot 0.0"))
    began = clock.now()
    values = experiment(trials={"world_sizes": [1], "scaling": "strong"})
    values["resources"] = {**values.get("resources", {}), "evaluation": {"cpus": 1}}  # in another process again
    outcome = bench.run(values=values)
    assert outcome.ended.status == "FINISHED", outcome.ended.reason
    times = [event.time for event in outcome.events if event.rank == 0]
    evaluations = outcome.of(Evaluated)
    assert [event.overlapped for event in evaluations] == [True, False]
    times += [event.box_scored for event in evaluations]
    assert began < min(times) and max(times) < clock.now()
    noted = [event.seconds for event in outcome.of(ClockChanged) if event.rank == 0]
    assert noted == [pytest.approx(7200, abs=60)]
