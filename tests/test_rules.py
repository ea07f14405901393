"""Rules that no tool of `make check` knows, checked on the source itself."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders.commands import ROOT

PACKAGES = ("orchestrator", "trainers", "benchmarks", "cluster")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEXTS = sorted(
    path
    for name in (*PACKAGES, "tests", "docs", "configs", "docker", ".ci")
    for path in (ROOT / name).rglob("*")
    if path.is_file() and path.suffix in {".py", ".md", ".yaml", ".j2", ""} and "__pycache__" not in path.parts
) + [
    ROOT / name
    for name in (
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "Makefile", "pyproject.toml"),
        *("install.sh", "install_detectron2.sh", "ray_cluster.yaml"),
    )
]

MAX_LINES = 310
LONGER = {
    "trainers/contract/events.py": "the format of events.jsonl is read in one piece",
}
"""Files that may be longer, each with the reason."""

PHRASES = (
    r"mend(s|ed)?",
    r"the trap (this|it)|traps this",
    r"(stands?|stood|standing) still",
    r"(is|are|was|were|be|been) told|told of|tells of|tells (it|us|them|what|where|which)",
    r"(made )?anew|for ever|one's own|by way of",
    r"beside",
    r"owed|settled?|evaluation_owed",
)
"""Phrases of a translated text, whole words in any case; CONTRIBUTING.md, "Style"."""

EXEMPT = {
    ("evaluation_owed", "trainers/evaluation_hook.py"): "a key in checkpoints on disk",
    ("mend", "CHANGELOG.md"): "the name that a key had in 0.1.0",
}
"""Where a phrase is meant: (phrase, file) and the reason."""

NAMES = re.compile(
    r"Stay|Story|Sign|Material|Now|there|cells|LOOK_SECONDS|ANSWER_SECONDS|REACH_SECONDS|(MOST|FEWEST|LARGEST)_\w+"
)
"""Identifiers to which the field has better words."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, by `import` and by `from`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def identifiers(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name | ast.FunctionDef | ast.ClassDef | ast.arg):
            yield getattr(node, "id", None) or getattr(node, "name", None) or getattr(node, "arg", "")


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 40 and len(TESTS) > 40 and len(TEXTS) > 100


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_read_from_disk_can_run_code(path: Path) -> None:
    for name, call in calls(path):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"{path.name}:{call.lineno}"
        assert name not in {"pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}, (
            f"{path.name}:{call.lineno}"
        )


def test_one_module_builds_the_torch_trainer() -> None:
    builders = {name_of(path) for path in FILES for name, _ in calls(path) if name.endswith("TorchTrainer")}
    assert builders == {"orchestrator/execution/workers.py"}


def test_other_packages_are_used_by_their_public_names() -> None:
    own = tuple(f"{package}." for package in PACKAGES)
    private = {
        f"{name_of(path)}: {name}"
        for path in FILES
        if path.name != "ray_internals.py"  # see tests/test_pins.py
        for name in imports(path)
        if not name.startswith((*own, "__future__")) and any(part.startswith("_") for part in name.split("."))
    }
    assert private == set()


def test_rays_private_modules_are_named_in_one_file_at_most() -> None:
    found = {
        name_of(path)
        for path in FILES
        if path.parent.name != "benchmarks" and re.search(r"\b(_internal|_private)\b", path.read_text(encoding="utf-8"))
    }
    assert found <= {"orchestrator/execution/ray_internals.py"}


def test_every_module_says_what_it_is_for() -> None:
    modules = [*FILES, *(path for path in TESTS if path.name != "__init__.py")]
    assert [name_of(path) for path in modules if not ast.get_docstring(tree(path))] == []


def test_tests_import_no_tests() -> None:
    assert [name_of(path) for path in TESTS for name in imports(path) if re.search(r"^tests\.(.*\.)?test_", name)] == []


def test_files_are_short_enough_to_be_read() -> None:
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in [*FILES, *TESTS]}
    assert {name: number for name, number in lines.items() if number > MAX_LINES and name not in LONGER} == {}
    assert [name for name in LONGER if lines.get(name, 0) <= MAX_LINES] == [], "no longer needed in LONGER"


@pytest.mark.parametrize("path", [path for path in TEXTS if path != Path(__file__)], ids=name_of)
def test_the_text_is_plain_english(path: Path) -> None:
    text = re.sub(r"\s*\n\s*(# )?", " ", path.read_text(encoding="utf-8"))
    phrases = re.finditer(rf"\b({'|'.join(PHRASES)})\b", text, flags=re.IGNORECASE)
    found = {match[0] for match in phrases if (match[0].lower(), name_of(path)) not in EXEMPT}
    if path.suffix == ".py":
        found |= {name for name in identifiers(path) if NAMES.fullmatch(name)}
    assert found == set()


def test_the_readme_is_short_and_its_tree_has_every_package() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top, shown = "", set()
    for indent, folder in re.findall(r"^( *)(\w+)/ ", text.split("## The tree")[1], flags=re.MULTILINE):
        top = top if indent else folder
        shown.add(f"{top}/{folder}" if indent else folder)
    folders = {parent.as_posix() for name in listed.stdout.splitlines() for parent in Path(name).parents}
    wanted = {
        folder
        for folder in folders
        if not folder.startswith(".")
        and (folder.count("/") == 0 or (folder.count("/") == 1 and folder.split("/")[0] in PACKAGES))
    }
    assert wanted - shown == set(), "add them to the README's tree"
    assert shown - wanted == set(), "take them out of the README's tree"


def test_links_of_the_docs_lead_somewhere() -> None:
    links = [
        (path, target)
        for path in TEXTS
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        if "://" not in target
    ]
    assert len(links) > 20
    assert [f"{name_of(path)}: {target}" for path, target in links if not (path.parent / target).exists()] == []


def test_the_files_that_the_docs_name_exist() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in [*FILES, *TESTS, *ROOT.glob("*.sh")]}
    for path in TEXTS:
        # The log and the changelog are about the past.
        if path.suffix == ".md" and path.name not in {"log.md", "CHANGELOG.md"} and "results" not in path.parts:
            named = set(re.findall(r"`([\w./]+\.(?:py|sh))\b", path.read_text(encoding="utf-8"))) - {
                "tools/train_net.py"
            }
            missing = {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)}
            assert missing == set(), name_of(path)


def test_the_tests_that_show_a_fault_exist() -> None:
    names = {node.name for path in TESTS for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)}
    shown = re.findall(r"::(test_\w+)", (ROOT / "docs/faults.md").read_text(encoding="utf-8"))
    assert len(shown) > 10
    assert [start for start in shown if not any(name.startswith(start) for name in names)] == []


def test_every_command_of_the_docs_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for path in TEXTS:
        if path.suffix == ".md":
            named = set(re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
            assert named <= targets, name_of(path)
