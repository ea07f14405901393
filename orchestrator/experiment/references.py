"""Reads files of published figures (`references/*.yaml`), which reports show next to the measured ones."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from orchestrator.experiment.credentials import refuse_credentials
from orchestrator.experiment.part import Part
from orchestrator.experiment.paths import local_path
from orchestrator.experiment.reading import MAX_SHOWN, read_yaml
from orchestrator.experiment.spec import Experiment, ReferenceRow, SpecError


class _File(Part):
    reference_rows: list[ReferenceRow]


def read_references(path: Path) -> list[ReferenceRow]:
    """The rows of a file that holds nothing but `reference_rows`, as an experiment file may.

    Raises:
        SpecError: The file cannot be read, or is no such file; a line for each problem, with the file and the place.
    """
    values = read_yaml(path)
    refuse_credentials(values, str(path))
    try:
        return _File.model_validate(values).reference_rows
    except ValidationError as error:
        problems = [
            f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg']} (given: {repr(each['input'])[:MAX_SHOWN]})"
            for each in error.errors()
        ]
        raise SpecError("\n".join(problems)) from error


def with_references(experiment: Experiment) -> Experiment:
    """The experiment with the rows of its `reference_files` after its own `reference_rows`.

    Raises:
        SpecError: A file cannot be read, or holds no reference rows.
    """
    rows = [row for name in experiment.reference_files for row in read_references(local_path(name, "reference_files"))]
    return experiment.model_copy(update={"reference_rows": [*experiment.reference_rows, *rows]})
