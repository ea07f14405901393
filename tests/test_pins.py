"""What is used of Ray beyond its documented API: an upgrade that changes it fails here, and not in a run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants
from ray.core.generated.export_event_pb2 import ExportEvent
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import DistributedContext
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from orchestrator.execution import cluster, ray_internals
from orchestrator.execution.deaths import is_preemption
from tests.builders.commands import ROOT


@pytest.fixture
def bare_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_table_of_placement_groups_tells_which_are_of_this_job_and_of_which_workers(bare_ray: None) -> None:
    assert ray_internals.placement_groups_of_this_job() == []
    group = placement_group([{"CPU": 1, "memory": 3}])
    assert placement_group_table(group)["bundles"] == {0: {"CPU": 1, "memory": 3}}, "to the byte"
    assert [each.id for each in ray_internals.placement_groups_of_this_job()] == [group.id]
    assert ray_internals.nodes_of_other_jobs() == set()
    remove_placement_group(group)
    assert ray_internals.placement_groups_of_this_job() == []


def test_a_worker_that_died_is_reported_with_the_reason_inside() -> None:
    reason = RuntimeError("the node was lost")
    error = WorkerGroupError("text", {3: WorkerHealthCheckFailedError("a dump of the worker's handle", reason)})
    assert ray_internals.cause_of_death(error.worker_failures[3]) is reason
    assert ray_internals.cause_of_death(reason) is None, "the training function raised it"


def test_a_worker_whose_node_was_taken_away_did_not_fail() -> None:
    taken = RayActorError(error_msg="the node was preempted", preempted=True)
    died = RayActorError(error_msg="the process was killed")

    def group_error(reason: Exception) -> WorkerGroupError:
        return WorkerGroupError("text", {0: WorkerHealthCheckFailedError("a dump", reason)})

    assert is_preemption(group_error(taken))
    assert not is_preemption(group_error(died)) and not is_preemption(None)


def test_ray_train_still_tells_a_callback_about_workers_that_start() -> None:
    watch = ray_internals.StartWatch(lambda rank, reason: None, lambda began, living, connected: None)
    assert RunConfig(callbacks=[watch]).callbacks == [watch]
    assert list(inspect.signature(WorkerGroupCallback.before_init_train_context).parameters) == ["self", "workers"]
    with WorkerGroupCallback().on_worker_group_start():
        pass
    ranks = DistributedContext(world_rank=1, world_size=2, local_rank=1, local_world_size=2, node_rank=0)
    assert {"distributed_context"} <= set(Worker.__annotations__) and ranks.world_rank == 1
    assert list(inspect.signature(Worker.execute_async).parameters)[:2] == ["self", "fn"]


def test_each_worker_can_be_given_its_own_node() -> None:
    assert "label_selector" in inspect.signature(ScalingConfig).parameters


def test_workers_may_end_an_evaluation_before_their_node_goes() -> None:
    assert FailureConfig(preemption_grace_s=60.0).preemption_grace_s == 60.0


SETTINGS = (*cluster.SETTINGS, *cluster.LOCAL_SETTINGS, *cluster.VISIBLE, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S")


@pytest.mark.parametrize("name", [name for name in SETTINGS if "TRAIN" in name])
def test_ray_train_still_reads_a_setting(name: str) -> None:
    package = Path(inspect.getfile(ray)).parent / "train"
    assert any(f'"{name}"' in path.read_text(encoding="utf-8") for path in package.rglob("*.py"))


def test_ray_still_exports_the_state_of_ray_train() -> None:
    names = cluster.VISIBLE["RAY_enable_export_api_write_config"].split(",")
    assert set(names) <= set(ExportEvent.SourceType.keys())
    assert '"RAY_enable_export_api_write_config"' in inspect.getsource(ray_constants)


def test_private_names_of_ray_are_used_in_one_module_only() -> None:
    files = [path for package in ("orchestrator", "trainers") for path in (ROOT / package).rglob("*.py")]
    private = [path.name for path in files if "_internal." in (text := path.read_text()) or "ray._" in text]
    assert private == [] or private == ["ray_internals.py"]
