"""Reads detectron2's configs without importing detectron2, which takes seconds and torch.

Three sources: YAML files (its model zoo's or others), the defaults in its source, and a config as a log prints it.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from orchestrator.experiment.credentials import refuse_credentials
from orchestrator.experiment.paths import expanded, local_path
from orchestrator.experiment.reading import Section, read_yaml
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.files import is_file
from trainers.contract.plan import ADDED_CONFIG_KEYS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

COMPUTED_DEFAULTS: Mapping[str, Any] = {
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (512,) * 8,
    "SOLVER.WARMUP_FACTOR": 0.001,
}
"""Defaults that are no literals in detectron2's source; a test compares them."""

MAX_FILES = 100
"""Most files that a model config is read from, each counted as often as one builds on it: detectron2 reads it again."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value that is given to one of detectron2's keys, and where."""

    key: str
    """Dotted. A part that holds a dot itself, which detectron2 does not know in files, is in quotes."""
    value: Any
    """As detectron2 reads it: text such as "(60000, 80000)" is a Python literal to it."""
    file: Path | None = None
    """The YAML file; None for `model.overrides`."""
    line: int | None = None
    """Line in the file, from 1."""
    in_zoo: bool = False
    """Whether the file is one of detectron2's model zoo."""

    @property
    def place(self) -> str:
        """Where it is given, for messages."""
        return f"model.overrides.{self.key}" if self.file is None else f"{self.file}:{self.line}: {self.key}"


def model_value(experiment: Experiment, key: str) -> Any:
    """A detectron2 key's value for an experiment: its override, else the model config's, else detectron2's default.

    A value that the config would compute by code counts as not given. Raises SpecError where there is no such config.
    """
    setting = given_setting(experiment, key)
    return setting.value if setting else default_values().get(key)


def given_setting(experiment: Experiment, key: str) -> Setting | None:
    """What sets a key in an experiment: its override, else its model config; None where detectron2's default holds.

    Raises SpecError where the model config cannot be read.
    """
    if key in experiment.model.overrides:
        return Setting(key, evaluate(experiment.model.overrides[key]))
    return file_settings(experiment.model.config).get(key)


def file_settings(config: str) -> Mapping[str, Setting]:
    """The settings of a model config and the files it builds on (`_BASE_`), by key.

    Raises:
        SpecError: There is no such config; a file of it cannot be read, or builds on itself.
    """
    settings: dict[str, Setting] = {}
    for file in _files(zoo_path(config)):
        settings |= _read(file)[1]
    return settings


def config_files(config: str) -> list[Path]:
    """The files of a model config that are not the model zoo's, bases first. Raises SpecError as `file_settings`."""
    return list(dict.fromkeys(file for file in _files(zoo_path(config)) if not _in_zoo(file)))


def evaluate(value: Any) -> Any:
    """What detectron2 makes of a config's value: text such as "(60000, 80000)" is a Python literal to it."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def zoo_path(config: str) -> Path:
    """Where a model config is: the given path, else in detectron2's model zoo; SpecError where it is neither."""
    local = local_path(config, "model.config")
    if local.suffix not in (".yaml", ".yml", ""):
        raise SpecError(f"model.config: {config}: only YAML configs are read; a .py config would run code")
    if is_file(local):
        return local.absolute()
    zoo = zoo_folder()
    if ".." not in config and is_file(zoo / config):
        return zoo / config
    near = _similar(config, [path.relative_to(zoo).as_posix() for path in sorted(zoo.rglob("*.yaml"))])
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise SpecError(f"model.config: no such file or model zoo config: {config}{hint}")


def _similar(config: str, known: list[str]) -> list[str]:
    """Which of the model zoo's configs may be meant: those of that path, else of that name, else the most similar one.

    Upper and lower case and the suffix do not count.
    """

    def name_of(path: str) -> str:
        return PurePosixPath(path).stem.lower()

    def path_of(path: str) -> str:
        return f"{PurePosixPath(path).parent}/{name_of(path)}".lower()

    key = path_of if "/" in config else name_of
    for same in (path_of, name_of):
        if found := [path for path in known if same(path) == same(config)]:
            return found
    near = difflib.get_close_matches(key(config), map(key, known), n=1, cutoff=0.6)
    return [path for path in known if key(path) in near]


def config_for_workers(config: str) -> str:
    """How workers find a model config: in the zoo by its name, as each node has a copy; elsewhere by absolute path.

    Raises:
        SpecError: There is no such config.
    """
    path = zoo_path(config)
    return path.resolve().relative_to(zoo_folder()).as_posix() if _in_zoo(path) else str(path)


@cache
def default_values() -> dict[str, Any]:
    """detectron2's dotted config keys with their defaults, from its source, and those that workers add."""
    source = (_package() / "config" / "defaults.py").read_text(encoding="utf-8")
    keys: dict[str, Any] = {}
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign):
            continue
        name, value = ast.unparse(statement.targets[0]).removeprefix("_C."), statement.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "CN":  # CN(), or CN({"ENABLED": False})
            keys |= {f"{name}.{key}": part for node in value.args for key, part in ast.literal_eval(node).items()}
        elif name != "_C":
            try:
                keys[name] = ast.literal_eval(value)
            except ValueError:
                keys[name] = COMPUTED_DEFAULTS.get(name)
    return keys | ADDED_CONFIG_KEYS


def printed_values(lines: Iterable[str]) -> dict[str, str]:
    """The values of a config that detectron2 printed to a log, by dotted key, as text; lists are joined by commas.

    The lines (YAML, indented by two blanks) may be cut off or hold foreign ones.
    """
    flat: dict[str, str] = {}
    path: list[str] = []
    for line in lines:
        item = re.match(r"^ *- (.*)$", line)
        if item and path:
            name = ".".join(path)
            flat[name] = f"{flat[name]}, {item[1]}" if name in flat else item[1]
            continue
        match = re.match(r"^( *)([\w.]+):(?: (.*))?$", line)
        if not match:
            continue
        path = [*path[: len(match[1]) // 2], match[2]]
        if match[3]:
            flat[".".join(path)] = match[3].strip().strip("'\"")
    return flat


@cache
def zoo_folder() -> Path:
    """The folder of detectron2's model zoo configs."""
    return (_package() / "model_zoo" / "configs").resolve()


def _in_zoo(path: Path) -> bool:
    return path.resolve().is_relative_to(zoo_folder())


def _package() -> Path:
    package = importlib.util.find_spec("detectron2")
    if package is None or not package.submodule_search_locations:
        raise SpecError("detectron2 is not installed: run `make install`")
    return Path(package.submodule_search_locations[0])


def _files(path: Path) -> list[Path]:
    """A YAML file after all that it builds on, each before what changes it."""
    files = list(islice(_downwards(path), MAX_FILES + 1))
    if len(files) > MAX_FILES:
        raise SpecError(f"{path}: by _BASE_, more than {MAX_FILES} files are read for it; name each file once")
    return files[::-1]


def _downwards(path: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A YAML file before all that it builds on, the last first; `above` are the files that build on it."""
    if path.resolve() in (each.resolve() for each in above):
        raise SpecError(f"{path}: _BASE_ goes round in a circle: {' -> '.join(map(str, (*above, path)))}")
    yield path
    for base in reversed(_read(path)[0]):
        yield from _downwards(base, (*above, path))


@cache
def _read(path: Path) -> tuple[list[Path], dict[str, Setting]]:
    """The bases and the settings of one YAML file."""
    # Some of the zoo's files compute values by a `!!python/object/apply:eval` tag, which nothing else may hold.
    section = read_yaml(path, for_detectron2=True, ignore_code=(in_zoo := _in_zoo(path)))
    refuse_credentials(section, str(path))
    place = f"{path}:{section.lines.get('_BASE_')}: _BASE_"
    bases = [_base_path(path, base, place) for base in _bases(section.pop("_BASE_", []), place)]
    settings = {
        key: Setting(key, evaluate(value), path, line, in_zoo)
        for key, value, line in _flatten(section)
        if not (in_zoo and value is None)  # computed by code
    }
    return bases, settings


def _bases(value: Any, place: str) -> list[str]:
    bases = value if isinstance(value, list) else [value]
    if not all(isinstance(base, str) and base for base in bases):
        raise SpecError(f"{place} is {value!r}; give a path or a list of paths")
    return bases


def _base_path(path: Path, base: str, place: str) -> Path:
    """The file that `_BASE_` names: absolute, from a home folder (`~`), or relative to the file it is in."""
    if "://" in base:
        raise SpecError(f"{place} {base}: configs are not fetched; download it and give its path")
    found = (path.parent / expanded(base, place)).absolute()
    if not is_file(found):
        raise SpecError(f"{place} {base}: no such file: {found}")
    return found


def _flatten(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, int]]:
    """The values of a section by dotted key, each with its line; an empty section is a value of its own."""
    for name, value in section.items():
        key = f'{prefix}"{name}"' if "." in str(name) else f"{prefix}{name}"
        if isinstance(value, Section) and value:
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value, section.lines[name]
