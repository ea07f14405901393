"""What `resources.min_workers` may be, what it is refused with, and what preflight says of too little room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.nodes import Node
from orchestrator.experiment.placement import smaller
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from orchestrator.experiment.spec import SpecError
from orchestrator.preflight.fit import check_fit
from orchestrator.report.plan_table import plan_table
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment
from trainers.contract.plan import TrialPlan


def plans(
    *world_sizes: int, overrides: dict[str, Any] | None = None, accumulate: int = 1, **resources: Any
) -> list[TrialPlan]:
    values = tiny_experiment(
        model={"weights": "", "overrides": TINY_OVERRIDES | {"SOLVER.IMS_PER_BATCH": 48} | (overrides or {})},
        trials={"world_sizes": list(world_sizes), "scaling": "strong", "accumulate": accumulate},
        resources={"device": "cpu", "cpus_per_worker": 1, **resources},
    )
    return expand(parse_experiment(values, "test"), Hardware(), "/runs/x", Path("/data"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world_sizes": [4], "min_workers": 3}, "are 2 or 1, none of which is 3 or more; set it to 2 or less"),
        ({"world_sizes": [2, 3], "min_workers": 2}, "fewer than 3 workers .* set it to 1 or less"),
        (
            {"world_sizes": [4], "min_workers": 2, "overrides": {"MODEL.FPN.NORM": "naiveSyncBN"}},
            "MODEL.FPN.NORM naiveSyncBN takes statistics over .* set min_workers to null",
        ),
        ({"world_sizes": [2, 4], "min_workers": 5}, "5 are more than any trial has; set it to less than 4, or to null"),
        ({"world_sizes": [1], "min_workers": 2}, "a trial of one worker cannot run with fewer; set it to null"),
        ({"world_sizes": [4], "resize_after_seconds": 5}, "no effect without min_workers"),
        ({"world_sizes": [4], "min_workers": 2, "resize_after_seconds": 1800}, "given up after 1800 s .*setup"),
        ({"world_sizes": [4], "min_workers": 2, "resize_after_seconds": 0}, "greater than or equal to 1"),
        ({"world_sizes": [4], "min_workers": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        plans(*given.pop("world_sizes"), **given)


def test_batches_of_the_planned_workers_stay_whole_whatever_else_is_set() -> None:
    (plan,) = plans(8, accumulate=3, min_workers=2, num_nodes=4, resize_after_seconds=5)
    assert plan.resize_after_seconds == 5
    for each in smaller(plan):
        assert (each.planned_workers, each.batch_per_worker, each.solver) == (8, 2, plan.solver)
        assert each.world_size * each.batches_per_step * each.batch_per_worker == 48
    assert [(each.world_size, each.batches_per_step, each.num_nodes) for each in smaller(plan)] == [
        (4, 6, None), (2, 12, None),
    ]  # fmt: skip


def test_the_plan_names_the_numbers_of_workers_that_it_may_run_with() -> None:
    assert plan_table(plans(8, min_workers=2)).caption == "with 4 or 2 workers while there is no room for all"
    assert plan_table(plans(8, min_workers=8)).caption is None


def test_it_is_no_matter_for_trials_that_have_no_more_workers_and_layers_that_keep_workers_apart() -> None:
    assert [smaller(plan) for plan in plans(1, 2, min_workers=2, overrides={"MODEL.FPN.NORM": "SyncBN"})] == [[], []]
    assert plans(4, min_workers=1, overrides={"MODEL.FPN.NORM": "BN"})[0].resize_after_seconds == 60


def test_a_trial_that_may_begins_with_fewer_workers_where_nodes_may_come() -> None:
    nodes = [Node(id="a", host="a", address="127.0.0.1", num_gpus=0, num_cpus=2)]
    trials = plans(4, min_workers=2, num_nodes=2)
    (finding,) = check_fit(nodes, trials, nodes_may_come=True)
    assert (finding.level, finding.code) == ("warning", "fewer_workers")
    assert "begins with 2 of 4 workers" in finding.what
    (finding,) = check_fit(nodes, trials)
    assert (finding.level, finding.code) == ("error", "too_few_cpus"), "this machine grows no CPUs"
    (finding,) = check_fit(nodes, plans(6, min_workers=3), nodes_may_come=True)
    assert finding.level == "error" and "asks for 6 workers" in finding.what
