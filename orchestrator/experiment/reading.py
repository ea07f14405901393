"""Reads experiment files and `--set`, and explains what is wrong in one; the only module that imports yaml."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.experiment.spec import Experiment, SpecError


def load_experiment(path: Path, assignments: list[str] | None = None) -> Experiment:
    """Reads an experiment file and applies `--set KEY=VALUE` to it.

    The value is read as YAML. In `model.overrides.`, the rest of the key is one detectron2 key.

    Raises:
        SpecError: The file cannot be read, is not YAML, has an unknown key (the nearest known one is named) or a value
            that is not allowed.
    """
    values = read_yaml(path)
    for assignment in assignments or []:
        _assign(values, assignment)
    return parse_experiment(values, where=str(path))


class _CodeIgnored(yaml.SafeLoader):
    """Reads a value with a `!!python/…` tag as null instead of running it."""


_CodeIgnored.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def read_yaml(path: Path, *, ignore_code: bool = False) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping, without running anything in it.

    With `ignore_code`, a value that code would compute is read as null instead of refusing the file.

    Raises:
        SpecError: The file cannot be read, is not YAML, or holds no mapping.
    """
    loader = _CodeIgnored if ignore_code else yaml.SafeLoader
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 - both are safe loaders
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SpecError(f"{path}: must hold a mapping of keys to values (name: …, data: …)")
    return values


def parse_yaml(text: str) -> dict[str, Any]:
    """Reads text that this program wrote, such as a worker's resolved config."""
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def to_yaml(values: dict[str, Any]) -> str:
    """Values as the text of an experiment file."""
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def parse_experiment(values: dict[str, Any], where: str) -> Experiment:
    """Validates an experiment given as plain values; `where` opens every message. Raises SpecError."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors()]
        raise SpecError("\n".join(f"{where}: {line}" for line in lines)) from error


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by their dotted keys, each with the prefix in front."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _assign(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise SpecError(f"--set {assignment}: write it as KEY=VALUE, for example --set trials.world_sizes=[1,2]")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {assignment}: the value is not valid YAML: {error}") from error
    prefix = "model.overrides."
    path = ["model", "overrides", key.removeprefix(prefix)] if key.startswith(prefix) else key.split(".")
    for part in path[:-1]:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise SpecError(f"--set {assignment}: {part} has no fields to set")
    values[path[-1]] = value


def _explain(problem: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
        return f"{place or 'experiment'}: {problem['msg'].removeprefix('Value error, ')}{given}"
    known = _fields_at(problem["loc"][:-1])
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
    return f"{place}: unknown key; {hint}"


def _fields_at(loc: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the model that a place in an experiment file belongs to."""
    schema = Experiment.model_json_schema()
    node: dict[str, Any] = schema
    for part in loc:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
        options = [node, *node.get("anyOf", [])]
        node = next((o for o in options if "$ref" in o or "items" in o or "properties" in o), node)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return list(node.get("properties", {}))
