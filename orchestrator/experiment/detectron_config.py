"""Reads detectron2's configs without importing detectron2, which takes seconds and torch.

Three sources: the YAML files of its model zoo, the defaults in its source, and a config as a log prints it.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.experiment.reading import flatten, read_yaml
from orchestrator.experiment.spec import Experiment, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable

ZOO_GROUPS = ("COCO-Detection/", "COCO-InstanceSegmentation/")


def model_value(experiment: Experiment, key: str) -> Any:
    """A detectron2 key's value for an experiment: its override, else the model config's, else detectron2's default.

    A value that the config would compute by code counts as not given. Raises SpecError where there is no such config.
    """
    if key in experiment.model.overrides:
        return evaluate(experiment.model.overrides[key])
    value = _flat_config(zoo_path(experiment.model.config)).get(key)
    return default_values().get(key) if value is None else evaluate(value)


def evaluate(value: Any) -> Any:
    """What detectron2 makes of a config's value: text such as "(60000, 80000)" is a Python literal to it."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError):
        return value


def zoo_path(config: str) -> Path:
    """Where a model config is: in detectron2's model zoo, or the given path; SpecError where it is neither."""
    local = Path(config).expanduser()
    if local.suffix not in (".yaml", ".yml"):
        raise SpecError(f"model.config: {config}: only YAML configs are read; a .py config would run code")
    if local.is_file():
        return local.absolute()
    zoo = _package() / "model_zoo" / "configs"
    if config.startswith(ZOO_GROUPS) and ".." not in config and (zoo / config).is_file():
        return zoo / config
    known = [str(p.relative_to(zoo)) for group in ZOO_GROUPS for p in sorted((zoo / group).glob("*.yaml"))]
    near = difflib.get_close_matches(config, known, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise SpecError(f"model.config: no such file or model zoo config: {config}{hint}")


@cache
def default_values() -> dict[str, Any]:
    """detectron2's dotted config keys with their defaults, from its source; a default that is not a literal is None."""
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
                keys[name] = None
    return keys


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


def _package() -> Path:
    package = importlib.util.find_spec("detectron2")
    if package is None or not package.submodule_search_locations:
        raise SpecError("detectron2 is not installed: run `make install`")
    return Path(package.submodule_search_locations[0])


@cache
def _flat_config(path: Path) -> dict[str, Any]:
    """A detectron2 YAML with its `_BASE_` chain, as dotted keys."""
    # Some of the zoo's files compute values by a `!!python/object/apply:eval` tag, which nothing else may hold.
    values = read_yaml(path, ignore_code=path.resolve().is_relative_to(_package().resolve()))
    base = values.pop("_BASE_", None)
    return {**(_flat_config(path.parent / base) if base else {}), **dict(flatten(values))}
