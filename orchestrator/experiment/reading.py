"""Reads experiment files and `--set`, and explains what is wrong in one; the driver's only module that imports yaml."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.experiment.credentials import refuse_credentials
from orchestrator.experiment.limits import MAX_VALUES, unusable
from orchestrator.experiment.paths import absolute
from orchestrator.experiment.spec import Experiment, SpecError
from orchestrator.files import without_credentials
from trainers.contract.annotations import AnnotationFileError, to_utf8

EXCLUSIVE_FIELDS = (
    ("data.coco2017", "data.coco", "data.generated"),
    ("protocol.eval_period_iterations", "protocol.eval_period_epochs"),
    ("trials.batch_per_worker", "model.overrides.SOLVER.IMS_PER_BATCH"),
)
"""Fields of which an experiment has at most one; a `--set` of one replaces the others."""

MAX_SHOWN = 300
"""Characters of a wrong value that a message shows."""


def load_experiment(path: Path, assignments: list[str] | None = None) -> Experiment:
    """Reads an experiment file and applies `--set KEY=VALUE` to it.

    The value is read as YAML. In `model.overrides.`, the rest of the key is one detectron2 key. Of fields that exclude
    each other, such as `data.generated` and `data.coco`, the one set last replaces the others.

    Raises:
        SpecError: The file cannot be read, is not YAML, has a name that is not UTF-8, an unknown key (the nearest known
            one is named) or a value that is not allowed.
    """
    absolute(path, "experiment file")  # Ray takes no command line that is not UTF-8
    values = read_yaml(path)
    for assignment in assignments or []:
        assign(values, assignment)
    return parse_experiment(values, where=str(path))


class Section(dict[str, Any]):
    """A mapping of a YAML file that knows where its keys are."""

    lines: dict[str, int]
    """Line of each key, from 1."""


class _Loader(yaml.SafeLoader):
    """Makes Sections of mappings, and refuses a key that is given twice in one: YAML's rule is to drop the first."""

    _num_pairs = 0
    """Keys with values so far, each counted as often as a merge key repeats it."""

    def construct_section(self, node: yaml.MappingNode) -> Section:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for (tag, name), times in Counter(keys).items():
            if times > 1 and tag != "tag:yaml.org,2002:merge":
                second = [key for key, _ in node.value if key.value == name][1]
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} is given twice", second.start_mark)
        values: dict[Any, Any] = self.construct_mapping(node, deep=True)
        section = Section(values)
        section.lines = {self.construct_object(key, deep=True): key.start_mark.line + 1 for key, _ in node.value}
        return section

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node. PyYAML raises what Python's conversions do: KeyError for `!!bool maybe`."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            text = f": {node.value[:MAX_SHOWN]!r}" if isinstance(node, yaml.ScalarNode) else ""
            problem = f"not a valid {node.tag.rpartition(':')[2]}{text}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts what merge keys (`<<`) refer to into a mapping; a few lines of them multiply without an end."""
        super().flatten_mapping(node)
        self._num_pairs += len(node.value)
        if self._num_pairs > MAX_VALUES:
            problem = f"merge keys (<<) make more than {MAX_VALUES:,} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _CodeIgnored(_Loader):
    """Reads a value with a `!!python/…` tag as null instead of running it."""


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_section)
_CodeIgnored.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def read_yaml(path: Path, *, for_detectron2: bool = False, ignore_code: bool = False) -> Section:
    """Reads a YAML file that holds a mapping, with the line of every key, without running anything in it.

    Args:
        path: The file, in UTF-8, UTF-16 or UTF-32.
        for_detectron2: Whether detectron2 reads it as well, which takes UTF-8 only.
        ignore_code: Whether a value that code would compute is read as null instead of refusing the file.

    Raises:
        SpecError: The file cannot be read, is not YAML, gives a key twice, or holds no mapping.
    """
    loader = _CodeIgnored if ignore_code else _Loader
    text = _text(path, utf8_only=for_detectron2)
    try:
        values = yaml.load(text, Loader=loader)  # noqa: S506 - made of the safe loader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or str(error)
        if "tag:yaml.org,2002:python/" in problem:
            problem = "code (!!python/…) is run in the installed model zoo only; write out what it computes"
        raise SpecError(f"{path}{line}: not valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of a character that is none, such as "\UFFFFFFFF"
        raise SpecError(f"{path}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise SpecError(f"{path}: it is nested too deeply to be read") from error
    if problem := unusable(values):
        raise SpecError(f"{path}: {problem}")
    if not isinstance(values, Section):
        raise SpecError(f"{path}: must hold a mapping of keys to values, such as NAME: VALUE")
    return values


def _text(path: Path, *, utf8_only: bool) -> str:
    try:
        content = path.read_bytes()
        found = to_utf8(content) if content.strip() else b""
        if utf8_only and not content.endswith(found):
            raise SpecError(f"{path}: not UTF-8, which detectron2 needs; save it as UTF-8")
        return found.decode()
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text from byte {error.start:,} on; save it as UTF-8"
        raise SpecError(f"{path}: cannot be read: {what}") from error
    except (OSError, AnnotationFileError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error


def parse_yaml(text: str) -> dict[str, Any]:
    """Reads text that this program wrote, such as a worker's resolved config."""
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def to_yaml(values: dict[str, Any]) -> str:
    """Values as the text of an experiment file."""
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def parse_experiment(values: dict[str, Any], where: str) -> Experiment:
    """Validates an experiment given as plain values; `where` opens every message. Raises SpecError."""
    refuse_credentials(values, where)
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors()]
        raise SpecError(without_credentials("\n".join(f"{where}: {line}" for line in lines))) from error


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by their dotted keys, each with the prefix in front."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def assign(values: dict[str, Any], assignment: str) -> None:
    """Applies one `--set KEY=VALUE` to the values of an experiment; raises SpecError."""
    key, equals, text = assignment.partition("=")
    shown = without_credentials(assignment)
    if not equals or not key:
        raise SpecError(f"--set {shown}: write it as KEY=VALUE, for example --set trials.world_sizes=[1,2]")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - made of the safe loader
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        problem = without_credentials(f"the value is not valid YAML: {error}")
        raise SpecError(f"--set {shown[:MAX_SHOWN]}: {problem}") from error
    except RecursionError as error:
        raise SpecError(f"--set {key}: it is nested too deeply to be read") from error
    if problem := unusable(value):
        raise SpecError(f"--set {key}: {problem}")
    if value is not None and value is not False:
        _drop_alternatives(values, key)
    path = _parts(key)
    for part in path[:-1]:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise SpecError(f"--set {shown}: {part} has no fields to set")
    values[path[-1]] = value


def _parts(key: str) -> list[str]:
    prefix = "model.overrides."
    return ["model", "overrides", key.removeprefix(prefix)] if key.startswith(prefix) else key.split(".")


def _drop_alternatives(values: dict[str, Any], key: str) -> None:
    """Removes the fields that a `--set` of this key replaces: those of which only one may be given."""
    for fields in EXCLUSIVE_FIELDS:
        replaced = [field for field in fields if not f"{key}.".startswith(f"{field}.")]
        for field in replaced if len(replaced) < len(fields) else ():
            *path, last = _parts(field)
            section: Any = values
            for part in path:
                section = section.get(part) if isinstance(section, dict) else None
            if isinstance(section, dict):
                section.pop(last, None)


def _explain(problem: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        given = "" if isinstance(problem["input"], dict) else f" (given: {repr(problem['input'])[:MAX_SHOWN]})"
        return f"{place or 'experiment'}: {problem['msg'].removeprefix('Value error, ')}{given}"
    name, colon, value = str(problem["loc"][-1]).partition(":")
    if colon and problem["input"] is None:
        return f"{place}: unknown key; YAML wants a space after a colon: `{name}: {value}`"
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
