"""`install.sh` finds a Python, refuses one that does not fit, and rebuilds an environment of another."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.commands import ROOT

SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"
TOO_OLD = "#!/bin/sh\nexit 1\n"
WITHOUT_VENV = f"""#!/bin/sh
case "$2" in *ensurepip*) exit 1 ;; esac
exec {sys.executable} "$@"
"""


class Machine:
    """A machine that has nothing on its path but what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in ("sh", "dirname", "cat", "find"):
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)

    def has(self, name: str, script: str | None = None) -> Path:
        """Puts a Python on the path: a script, or the real one."""
        path = self.bin / name
        if script is None:
            script = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
        path.write_text(script)
        path.chmod(0o755)
        return path

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.folder), "VENV": str(self.folder / "venv"), **more}
        return subprocess.run(
            ["sh", "install.sh", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_whichever_version_is_there_is_taken(machine: Machine) -> None:
    machine.has("python3.14")
    assert machine.run("--find").stdout.strip() == "python3.14"


def test_a_shim_that_fails_is_passed_over(machine: Machine) -> None:
    machine.has("python3.13", SHIM)
    machine.has("python3.12", TOO_OLD)
    machine.has("python3.11")
    assert machine.run("--find").stdout.strip() == "python3.11"


def test_a_version_that_only_pyenv_has_is_found(machine: Machine) -> None:
    folder = machine.folder / ".pyenv" / "versions" / "3.12.1" / "bin"
    folder.mkdir(parents=True)
    shutil.move(machine.has("python"), folder / "python3")
    assert machine.run("--find").stdout.strip() == str(folder / "python3")


def test_a_machine_without_python_gets_one_clear_line(machine: Machine) -> None:
    machine.has("python3", TOO_OLD)
    done = machine.run()
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no Python from 3.11 to 3.14" in done.stderr


def test_a_python_without_venv_gets_debians_fix(machine: Machine) -> None:
    machine.has("python3", WITHOUT_VENV)
    done = machine.run()
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.strip().endswith(f"apt install {package}")


def test_a_python_without_venv_is_passed_over_where_another_has_it(machine: Machine) -> None:
    machine.has("python3.12", WITHOUT_VENV)
    machine.has("python3.11")
    assert machine.run("--find").stdout.strip() == "python3.11"


def test_a_python_that_was_asked_for_and_does_not_fit_is_refused(machine: Machine) -> None:
    machine.has("python3.11")
    done = machine.run(PYTHON="python3.10")
    assert done.returncode == 2 and done.stderr.startswith("PYTHON=python3.10 is not a Python from 3.11 to 3.14")


def test_an_environment_stays_until_another_python_is_asked_for(machine: Machine) -> None:
    machine.has("python3.11")
    venv = machine.folder / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "python").chmod(0o755)
    assert machine.run("--find").stdout.strip() == str(venv / "python")
    assert machine.run("--find", PYTHON="python3.11").stdout.strip() == "python3.11"


def test_an_environment_of_another_python_is_rebuilt_and_one_that_is_done_is_left_alone(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    for name in ("install.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "install_detectron2.sh").write_text("")
    log = tmp_path / "log"
    # Stands for a Python: it makes an environment that only writes down what pip is asked.
    python = tmp_path / "python3.11"
    python.write_text(
        f"""#!/bin/sh
if [ "$1" = -m ]; then
    echo "venv $*" >> {log}
    mkdir -p {venv}/bin
    cp {tmp_path}/python3.11 {venv}/bin/python
    printf '#!/bin/sh\\necho pip >> {log}\\n' > {venv}/bin/pip
    chmod +x {venv}/bin/*
    exit
fi
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)

    def install(**more: str) -> list[str]:
        environment = {**os.environ, "VENV": str(venv), "PYTHON": str(python), **more}
        subprocess.run(["sh", "install.sh"], cwd=tmp_path, env=environment, check=True)
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.split()[0] for line in lines]

    assert install() == ["venv", "pip"]
    assert install() == []
    assert install(EXTRAS="server") == ["pip"]
    (venv / "bin" / "python").write_text("#!/bin/sh\necho another 3.12\n")
    (venv / "installed").unlink()
    assert install(EXTRAS="server") == ["venv", "pip"]
