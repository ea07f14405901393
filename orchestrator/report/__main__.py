"""`python -m orchestrator.report ENTRY…`: rebuilds a run's report, compares several, or makes one page of many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.files import is_file
from orchestrator.process import prepare_process
from orchestrator.report.entries import Unpacked, read_entries
from orchestrator.report.writer import write_comparison, write_run
from orchestrator.runlog.folder import read_run_folder


def main(
    entries: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs; with --to also bundles and reference files.", metavar="ENTRY..."),
    ],
    against: Annotated[Path | None, typer.Option(help="Run that the others are compared with.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the files; default: that of the first run.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder for one page with a table of all entries.")] = None,
) -> None:
    """Make the report of a run again, compare several (the first with the others, or all with --against), or make one
    page of many entries (--to).
    """  # noqa: D205 - the command's help is one paragraph
    if to and (against or output):
        raise typer.BadParameter("--to makes one page of all entries; leave out --against and --output")
    try:
        paths = _page(entries, to) if to else _reports(entries, against, output)
    except (OSError, ValueError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise typer.Exit(2) from None
    for path in paths:
        print(path)


def _reports(runs: Sequence[Path], against: Path | None, output: Path | None) -> list[Path]:
    for path in runs:
        if is_file(path):
            raise ValueError(f"{path}: not a run's folder; bundles and files of references are shown by --to FOLDER")
    folders = [read_run_folder(path.absolute()) for path in [*([against] if against else []), *runs]]
    place = (output or runs[0]).absolute()
    place.mkdir(parents=True, exist_ok=True)
    return write_comparison(folders, place) if len(folders) > 1 else write_run(folders[0], place)


def _page(entries: Sequence[Path], place: Path) -> list[Path]:
    from orchestrator.report.entries_page import write_entries

    return [write_entries(read_entries(entries, _open_bundle), place.absolute())]


def _open_bundle(path: Path, to: Path) -> Unpacked:
    from orchestrator.bundle.verify import unpack_verified

    verified = unpack_verified(path, to)
    unchecked = sum(finding.level == "warning" for finding in verified.findings)
    statements = ", ".join(verified.statements)
    return Unpacked(verified.runs, f"{statements}; {unchecked} could not be checked" if unchecked else statements)


if __name__ == "__main__":
    prepare_process()
    typer.run(main)
