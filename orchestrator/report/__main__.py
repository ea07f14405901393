"""`python -m orchestrator.report RUN_FOLDER…`: rebuilds a run's report, or compares several runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.process import prepare_process
from orchestrator.report.writer import write_comparison, write_run
from orchestrator.runlog.folder import read_run_folder


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN_FOLDER...")],
    against: Annotated[Path | None, typer.Option(help="Run that the others are compared with.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the files; default: that of the first run.")] = None,
) -> None:
    """Make the report of a run again, or compare several runs: the first with the others, or all with --against."""
    try:
        folders = [read_run_folder(path.absolute()) for path in ([against] if against else []) + runs]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    place = (output or runs[0]).absolute()
    place.mkdir(parents=True, exist_ok=True)
    for path in write_comparison(folders, place) if len(folders) > 1 else write_run(folders[0], place):
        print(path)


if __name__ == "__main__":
    prepare_process()
    typer.run(main)
