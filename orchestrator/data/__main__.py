"""The data command: `python -m orchestrator.data check | fetch | generate | excerpt`.

Exit codes: 0 success, 2 the input or the data set is wrong (every finding is listed), 130 interrupted.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from orchestrator.data.progress_bar import show_bar

if TYPE_CHECKING:
    from orchestrator.data.checks import SplitReport
    from orchestrator.findings import Finding

EXIT_UNFIT = 2

app = typer.Typer(
    help="Check, fetch, generate and excerpt data sets in COCO's format.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="Folder in COCO's layout, the one above it, or an annotation JSON.")],
    images: Annotated[
        Path | None, typer.Option(help="Image folder, where PATH is an annotation JSON. Default: the folder it is in.")
    ] = None,
    verify_images: Annotated[bool, typer.Option("--verify-images", help="Decode every image, in parallel.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    cache: Annotated[bool, typer.Option(help="Reuse the result of an earlier check where nothing changed.")] = True,
) -> None:
    """Checks a data set: layout, counts, every annotation, every image file. Exits with 2 on errors."""
    from orchestrator.data.checks import check_split, compare_splits
    from orchestrator.data.layout import Split, find_splits
    from orchestrator.findings import has_errors, print_findings, sort_findings, to_json

    findings: list[Finding]
    if path.is_file() or path.suffix == ".json":
        # Checked as for scoring, which needs more than training does.
        splits, findings = {"": Split(path, images or path.parent, for_scoring=True)}, []
    else:
        splits, findings = find_splits(path)
    reports = [check_split(split, verify_images=verify_images, use_cache=cache) for split in splits.values()]
    for report in reports:
        findings += report.findings
    summaries = [report.summary for report in reports if report.summary is not None]
    if len(summaries) == 2:
        findings.extend(compare_splits(*summaries))
    findings = sort_findings(findings)
    if as_json:
        shown = [{**asdict(each.summary), "from_cache": each.from_cache} if each.summary else None for each in reports]
        typer.echo(to_json(findings, splits=shown))
    else:
        _print_summaries(reports)
        print_findings(findings)
    raise typer.Exit(EXIT_UNFIT if has_errors(findings) else 0)


@app.command()
def generate(
    to: Annotated[Path, typer.Argument(help="New folder.")],
    num_train: Annotated[int, typer.Option(help="Training images.")] = 256,
    num_val: Annotated[int, typer.Option(help="Validation images.")] = 64,
    size: Annotated[str, typer.Option(help="Pixels: a side, or WIDTHxHEIGHT.")] = "128",
    num_classes: Annotated[int, typer.Option(help="Kinds of shapes.")] = 3,
    seed: Annotated[int, typer.Option(help="The same seed draws the same bytes.")] = 0,
    crowd_fraction: Annotated[float, typer.Option(help="Share of images with a crowd region, 0 to 1.")] = 0.0,
    min_shapes: Annotated[int, typer.Option(help="Fewest shapes of an image.")] = 1,
    max_shapes: Annotated[int, typer.Option(help="Most shapes of an image.")] = 4,
    mask_format: Annotated[Literal["polygon", "rle"], typer.Option(help="How masks are written.")] = "polygon",
    distinct_images: Annotated[
        int | None, typer.Option(help="Draw so many images per split and hard-link the rest to them (load tests).")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a generated set of other parameters.")] = False,
) -> None:
    """Draws a data set of shapes in COCO's layout; does nothing where TO already holds the same one."""
    from orchestrator.data.generate import generate as generate_shapes

    try:
        width, _, height = size.partition("x")
        sides = (int(width), int(height or width))
    except ValueError:
        _fail(f"--size is {size!r}: write 128 or 160x120")
    try:
        with show_bar("drawing") as advance:
            generate_shapes(
                to, num_train=num_train, num_val=num_val, size=sides, num_classes=num_classes, seed=seed,
                crowd_fraction=crowd_fraction, shapes_per_image=(min_shapes, max_shapes), mask_format=mask_format,
                distinct_images=distinct_images, replace=replace, on_progress=advance,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        _fail(str(error))
    typer.echo(f"{num_train:,} training and {num_val:,} validation images: {to.absolute()}")


@app.command()
def fetch(
    name: Annotated[Literal["coco2017"], typer.Argument(help="Which data set.")],
    to: Annotated[Path, typer.Option(help="Folder for DETECTRON2_DATASETS; the set goes into `coco` below it.")],
    mirror: Annotated[str | None, typer.Option(help="Server with the same paths as the official one.")] = None,
) -> None:
    """Downloads COCO 2017 (20 GB; needs 42 GB of space), checks SHA-256, unpacks. Run it again to resume."""
    from orchestrator.data.fetch import ADDRESS, FetchError
    from orchestrator.data.fetch import fetch as fetch_archives

    try:
        root = fetch_archives(to, address=mirror or ADDRESS)
    except (FetchError, OSError) as error:
        _fail(str(error))
    typer.echo(f"{name} is in {root}. Next: export DETECTRON2_DATASETS={root.parent}")


@app.command()
def excerpt(
    num_images: Annotated[int, typer.Argument(help="Images of each split at most.")],
    source: Annotated[Path | None, typer.Option("--from", help="Data set. Default: $DETECTRON2_DATASETS/coco.")] = None,
    to: Annotated[Path, typer.Option(help="New folder.")] = Path("datasets/excerpt"),
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Copies a small consistent part of a COCO data set, for trying things."""
    import os

    from orchestrator.data.excerpt import excerpt as take_excerpt

    source = source or Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "coco"
    try:
        taken = take_excerpt(source, to, num_images=num_images, seed=seed)
    except (ValueError, OSError) as error:
        _fail(str(error))
    for part, (num_taken, num_annotations) in taken.items():
        typer.echo(f"{part}: {num_taken:,} images, {num_annotations:,} annotations in {to}")


def _print_summaries(reports: list[SplitReport]) -> None:
    for report in reports:
        if (summary := report.summary) is not None:
            read = f"{summary.num_images_checked:,} files read"
            effort = "unchanged since the last check" if report.from_cache else read
            typer.echo(
                f"{summary.annotations}: {summary.num_images:,} images, {summary.num_annotations:,} annotations "
                f"({summary.num_crowd:,} crowds), {len(summary.categories)} categories; {effort}"
            )


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_UNFIT)


if __name__ == "__main__":
    app()
