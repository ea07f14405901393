"""`python -m orchestrator.bundle RUN_FOLDER…`: writes, verifies and repeats bundles (docs/bundles.md).

Exit codes: 0 done or verified, 1 a statement of the bundle does not follow, 2 no bundle or not readable.
"""

from __future__ import annotations

import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.files import is_folder
from orchestrator.process import prepare_process

VERIFIED, DOUBTED, UNFIT = 0, 1, 2
COMMANDS = ("pack", "verify", "rerun")

app = typer.Typer(
    help="Bundles: a run's figures and what they are made of in one file that anybody can check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def pack(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs that have ended.", metavar="RUN_FOLDER...")],
    to: Annotated[Path | None, typer.Option(help="The bundle; default: EXPERIMENT.bundle.zip here.")] = None,
    sign: Annotated[Path | None, typer.Option(help="SSH key that signs it (ssh-keygen -Y sign).")] = None,
) -> None:
    """Write a bundle of some runs. `pack` may be left out."""
    from orchestrator.bundle.archive import BundleError, write_archive
    from orchestrator.bundle.contents import read_run, run_files
    from orchestrator.bundle.redaction import Redaction
    from orchestrator.bundle.signature import signature

    redaction = Redaction()
    if to and is_folder(to):
        raise _refusal(f"--to {to}: it is a folder; name the file to write")
    try:
        names = _names(runs)
        target = to or Path(f"{read_run(runs[0], str(runs[0])).result.experiment}.bundle.zip")
        files = (file for run, name in zip(runs, names, strict=True) for file in run_files(run, name, redaction))
        digest = write_archive(target, files, partial(signature, key=sign) if sign else None)
    except BundleError as error:
        raise _refusal(str(error)) from None
    except OSError as error:
        raise _refusal(f"{error.filename or to or runs[0]}: {error.strerror}") from None
    print(f"{target}: SHA-256 of its manifest: {digest}")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="The bundle.")],
    signers: Annotated[Path | None, typer.Option(help="List of allowed signers, one of whom must have signed.")] = None,
    manifest_sha256: Annotated[str | None, typer.Option(help="The hash that its manifest must have.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Recompute every figure of a bundle and say which statement does not follow."""
    from orchestrator.bundle.archive import BundleError
    from orchestrator.bundle.verify import verify as check
    from orchestrator.findings import has_errors, to_json

    manifest_sha256 = manifest_sha256 and manifest_sha256.strip().lower()
    if manifest_sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", manifest_sha256):
        raise _refusal(f"--manifest-sha256 {manifest_sha256}: not a SHA-256, which has 64 digits 0-9 and a-f")
    try:
        with tempfile.TemporaryDirectory(prefix="bundle-") as folder:
            verified = check(file, Path(folder), signers, manifest_sha256)
    except BundleError as error:
        raise _refusal(str(error)) from None
    except OSError as error:
        raise _refusal(f"{file}: cannot be unpacked: {error.strerror}") from None
    doubted = has_errors(verified.findings)
    if as_json:
        print(to_json(verified.findings, manifest_sha256=verified.manifest_sha256, checked=verified.statements))
    else:
        for finding in verified.findings:
            print(finding.to_line())
        num = sum(finding.level == "error" for finding in verified.findings)
        verdict = f"{num} {'statement does' if num == 1 else 'statements do'} not follow" if doubted else "verified"
        print(f"{file}: {verdict}. Checked: {', '.join(verified.statements)}.")
        print(f"SHA-256 of its manifest: {verified.manifest_sha256}")
    raise typer.Exit(DOUBTED if doubted else VERIFIED)


@app.command()
def rerun(file: Annotated[Path, typer.Argument(help="The bundle.")]) -> None:
    """Print the commands that repeat a bundle's runs, and what differs on this machine."""
    from orchestrator.bundle.archive import BundleError
    from orchestrator.bundle.rerun import instructions

    try:
        with tempfile.TemporaryDirectory(prefix="bundle-") as folder:
            print("\n".join(instructions(file, Path(folder))))
    except BundleError as error:
        raise _refusal(str(error)) from None
    except OSError as error:
        raise _refusal(f"{file}: cannot be unpacked: {error.strerror}") from None


def _names(runs: list[Path]) -> list[str]:
    """A name in the bundle for each run: its folder's, with a number where two are the same."""
    names: list[str] = []
    for run in runs:
        stem = "".join(c if c.isalnum() or c in "_.-" else "-" for c in run.absolute().name).strip(".-") or "run"
        taken = sum(name == stem or name.startswith(f"{stem}-run") for name in names)
        names.append(f"{stem}-run{taken + 1}" if taken else stem)
    return names


def _refusal(text: str) -> typer.Exit:
    print(f"error: {text}", file=sys.stderr)
    return typer.Exit(UNFIT)


if __name__ == "__main__":
    prepare_process()
    arguments = sys.argv[1:]
    short = bool(arguments) and arguments[0] not in (*COMMANDS, "--help")
    app(args=["pack", *arguments] if short else arguments, prog_name="python -m orchestrator.bundle")
