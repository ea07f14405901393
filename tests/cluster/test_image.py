"""The container image is built on a Debian base and used: no registry and no engine are needed for it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders.commands import ROOT
from tests.builders.experiments import tiny_experiment, write_experiment

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

BASE, IMAGE = "localhost/debian-python:test", "localhost/ray-detectron2-benchmark:test"
PACKAGES = "python3,python3-venv,make,ca-certificates"
NEEDED = ("buildah", "mmdebstrap")


def run(*words: str, **more: object) -> str:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-4000:]}"
    return str(done.stdout)


def mirrors() -> str:
    """Mounts of what this host's pip reads: a build behind a mirror needs the same."""
    configured = run(sys.executable, "-m", "pip", "config", "list") + " /etc/pip.conf /etc/xdg/pip"
    found = {Path(path) for path in re.findall(r"(?:file://)?(/[\w./-]+)", configured)}
    return " ".join(f"--volume {path}:{path}:ro" for path in sorted(found) if path.exists())


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"building without an engine needs root and {', '.join(missing or NEEDED)}")
    folder = tmp_path_factory.mktemp("image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_DRIVER", "vfs")
        patch.setenv("BUILDAH_ISOLATION", "chroot")
        patch.setenv("TMPDIR", str(folder))
        store = folder / "store.conf"
        store.write_text(f'[storage]\ndriver = "vfs"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n')
        patch.setenv("CONTAINERS_STORAGE_CONF", str(store))
        sources = "".join(path.read_text() for path in Path("/etc/apt/sources.list.d").glob("*.sources"))
        debian = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={PACKAGES}", "bookworm"]
        run(*debian, str(folder / "debian"), "-", input=sources)
        scratch = run("buildah", "from", "scratch").strip()
        run("buildah", "copy", "--quiet", scratch, str(folder / "debian"), "/")
        run("buildah", "commit", "--quiet", "--rm", scratch, BASE)
        shutil.rmtree(folder / "debian")
        options = f"BUILD_OPTIONS={mirrors()}"
        run("make", "image", "ENGINE=buildah", f"BASE={BASE}", f"IMAGE={IMAGE}", options, cwd=ROOT)
        name = run("buildah", "from", IMAGE).strip()
        try:
            yield ["buildah", "run", "--volume", f"{folder}:{folder}", name, "--"]
        finally:
            run("buildah", "rm", name)
            shutil.rmtree(folder / "graph", ignore_errors=True)


def test_it_does_not_run_as_root(container: list[str]) -> None:
    assert run(*container, "id", "-un").strip() == "ray"


def test_it_has_the_pinned_ray_and_plans_the_demo(container: list[str]) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and pinned[1] in run(*container, "ray", "--version")
    plan = run(*container, "python", "-m", "orchestrator.run", "--dry-run")
    assert "Results in" in plan


def test_two_workers_train_in_it(container: list[str], tmp_path: Path) -> None:
    folder = Path(container[3].partition(":")[0])
    path = write_experiment(folder, tiny_experiment(trials={"world_sizes": [2], "scaling": "strong"}))
    path.chmod(0o644)
    folder.chmod(0o755)
    home = "/tmp/smoke"
    train = (
        f"mkdir {home} && cd {home} && python -m orchestrator.run {path} --output {home}/run && cat run/results.json"
    )
    assert '"status": "FINISHED"' in run(*container, "sh", "-c", train)
