"""The files a cluster is made from: valid by Ray's own checks, and of one version."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import uuid
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler import _private
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.builders.commands import ROOT
from tests.builders.waiting import DEADLINE_SECONDS, wait_for

CLOUD_ONLY = ("provider", "auth", "available_node_types", "head_node_type")


def cloud() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    return values


def variant_of(mark: str) -> dict[str, Any]:
    """A variant that the file's comments describe, made as they say."""
    text = (ROOT / "ray_cluster.yaml").read_text()
    lines = [line[len(mark) :] for line in text.splitlines() if line.startswith(mark)]
    given = yaml.safe_load("\n".join(lines))
    return {key: value for key, value in cloud().items() if key not in CLOUD_ONLY and key not in given} | given


def google() -> dict[str, Any]:
    return variant_of("#g ")


def on_premises() -> dict[str, Any]:
    return variant_of("#| ")


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def commands(values: dict[str, Any]) -> list[str]:
    return [line for key, lines in values.items() if key.endswith("_commands") for line in lines]


@pytest.mark.parametrize("variant", [cloud, google, on_premises])
def test_the_launcher_takes_it(variant: Any) -> None:
    prepared = prepare_config(deepcopy(variant()))
    validate_config(prepared)
    # The launcher puts its defaults where the file is silent; its setup installs a development build of Ray.
    assert "ray-wheels" not in json.dumps(prepared)
    assert not any("dashboard-host=0.0.0.0" in command for command in commands(prepared))


@pytest.mark.parametrize("variant", [cloud, google, on_premises])
def test_no_key_is_misspelt_where_the_launcher_would_not_say_so(variant: Any) -> None:
    schema = json.loads((Path(_private.__file__).parent.parent / "ray-schema.json").read_text())["properties"]
    values = variant()
    assert set(values["provider"]) <= set(schema["provider"]["properties"])
    (node_type,) = schema["available_node_types"]["patternProperties"].values()
    for node in values.get("available_node_types", {}).values():
        assert set(node) <= set(node_type["properties"])


def test_the_shape_is_a_head_without_work_and_up_to_four_workers_of_eight() -> None:
    values = cloud()
    head, workers = (values["available_node_types"][name] for name in ("head", "gpu8"))
    assert values["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert (workers["resources"]["GPU"], workers["min_workers"], workers["max_workers"]) == (8, 0, 4)
    assert values["max_workers"] == 4


@pytest.mark.parametrize("variant", [cloud, google, on_premises])
def test_nobody_gets_in_without_the_token(variant: Any) -> None:
    values = variant()
    assert "--env RAY_AUTH_MODE=token" in values["docker"]["run_options"]
    assert "~/.ray/auth_token" in values["file_mounts"]
    (start,) = [command for command in values["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "PASSWORD" not in yaml.safe_dump(values)


def test_the_nodes_of_a_cloud_are_started_by_their_type_and_with_an_image_that_is_named() -> None:
    """The launcher drops a `min_workers` of the whole file (`ray up --min-workers`); its own image is for CUDA 11."""
    prepared = prepare_config(cloud() | {"min_workers": 4})
    workers = prepared["available_node_types"]["gpu8"]
    assert workers["min_workers"] == 0 and not prepared.get("min_workers")
    assert "--min-workers" not in (ROOT / "docs/cluster.md").read_text() + (ROOT / "ray_cluster.yaml").read_text()
    assert all("ImageId" in each["node_config"] for each in cloud()["available_node_types"].values())


def test_the_tracking_server_is_started_once(tmp_path: Path) -> None:
    """The launcher's shells have the whole line, with what is searched for, in their own command line."""
    (line,) = [each for each in cloud()["head_start_ray_commands"] if "mlflow_server" in each]
    name = f"server_{uuid.uuid4().hex}"  # no other one of this machine is meant
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/__init__.py").touch()  # goes before the repository's
    starts = tmp_path / "starts"
    code = f"import time\nopen({str(starts)!r}, 'a').write('started\\n')\ntime.sleep(3600)\n"
    (tmp_path / "cluster" / f"{name}.py").write_text(code)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    line = (
        line.replace("mlflow_server", name).replace("cd /app", f"cd {tmp_path}").replace("/tmp/mlflow", f"{tmp_path}/l")
    )
    words = ["bash", "--login", "-c", f"sh -c {shlex.quote(line)}"]
    try:
        subprocess.run(words, check=True)
        wait_for(starts.exists)
        in_front = [*words[:-1], words[-1].replace(" &)", ")")]  # a second one would keep this waiting
        subprocess.run(in_front, check=True, timeout=DEADLINE_SECONDS)
        assert starts.read_text() == "started\n"
    finally:
        for each in psutil.process_iter(["cmdline"]):
            if f"cluster.{name}" in (each.info["cmdline"] or []):
                each.kill()


def test_nccl_and_gloo_take_the_same_interface_everywhere() -> None:
    options = cloud()["docker"]["run_options"]
    names = [option.partition("=")[2] for option in options if "_SOCKET_IFNAME" in option]
    assert len(names) == 2 and len(set(names)) == 1


def test_ray_has_one_version_in_all_files() -> None:
    version = pinned("ray")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [Requirement(text) for text in project["dependencies"] if Requirement(text).name == "ray"]
    assert version in requirement.specifier, "constraints.txt is not of pyproject.toml's range: `make lock`"
    assert requirement.extras == {"default", "train"}  # without `default`, a head has no job server
    # The range admits patch releases of one minor version alone: all nodes must have the same.
    major, minor, *_ = version.split(".")
    assert f"{major}.{int(minor) + 1}" not in requirement.specifier
    for name in ("ray_cluster.yaml", "docker/Dockerfile", "docs/cluster.md", "cluster/rayjob.yaml"):
        text = (ROOT / name).read_text()
        found = re.findall(r"rayproject/ray:(\d+\.\d+\.\d+)|__version__ == \"(.+?)\"|rayVersion: \"?(\d[\d.]+)", text)
        assert found, f"{name} names no version of Ray"
        assert {part for parts in found for part in parts if part} == {version}, name
    for name in ("ray_cluster.yaml", "cluster/rayjob.yaml", "Makefile"):
        tags = re.findall(r"ray-detectron2-benchmark:(\d[\w.]*)", (ROOT / name).read_text())
        assert set(tags) == {project["version"]}, name


def test_the_python_of_the_image_is_one_the_project_takes() -> None:
    base = re.search(r"^ARG BASE=(\S+)$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    assert base and "-py311-" in base[1]


def test_the_image_runs_as_nobody_special_and_installs_as_anybody_does() -> None:
    lines = (ROOT / "docker/Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")][-1] == "USER ray"
    assert any("make install" in line for line in lines)


def test_a_job_is_asked_before_it_is_killed_and_carries_no_credentials() -> None:
    job = yaml.safe_load((ROOT / "cluster/job.yaml").read_text())
    assert set(job) == {"env_vars"}
    assert all(isinstance(value, str) for value in job["env_vars"].values())
    assert int(job["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert not [name for name in job["env_vars"] if re.search("TOKEN|PASSWORD|USERNAME|SECRET|KEY", name)]


def test_what_a_job_sends_is_small_and_enough() -> None:
    from ray._private.runtime_env.packaging import get_uri_for_directory
    from ray.dashboard.modules.job.sdk import JobSubmissionClient  # noqa: F401 - the client's part is installed

    assert get_uri_for_directory(str(ROOT), include_gitignore=True, excludes=[]).startswith("gcs://")
    ignored = [ROOT / name for name in (".gitignore", ".rayignore")]
    patterns = [part for file in ignored for part in file.read_text().splitlines() if part and part[0] != "#"]
    assert {".venv/", ".git", "/runs/", "/data/"} <= set(patterns)
    assert not {"configs", "cluster", "trainers", "orchestrator"} & {pattern.strip("/") for pattern in patterns}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_image_says_when_there_is_nothing_to_build_with() -> None:
    done = subprocess.run(["make", "image", "ENGINE="], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "docker" in done.stderr
