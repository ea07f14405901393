"""What every part of an experiment file is: a frozen model without unknown fields and without endless numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationInfo, field_validator

from orchestrator.experiment.limits import refuse_bools, usable_numbers

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name that becomes a folder, a Ray run and an MLflow experiment."""


class Part(BaseModel):
    """A part of an experiment file; the string under each field is its description in the JSON Schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    _usable_numbers = field_validator("*")(usable_numbers)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_bools(value, cls.model_fields[str(info.field_name)].annotation)
        return value
