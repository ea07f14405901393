"""What an experiment file may hold at most: no library has to take an endless number, nobody an endless structure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

MAX_NUMBER = 2**31 - 1
"""Largest number of an experiment file; as seconds, it is 68 years."""

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""NUL, and halves of surrogate pairs: YAML's escapes can give them."""

MAX_VALUES, MAX_DEPTH = 100_000, 50
"""Most values of a YAML file, each counted as often as it is referred to, and deepest nesting."""


def usable_numbers(value: Any) -> Any:
    """The value of a field. Raises ValueError where it is, or lists, a number above MAX_NUMBER."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and abs(number) > MAX_NUMBER:
            raise ValueError(f"must be at most {MAX_NUMBER:,}")
    return value


def refuse_bools(value: Any, wanted: Any) -> None:
    """Raises ValueError where true or false stands for a number, also in a list: Python takes them for 1 and 0.

    Args:
        value: As it was given.
        wanted: The type of the field.
    """
    options = _options(wanted)
    if isinstance(value, bool) and {int, float} & set(options) and bool not in options:
        raise ValueError("a number is wanted, not true or false")
    for option in options if isinstance(value, list) else ():
        if get_origin(option) is list:
            for item in value:
                refuse_bools(item, *get_args(option))


def _options(wanted: Any) -> list[Any]:
    """The types of which a value must have one."""
    kind, parts = get_origin(wanted), get_args(wanted)
    if kind is Annotated:
        return _options(parts[0])
    return [option for part in parts for option in _options(part)] if kind in (Union, UnionType) else [wanted]


def unusable(values: Any) -> str:
    """Why a structure of YAML is too large to be meant, as a few aliases make it, or holds what is no text; else ""."""
    waiting, number = [(values, 1)], 0
    while waiting:
        value, depth = waiting.pop()
        number += 1
        if depth > MAX_DEPTH:
            return f"it is nested more than {MAX_DEPTH} levels deep"
        if number > MAX_VALUES:
            return f"it holds more than {MAX_VALUES:,} values"
        if isinstance(value, Mapping | list | tuple | set):
            waiting += [(part, depth + 1) for part in (value.values() if isinstance(value, Mapping) else value)]
        elif isinstance(value, int) and value.bit_length() > 1000:
            return "it holds a number of more than 300 digits"
        elif isinstance(value, str) and (found := _NO_TEXT.search(value)):
            return f"it holds \\u{ord(found[0]):04x}, which no text can hold"
    return ""
