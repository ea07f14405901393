"""Rules that no tool of `make check` knows, held over the source itself."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders.commands import ROOT

ROOMS = ("orchestrator", "trainers", "benchmarks", "cluster")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_read_from_disk_can_run_code(path: Path) -> None:
    for name, call in calls(path):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"{path.name}:{call.lineno}"
        assert name not in {"pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}, (
            f"{path.name}:{call.lineno}"
        )


def test_every_heavy_library_has_one_owner() -> None:
    users = {library: set() for library in ("mlflow", "yaml")}
    for path in FILES:
        for library in users:
            if ROOT / "orchestrator" in path.parents and library in imported(path):
                users[library].add(path.name)
    assert users == {"mlflow": {"mlflow_runs.py"}, "yaml": {"reading.py"}}
    builders = {path.name for path in FILES for name, _ in calls(path) if name.endswith("TorchTrainer")}
    assert builders == {"workers.py"}


def test_every_module_says_what_it_is_for() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_the_readmes_tree_has_a_line_for_every_file() -> None:
    listed = subprocess.run(
        ["git", "ls-files", *ROOMS, "configs"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1]
    told = set(re.findall(r"^ +(\S+?\.\S+?)\s", tree, flags=re.MULTILINE))
    there = {Path(name).name for name in listed.stdout.split() if not name.endswith("__init__.py")}
    assert there - told == set(), "add them to the README's tree"
    assert told - there == set(), "take them out of the README's tree"
