"""Refuses addresses with a password or key in an experiment: all its values are in the run's events and plans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.experiment.spec import SpecError
from orchestrator.files import holds_credentials, without_credentials

TRACKING_URI = "tracking.uri"
"""The one field whose address may hold a password: it is recorded without it."""


def refuse_credentials(values: Any, where: str) -> None:
    """Checks every text in nested values.

    Args:
        values: What is read from a file.
        where: Opens the message.

    Raises:
        SpecError: An address holds a password, key, token or signature; the message has its place, and none of it.
    """
    for place, text in _texts(values):
        if place != TRACKING_URI and holds_credentials(text):
            raise SpecError(
                f"{where}: {without_credentials(place)}: the address holds a password or key, which would end up in "
                "the run's files; pass it in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for "
                "s3://…), or download the file by hand and name its path"
            )


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """The texts, each with its place: dotted keys and numbers."""
    if isinstance(value, str):
        yield place, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _texts(part, f"{place}.{key}" if place else str(key))
