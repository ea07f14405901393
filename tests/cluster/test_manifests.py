"""What Kubernetes, Kueue and Slurm are given: valid by their schemas, and going on without anybody."""

import json
import os
import shlex
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import jsonschema
import pytest
import yaml

from tests.builders.commands import ROOT
from tests.builders.crds import LEFT_OUT, SHORTENED, manifests


def rayjob() -> dict[str, Any]:
    return next(each for each in manifests() if each["kind"] == "RayJob")


def schema_for(manifest: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(SHORTENED.read_text())[f"{manifest['apiVersion']} {manifest['kind']}"]
    return schema


@pytest.mark.parametrize("manifest", manifests(), ids=lambda each: each["kind"])
def test_kubernetes_takes_every_manifest(manifest: dict[str, Any]) -> None:
    schema = schema_for(manifest)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)
    unknown = [place for place in places(manifest) if LEFT_OUT in json.dumps(schema_of(schema, place))[:30]]
    assert not unknown, f"{unknown}: `python -m tests.builders.crds` with the files it names"


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value within another."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def schema_of(schema: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    for key in path:
        inner = schema.get("items") if isinstance(key, int) else schema.get("properties", {}).get(key)
        schema = inner or schema["additionalProperties"]
    return schema


def test_any_misspelt_or_mistyped_field_of_a_manifest_is_found() -> None:
    """Each key of each manifest with a letter more, and each of its values as something else."""
    changed = 0
    for manifest in manifests():
        schema = schema_for(manifest)
        validator = jsonschema.Draft202012Validator(schema)
        for *path, last in places(manifest):
            if isinstance(last, int) or "properties" not in schema_of(schema, tuple(path)):
                continue  # an item of a list; a label or a limit, whose names are free
            changed += 1
            assert not validator.is_valid(misspelt(manifest, path, last)), (path, last)
            assert not validator.is_valid(mistyped(manifest, path, last)), (path, last)
    assert changed > 100


def misspelt(manifest: dict[str, Any], path: list[str | int], last: str | int) -> dict[str, Any]:
    broken = deepcopy(manifest)
    parent = reduce(lambda value, key: value[key], path, broken)
    parent[f"{last}x"] = parent.pop(last)  # type: ignore[call-overload]
    return broken


def mistyped(manifest: dict[str, Any], path: list[str | int], last: str | int) -> dict[str, Any]:
    broken = deepcopy(manifest)
    parent = reduce(lambda value, key: value[key], path, broken)
    parent[last] = [1.5] if not isinstance(parent[last], list) else {"x": 1}  # type: ignore[call-overload]
    return broken


def test_the_kuberay_job_is_what_the_launcher_would_start() -> None:
    manifest = rayjob()
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec"]
    # Ray waits for the job's processes to be gone: a shell's child can stay as a zombie (docs/cluster.md, Jobs).
    assert spec["entrypoint"].startswith("exec python -m orchestrator.run")
    assert "-- exec python -m orchestrator.run" in (ROOT / "Makefile").read_text()
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == yaml.safe_load((ROOT / "cluster/job.yaml").read_text())
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 4)
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["image"] == yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["docker"]["image"]
        assert {"name": "shared", "mountPath": "/mnt/shared"} in container["volumeMounts"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        # Loaders share batches through /dev/shm, of which a pod has 64 MiB unless it says otherwise.
        assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]
    # MLflow's password is the driver's alone, and the driver runs in the head's pod.
    assert "mlflow-credentials" in yaml.safe_dump(head) and "mlflow-credentials" not in yaml.safe_dump(workers)


@pytest.mark.parametrize("given", ["JOB=a b", "JOB=a;b", "CONFIG=configs/gone.yaml"])
def test_a_job_that_the_cluster_could_not_start_is_refused_before_it_is_sent(given: str) -> None:
    done = subprocess.run(["make", "-o", "install", "submit", given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and given in done.stderr


def test_a_lost_head_or_driver_of_the_kuberay_job_needs_nobody() -> None:
    manifest = rayjob()
    spec, words = manifest["spec"], shlex.split(manifest["spec"]["entrypoint"])
    folder = words[words.index("--output") + 1]
    assert Path(folder).name == manifest["metadata"]["name"], "found by the job's name"
    assert words[words.index("--resume") + 1] == "auto" and int(words[words.index("--auto-resume") + 1]) > 0
    # KubeRay takes no retries in its interactive mode or on a cluster that it did not make.
    assert spec["submissionMode"] == "K8sJobMode" and spec["backoffLimit"] > 0 and "clusterSelector" not in spec


def test_kueue_admits_the_job_as_a_whole_and_its_queue_has_room_for_it() -> None:
    objects = {each["kind"]: each for each in manifests()}
    job, local, queue = objects["RayJob"], objects["LocalQueue"], objects["ClusterQueue"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    (group,) = queue["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == objects["ResourceFlavor"]["metadata"]["name"]
    assert [each["name"] for each in flavor["resources"]] == group["coveredResources"]
    # Kueue refuses a job that keeps its cluster; `suspend` is its own, and without it would keep the job from starting.
    assert job["spec"]["shutdownAfterJobFinishes"] is True and "suspend" not in job["spec"]
    spec = job["spec"]["rayClusterSpec"]
    assert "enableInTreeAutoscaling" not in spec, "a workload of another size than admitted"
    needed = Counter({"cpu": 1, "memory": 1})  # KubeRay's submitter: half a CPU and 200Mi
    for count, group in ((1, spec["headGroupSpec"]), *((each["replicas"], each) for each in spec["workerGroupSpecs"])):
        requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        assert set(requests) <= set(queue["spec"]["resourceGroups"][0]["coveredResources"])
        for name, amount in requests.items():
            needed[name] += count * int(amount.removesuffix("Gi"))
    quota = {each["name"]: int(each["nominalQuota"].removesuffix("Gi")) for each in flavor["resources"]}
    assert all(needed[name] <= quota[name] for name in needed)


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Runs the batch script with stand-ins for Slurm's commands; returns its exit code and what it called."""
    calls = tmp_path / "calls"
    for name, lines in {
        "scontrol": '[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$0 $*" >> "$CALLS"',
        "srun": 'echo "$0 $*" >> "$CALLS"; [ -z "$WRITES" ] || { mkdir -p "$WRITES"; touch "$WRITES/results.json"; }\n'
        'exit "$CODE"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    script = (ROOT / "cluster/slurm.sh").read_text().replace("runs=/mnt/shared/runs", f"runs={tmp_path}/runs")
    (tmp_path / "slurm.sh").write_text(script)

    def run(code: int, *, restarts: int = 0, writes: bool = True) -> tuple[int, list[str]]:
        calls.write_text("")
        given = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "CODE": str(code),
            "WRITES": f"{tmp_path}/runs/night" if writes else "", "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "night",
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }  # fmt: skip
        done = subprocess.run(["bash", str(tmp_path / "slurm.sh")], env=given, capture_output=True, text=True)
        assert done.stderr == ""
        return done.returncode, [line.replace(f"{tmp_path}/", "") for line in calls.read_text().splitlines()]

    return run


def test_a_slurm_job_starts_one_cluster_and_goes_on_in_the_folder_of_its_name(slurm: Any) -> None:
    code, (call,) = slurm(0)
    assert code == 0
    assert call.startswith("srun ray symmetric-run --address node7:6379 --min-nodes 2 -- python -m orchestrator.run")
    assert "--output runs/night --resume auto" in call and "--set resources.address=auto" in call
    text = (ROOT / "cluster/slurm.sh").read_text()
    options = [word for line in text.splitlines() if line.startswith("#SBATCH") for word in line.split()[1:]]
    assert {"--requeue", "--dependency=singleton", "--ntasks-per-node=1"} <= set(options)
    assert "RAY_AUTH_MODE=token" in text


@pytest.mark.parametrize("code", [1, 137, 247])
def test_a_slurm_job_that_was_cut_off_is_queued_again_a_few_times(slurm: Any, code: int) -> None:
    assert slurm(code) == (code, [ANY, "scontrol requeue 42"])
    assert slurm(code, restarts=2) == (code, [ANY, "scontrol requeue 42"])
    assert slurm(code, restarts=3) == (code, [ANY])


@pytest.mark.parametrize("code", [0, 2, 3, 130])
def test_a_slurm_job_that_came_to_an_end_is_not(slurm: Any, code: int) -> None:
    assert slurm(code) == (code, [ANY])


def test_a_slurm_job_whose_cluster_did_not_start_is_not_taken_for_done(slurm: Any) -> None:
    assert slurm(0, writes=False) == (1, [ANY, "scontrol requeue 42"])
