"""What can happen inside a worker: each fault is survived, with its cause, rank and iteration in the record."""

from __future__ import annotations

import pytest

from orchestrator.experiment.spec import Faults, Timeouts
from tests.builders.fault_bench import Bench, Outcome, experiment
from trainers.contract.events import TrialRestarted, WorkerFailed
from trainers.faults import Fault

pytestmark = pytest.mark.train

POLICY = Faults(max_failures=10)


def causes(outcome: Outcome) -> list[str]:
    return [event.failure for event in outcome.of(TrialRestarted)]


def failures(outcome: Outcome) -> list[tuple[str, int]]:
    """Cause and rank of each failure that followed from no other."""
    followed = ("communication",)
    return [(event.failure, event.rank) for event in outcome.of(WorkerFailed) if event.failure not in followed]


def test_one_trial_survives_many_ends_of_its_worker(bench: Bench) -> None:
    kinds = {"raise_async": "unknown", "abort": "worker_lost", "gpu_error": "unknown"}
    faults = [Fault(kind, 0, 2 + 2 * attempt, attempt) for attempt, kind in enumerate(kinds)]  # type: ignore[arg-type]
    ignored = Fault("interrupt", 0, 1)  # Ctrl-C reaches every process of a terminal; the driver decides what it means
    alone = experiment(trials={"world_sizes": [1], "scaling": "strong"})
    outcome = bench.run(ignored, *faults, policy=POLICY, values=alone)
    assert [fault["kind"] for fault in outcome.fired] == ["interrupt", *kinds]
    assert outcome.ended.status == "FINISHED", outcome.ended.reason
    assert causes(outcome) == list(kinds.values())
    assert failures(outcome) == [(kind, 0) for kind in kinds.values()]
    assert "CUDA error" in outcome.of(TrialRestarted)[-1].message


@pytest.mark.soak
def test_what_ends_or_holds_one_of_two_workers_changes_no_weight(bench: Bench, undisturbed: Outcome) -> None:
    kinds = {
        "exit": "unknown",
        "terminate": "worker_lost",
        "crash": "worker_lost",
        "deadlock": "stuck",
        "hold_gil": "stuck",
    }
    faults = [Fault(kind, 1, 2 + 2 * attempt, attempt) for attempt, kind in enumerate(kinds)]  # type: ignore[arg-type]
    outcome = bench.run(*faults, policy=POLICY, timeouts=Timeouts(step=40, heartbeat=30).model_dump())
    assert [fault["kind"] for fault in outcome.fired] == list(kinds)
    assert outcome.ended.status == "FINISHED", outcome.ended.reason
    assert causes(outcome) == list(kinds.values())
    assert failures(outcome) == [(kind, 1) for kind in kinds.values()]
    assert (outcome.state, outcome.scores, outcome.rows) == (undisturbed.state, undisturbed.scores, undisturbed.rows)
