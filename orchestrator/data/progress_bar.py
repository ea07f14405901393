"""A progress bar on the error stream for work on files; nothing where that stream is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

OnProgress = Callable[[int, int | None], None]
"""Called with how much is done, and of how much; None where that is not known."""


@contextmanager
def show_bar(title: str, *, in_bytes: bool = False) -> Iterator[OnProgress]:
    """Shows a bar from its first report on.

    Args:
        title: What is being done.
        in_bytes: The counts are bytes, shown with their rate.

    Yields:
        The function that moves it.
    """
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, visible=False)
        yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)
