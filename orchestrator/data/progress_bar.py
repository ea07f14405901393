"""A progress bar on the error stream for work on files; nothing where that stream is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[int, int | None], None]
"""Called with how much is done, and of how much; None where that is not known."""


@contextmanager
def show_bar(title: str, *, in_bytes: bool = False) -> Iterator[OnProgress]:
    """Shows a bar from the first call on of the function it yields; counts of bytes are shown with their rate."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich import progress as rich
    from rich.console import Console

    counts = (rich.DownloadColumn(), rich.TransferSpeedColumn()) if in_bytes else (rich.MofNCompleteColumn(),)
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *counts, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, visible=False)
        yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)
