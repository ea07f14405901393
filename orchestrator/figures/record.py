"""What every part of the result record is: a model that refuses unknown fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A part of `results.json`; the string under a field is its description."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
