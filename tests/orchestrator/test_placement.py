"""How many workers go to which host."""

from pathlib import Path

from orchestrator.experiment.placement import equal_shares, smaller
from orchestrator.experiment.plan import Hardware, expand
from orchestrator.experiment.reading import parse_experiment
from tests.builders.experiments import TINY_OVERRIDES, tiny_experiment


def test_the_fewest_hosts_are_taken_that_take_equally_many() -> None:
    assert equal_shares({"a": 8, "b": 8}, 8, None) == {"a": 8}
    assert equal_shares({"a": 8, "b": 8}, 16, None) == {"a": 8, "b": 8}
    assert equal_shares({"a": 3, "b": 3, "c": 2}, 6, None) == {"a": 3, "b": 3}


def test_a_full_host_and_a_nearly_empty_one_are_not_filled_unequally() -> None:
    # Ray would put 3 and 1; two on each do not fit, and four on one do not either.
    assert equal_shares({"a": 3, "b": 1}, 4, None) is None
    assert equal_shares({"a": 3, "b": 1}, 2, None) == {"a": 2}


def test_an_asked_for_number_of_hosts_is_kept() -> None:
    assert equal_shares({"a": 8, "b": 8, "c": 8}, 8, 2) == {"a": 4, "b": 4}
    assert equal_shares({"a": 8}, 8, 2) is None
    assert equal_shares({"a": 8, "b": 8}, 9, 2) is None


def test_no_host_takes_nothing() -> None:
    assert equal_shares({}, 1, None) is None
    assert equal_shares({"a": 0, "b": 2}, 2, None) == {"b": 2}


def test_a_trial_goes_on_with_fewer_workers_only_where_it_may_and_the_batch_divides(tmp_path: Path) -> None:
    def sizes(min_workers: int | None) -> list[int]:
        overrides = TINY_OVERRIDES | {"SOLVER.IMS_PER_BATCH": 12}
        values = tiny_experiment(
            model={"weights": "", "overrides": overrides},
            trials={"world_sizes": [12], "scaling": "strong"},
            resources={"device": "cpu", "num_nodes": 3, "min_workers": min_workers},
        )
        (plan,) = expand(parse_experiment(values, "test"), Hardware(), str(tmp_path), tmp_path)
        plans = smaller(plan)
        assert {each.num_nodes for each in plans} <= {None}
        assert {each.solver for each in plans} <= {plan.solver}, "batch, learning rate and schedule are kept"
        return [each.world_size for each in plans]

    assert sizes(2) == [6, 4, 3, 2]
    assert sizes(5) == [6]
    assert sizes(None) == sizes(12) == []
