"""The data command: `python -m orchestrator.data check | init | split | fix-names | fetch | generate | excerpt`.

Exit codes: 0 success, 2 the input or the data set is wrong (every finding is listed), 130 interrupted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from orchestrator.data.progress_bar import show_bar
from orchestrator.files import absolute_path, expand_home, is_file, require_utf8
from orchestrator.process import prepare_process

if TYPE_CHECKING:
    from collections.abc import Iterable

    from orchestrator.data.checks import SplitReport
    from orchestrator.findings import Finding

EXIT_UNFIT = 2

PARTS_OF_CLASSES = {
    (True, True): "in both sets",
    (True, False): "in the training set only, so never scored",
    (False, True): "in the validation set only, so never learned",
    (False, False): "in no image",
}
"""What is said of classes by whether they are in the training and in the validation set."""


def _given(path: Path | None) -> Path | None:
    """A path as it was given, with the home folder in place of its `~`; ends the command where it can be none."""
    if path is None:
        return None
    try:
        path = expand_home(path)
        absolute_path(path)
    except ValueError as error:
        _fail(error)
    return path


def _new(path: Path) -> Path:
    """A path to be written, as `_given`; its names have to be UTF-8, for nothing else can be trained on."""
    path = _given(path) or path
    try:
        require_utf8(absolute_path(path))
    except ValueError as error:
        _fail(error)
    return path


app = typer.Typer(
    help="Data sets in COCO's format: check, split, begin an experiment, fetch, generate, excerpt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def check(
    path: Annotated[
        Path, typer.Argument(help="Folder of a data set, as a tool exports it, or an annotation JSON.", callback=_given)
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Image folder, where PATH is an annotation JSON. Default: the folder it is in.", callback=_given
        ),
    ] = None,
    verify_images: Annotated[bool, typer.Option("--verify-images", help="Decode every image, in parallel.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Treat every warning as an error.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    cache: Annotated[bool, typer.Option(help="Reuse the result of an earlier check where nothing changed.")] = True,
) -> None:
    """Checks a data set: layout, counts, every annotation, every image file. Exits with 2 on errors."""
    from orchestrator.data.checks import check_split, compare_splits
    from orchestrator.data.exports import find_splits
    from orchestrator.data.layout import Split
    from orchestrator.findings import as_errors, has_errors, print_findings, sort_findings, to_json

    findings: list[Finding]
    if is_file(path) or path.suffix == ".json":
        # Checked as for scoring, which needs more than training does.
        splits, findings = {"": Split(path, images or path.parent, for_scoring=True)}, []
    elif images is not None:
        _fail(f"--images: it has no effect unless PATH is an annotation JSON: {path}")
    else:
        splits, findings = find_splits(path)
    reports = {part: check_split(split, verify_images=verify_images, use_cache=cache) for part, split in splits.items()}
    for part, report in reports.items():
        # A test set without annotations is usual: a competition's.
        is_bare = part == "test" and report.summary is not None and not report.summary.num_annotations
        findings += [replace(each, level="warning") for each in report.findings] if is_bare else report.findings
        if part != "train" and "train" in reports:
            findings += compare_splits(reports["train"], report)
    findings = sort_findings(as_errors(findings) if strict else findings)
    if as_json:
        shown = [
            {**asdict(each.summary), "from_cache": each.from_cache} if each.summary else None
            for each in reports.values()
        ]
        typer.echo(to_json(findings, splits=shown))
    else:
        _print_summaries(reports.values())
        print_findings(findings)
    raise typer.Exit(EXIT_UNFIT if has_errors(findings) else 0)


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a data set, as a tool exports it, or an annotation JSON.", callback=_given)
    ],
) -> None:
    """Looks at a data set and prints an experiment that trains on it: `init FOLDER > my.yaml`, `run my.yaml`."""
    from orchestrator.data.init import write_experiment
    from orchestrator.findings import print_findings

    text, findings = write_experiment(folder)
    print_findings(findings)
    if text is None:
        raise typer.Exit(EXIT_UNFIT)
    typer.echo(text, nl=False)


@app.command()
def split(
    file: Annotated[Path, typer.Argument(help="COCO JSON.", callback=_given)],
    to: Annotated[Path, typer.Option(help="Folder for train.json and val.json.", callback=_new)],
    val: Annotated[float, typer.Option(help="Share of the images for validation, between 0 and 1.")] = 0.2,
    seed: Annotated[int, typer.Option(help="The same seed draws the same images.")] = 0,
    group_by: Annotated[
        str,
        typer.Option(
            metavar="REGEX",
            help="Keep images together for which this matches the same start of the name, or group 1.",
        ),
    ] = r"(.*)\.rf\.",
) -> None:
    """Splits one annotation file into train.json and val.json, by image, with every class in both where possible."""
    from orchestrator.data.split import split as split_file
    from orchestrator.findings import printable

    try:
        result = split_file(file, to, val_share=val, seed=seed, group_by=group_by)
    except (ValueError, OSError) as error:
        _fail(error)
    typer.echo(f"{result.train}: {result.num_train:,} images\n{result.val}: {result.num_val:,} images")
    by_parts = defaultdict(list)
    for name, (num_train, num_val) in result.images_of_class.items():
        by_parts[num_train > 0, num_val > 0].append(printable(name))
    for parts, where in PARTS_OF_CLASSES.items():
        if names := by_parts[parts]:
            shown = ", ".join([*names[:5], *("…" for _ in names[5:6])])
            typer.echo(f"classes {where}: {len(names):,} ({shown})")


@app.command()
def fix_names(
    file: Annotated[Path, typer.Argument(help="COCO JSON.", callback=_given)],
    images: Annotated[Path, typer.Option(help="Folder that holds the images, at any depth.", callback=_given)],
    to: Annotated[Path, typer.Option(help="New annotation file.", callback=_new)],
) -> None:
    """Writes an annotation file again with the names that its image files have: slashes, case, Unicode, folders."""
    from orchestrator.data.fix_names import fix_names as fix

    try:
        fixed = fix(file, images, to)
    except (ValueError, OSError) as error:
        _fail(error)
    for name, path in list(fixed.changed.items())[:3]:
        typer.echo(f"{name!r} is now {path!r}")
    typer.echo(f"{to}: {len(fixed.changed):,} names changed")
    if fixed.not_utf_8:
        what = f"files have names that are not UTF-8, such as {fixed.not_utf_8[0]!r}: rename them, then this again"
        typer.echo(f"error: {len(fixed.not_utf_8):,} {what}", err=True)
    if fixed.missing:
        typer.echo(f"error: {len(fixed.missing):,} images have no file in {images}: {fixed.missing[:3]}", err=True)
    if fixed.not_utf_8 or fixed.missing:
        raise typer.Exit(EXIT_UNFIT)


@app.command()
def generate(
    to: Annotated[Path, typer.Argument(help="New folder.", callback=_new)],
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
        _fail(error)
    typer.echo(f"{num_train:,} training and {num_val:,} validation images: {to.absolute()}")


@app.command()
def fetch(
    name: Annotated[Literal["coco2017"], typer.Argument(help="Which data set.")],
    to: Annotated[
        Path, typer.Option(help="Folder for DETECTRON2_DATASETS; the set goes into `coco` below it.", callback=_new)
    ],
    mirror: Annotated[str | None, typer.Option(help="Server with the same paths as the official one.")] = None,
) -> None:
    """Downloads COCO 2017 (20 GB; needs 42 GB of space), checks SHA-256, unpacks. Run it again to resume."""
    from orchestrator.data.fetch import ADDRESS, FetchError
    from orchestrator.data.fetch import fetch as fetch_archives

    try:
        root = fetch_archives(to, address=mirror or ADDRESS)
    except (FetchError, OSError) as error:
        _fail(error)
    typer.echo(f"{name} is in {root}. Next: export DETECTRON2_DATASETS={root.parent}")


@app.command()
def excerpt(
    num_images: Annotated[int, typer.Argument(help="Images of each split at most.")],
    source: Annotated[
        Path | None, typer.Option("--from", help="Data set. Default: $DETECTRON2_DATASETS/coco.", callback=_given)
    ] = None,
    to: Annotated[Path, typer.Option(help="New folder.", callback=_new)] = Path("datasets/excerpt"),
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Copies a small consistent part of a COCO data set, for trying things."""
    import os

    from orchestrator.data.excerpt import excerpt as take_excerpt

    try:
        source = source or expand_home(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "coco"
        taken = take_excerpt(source, to, num_images=num_images, seed=seed)
    except (ValueError, OSError) as error:
        _fail(error)
    for part, (num_taken, num_annotations) in taken.items():
        typer.echo(f"{part}: {num_taken:,} images, {num_annotations:,} annotations in {to}")


def _print_summaries(reports: Iterable[SplitReport]) -> None:
    for report in reports:
        if (summary := report.summary) is not None:
            read = f"{summary.num_images_checked:,} files read"
            effort = "unchanged since the last check" if report.from_cache else read
            typer.echo(
                f"{summary.annotations}: {summary.num_images:,} images, {summary.num_annotations:,} annotations "
                f"({summary.num_crowd:,} crowds), {len(summary.categories)} categories; {effort}"
            )


def _fail(error: Exception | str) -> NoReturn:
    if isinstance(error, OSError) and error.filename:
        error = f"{error.filename}: {error.strerror}"
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(EXIT_UNFIT)


if __name__ == "__main__":
    prepare_process()
    app()
