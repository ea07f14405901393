"""How figures are written for people: one text per kind of figure, a dash for one that was not measured."""

from __future__ import annotations

import math

NOT_MEASURED = "–"


def number_text(value: float | None, decimals: int) -> str:
    """A number with thousands separators."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"


def count_text(count: float | None) -> str:
    """A whole number."""
    return number_text(count, 0)


def seconds_text(seconds: float | None) -> str:
    """Seconds: whole from 1,000 up, else to a tenth."""
    return number_text(seconds, 0 if seconds is not None and abs(seconds) >= 1000 else 1)


def millisecond_text(seconds: float | None) -> str:
    """Seconds of a step, to a millisecond."""
    return number_text(seconds, 3)


def rate_text(rate: float | None) -> str:
    """Images per second: two decimals, or three significant digits where that would show fewer."""
    return f"{rate:.3g}" if rate is not None and 0 < rate < 1 else number_text(rate, 2)


def percent_text(share: float | None) -> str:
    """A share (0–1) as a percentage to one decimal."""
    return NOT_MEASURED if share is None else f"{number_text(100 * share, 1)} %"


def setting_text(value: float | None) -> str:
    """A setting, such as a learning rate, with the digits it has."""
    return NOT_MEASURED if value is None else f"{value:g}"
