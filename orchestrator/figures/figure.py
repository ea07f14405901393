"""A row of the catalogue of figures, and how numbers are written for people."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

NOT_MEASURED = "–"


def number_text(value: float | None, decimals: int = 0) -> str:
    """A number with thousands separators."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"


def seconds_text(seconds: float | None) -> str:
    """Seconds: whole from 1,000 up, else to a tenth."""
    return number_text(seconds, 0 if seconds is not None and abs(seconds) >= 1000 else 1)


def rate_text(rate: float | None) -> str:
    """Images per second: two decimals, or three significant digits where that would show fewer."""
    return f"{rate:.3g}" if rate is not None and 0 < rate < 1 else number_text(rate, 2)


def percent_text(share: float | None) -> str:
    """A share (0–1) as a percentage to one decimal."""
    return NOT_MEASURED if share is None else f"{number_text(100 * share, 1)} %"


def setting_text(value: float | None) -> str:
    """A setting, such as a learning rate, with the digits it has."""
    return NOT_MEASURED if value is None else f"{value:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the catalogue."""

    key: str
    """Its dotted place in a trial's record. `scaling.` and `fits.` are lists in the run's record, `windows.` is in the
    events only; `*` stands for a name of COCO's or detectron2's, or for a part."""
    heading: str
    """Its name for people."""
    definition: str
    """One sentence."""
    short: str = ""
    """Its name over a column of a narrow terminal, with line breaks; empty where the closing table does not show it."""
    unit: str = ""
    """Empty for counts and ratios."""
    text: Callable[[float | None], str] = number_text
    """How it is written."""
    better: Literal["higher", "lower"] | None = None
    """None where neither direction is better."""
    mlflow: str | None = None
    """Name of its metric in MLflow; None where it is not there."""

    def of(self, record: Any) -> float | None:
        """Its value in a record that has this key."""
        value: float | None = attrgetter(self.key)(record)
        return value
