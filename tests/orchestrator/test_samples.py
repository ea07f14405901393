"""Sample pictures stay readable: many objects, strips, objects of a pixel, photos of any brightness and depth."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from orchestrator.report import overlay
from orchestrator.report.class_colors import class_colors
from orchestrator.report.overlay import DARK, LARGE_SIDE, LONGER_SIDE, MAX_LABELS, draw
from orchestrator.report.photos import read_photo
from orchestrator.report.samples import MAX_EVALUATIONS, sample_pictures
from orchestrator.runlog.folder import read_run_folder
from tests.builders.run_folder import make_run
from trainers.contract.evaluation_details import DETAILS_FOLDER
from trainers.contract.plan import SAMPLES_FILE

NAMES = {number: f"class {number}" for number in range(1, 21)}
COLORS = class_colors(NAMES.values())


def square(x: float, y: float, side: float, category: int = 1, **more: Any) -> dict[str, Any]:
    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
    return {"category_id": category, "bbox": [x, y, side, side], "segmentation": [polygon], **more}


def pixels(picture: Image.Image) -> Any:
    return np.asarray(picture.convert("RGB"))


def shows(picture: Image.Image, color: tuple[int, int, int]) -> bool:
    return bool((pixels(picture) == color).all(axis=2).any())


def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Contrast of two colours (WCAG 2.2)."""
    lights = []
    for color in (a, b):
        channels = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        lights.append(0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2] + 0.05)
    return max(lights) / min(lights)


@pytest.mark.parametrize("light", [0, 90, 128, 200, 255])
@pytest.mark.parametrize("with_mask", [False, True])
def test_an_outline_stands_out_on_any_photo(light: int, *, with_mask: bool) -> None:
    entry = square(30, 30, 40) if with_mask else {**square(30, 30, 40), "segmentation": None}
    picture = draw(Image.new("RGB", (100, 100), (light,) * 3), [entry], NAMES, COLORS).picture
    color = COLORS["class 1"]
    assert shows(picture, color) and shows(picture, DARK)
    assert max(contrast(color, (light,) * 3), contrast(DARK, (light,) * 3)) > 2.5


def test_an_object_of_one_pixel_is_seen() -> None:
    for entry in (square(500, 300, 1), {**square(500, 300, 0.2), "segmentation": None}):
        picture = draw(Image.new("RGB", (1000, 800)), [entry], NAMES, COLORS).picture
        assert (pixels(picture) == COLORS["class 1"]).all(axis=2).sum() >= 4 * (overlay.MIN_BOX - 1)


def test_a_small_object_lies_over_a_large_one() -> None:
    entries = [square(40, 40, 6, category=2), square(10, 10, 80, category=1)]
    assert shows(draw(Image.new("RGB", (100, 100)), entries, NAMES, COLORS).picture, COLORS["class 2"])


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[float, ...], str]]:
    """The boxes and texts of all labels that are drawn."""
    seen: list[tuple[tuple[float, ...], str]] = []
    text = ImageDraw.ImageDraw.text

    def record(self: ImageDraw.ImageDraw, place: tuple[float, float], words: str, **more: Any) -> None:
        seen.append((self.textbbox(place, words, more["font"]), words))
        text(self, place, words, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return seen


def crowd(number: int, width: int, height: int) -> list[dict[str, Any]]:
    noise = random.Random(number)  # noqa: S311 - nothing secret is drawn
    return [
        square(noise.uniform(0, width - 60), noise.uniform(0, height - 60), noise.choice([2, 8, 25, 60]), 1 + n % 20)
        for n in range(number)
    ]


def shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


@pytest.mark.parametrize("number", [5, 60, 300])
def test_labels_hide_neither_each_other_nor_objects(number: int, labels: list[Any]) -> None:
    entries = crowd(number, 800, 600)
    drawn = draw(Image.new("RGB", (800, 600), (120, 130, 90)), entries, NAMES, COLORS)
    assert drawn.num_objects == number and drawn.num_unlabelled == number - len(labels)
    assert 0 < len(labels) <= MAX_LABELS
    assert not any(shared(a, b) for (a, _), (b, _) in combinations(labels, 2))
    scale = drawn.picture.width / 800
    for entry in entries:
        x, y, side, _ = (scale * value for value in entry["bbox"])
        for box, words in labels:
            if words != NAMES[entry["category_id"]] and side > overlay.MIN_BOX:
                assert shared(box, (x, y, x + side, y + side)) <= overlay.MAX_HIDDEN * side**2 + 1
    assert all(box[0] >= 0 and box[2] <= drawn.picture.width for box, _ in labels)


def test_a_picture_with_many_objects_is_larger() -> None:
    photo = Image.new("RGB", (800, 600))
    few, many = (draw(photo, crowd(n, 800, 600), NAMES, COLORS) for n in (3, 50))
    assert (few.picture.size, few.is_crowded) == ((LONGER_SIDE, LONGER_SIDE * 3 // 4), False)
    assert (many.picture.size, many.is_crowded) == ((LARGE_SIDE, LARGE_SIDE * 3 // 4), True)


@pytest.mark.parametrize("size", [(5000, 250), (250, 5000), (20000, 40), (3000, 10)])
def test_a_strip_is_cut_into_pieces_that_hold_all_of_it(size: tuple[int, int], labels: list[Any]) -> None:
    is_wide = size[0] > size[1]
    thin, step = min(size), max(size) // 9
    places = [(at, 0.4 * thin) if is_wide else (0.4 * thin, at) for at in range(0, max(size), step)]
    objects = [square(x, y, 0.3 * thin) for x, y in places]
    drawn = draw(Image.new("RGB", size, (250, 250, 250)), objects, NAMES, COLORS)
    assert drawn.num_pieces == round((max(size) / min(size)) ** 0.5) > 1 and drawn.is_wide is is_wide
    assert max(drawn.picture.size) <= LARGE_SIDE + drawn.num_pieces * overlay.GAP
    assert min(drawn.picture.size) > LARGE_SIDE / 2
    opaque = (np.asarray(drawn.picture)[..., 3] == 255).mean()
    assert opaque > 0.6
    width = drawn.picture.width if is_wide else drawn.picture.height
    for box, _ in labels:  # in the strip before it is cut
        start, end = (box[0], box[2]) if is_wide else (box[1], box[3])
        assert int(start) // width == int(end) // width


def test_a_photo_up_to_four_times_as_long_as_wide_stays_whole() -> None:
    assert draw(Image.new("RGB", (400, 100)), [], NAMES, COLORS).num_pieces == 1


@pytest.mark.parametrize(
    "shape",
    [
        [], None, [[1, 1, 5, 5]], [[1, 1, 5, 5, 9]], {"size": [10, 10], "counts": [0, 100]},
        {"size": [100, 100], "counts": "nonsense"}, {"counts": [1]},
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_read_leaves_the_box(shape: Any) -> None:
    entry = {"category_id": 1, "bbox": [20, 20, 30, 30], "segmentation": shape}
    assert shows(draw(Image.new("RGB", (100, 100)), [entry], NAMES, COLORS).picture, COLORS["class 1"])


@pytest.mark.parametrize("box", [None, [], [1, 2, 3], [float("nan"), 1, 5, 5], ["1", "2", "3", "4"]])
def test_an_object_without_a_usable_box_is_left_out(box: Any) -> None:
    drawn = draw(Image.new("RGB", (100, 100)), [{"category_id": 1, "bbox": box}], NAMES, COLORS)
    assert drawn.num_objects == 0


def test_masks_are_drawn_where_they_are_in_every_form() -> None:
    truth = np.zeros((200, 100), np.uint8, order="F")
    truth[50:150, 20:80] = 1
    flat = truth.ravel(order="F")
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    packed = rle.encode(truth)
    for shape in (
        [[20, 50, 80, 50, 80, 150, 20, 150]],
        {"size": [200, 100], "counts": np.diff(edges).tolist()},
        {"size": [200, 100], "counts": packed["counts"].decode()},
    ):
        entry = {"category_id": 99, "bbox": [20, 50, 60, 100], "segmentation": shape}
        picture = pixels(draw(Image.new("RGB", (100, 200), (0, 0, 0)), [entry], {}, {}).picture)
        tinted = picture.any(axis=2)
        assert tinted[LONGER_SIDE // 2, LONGER_SIDE // 4] and not tinted[10, 10]
        assert tinted.mean() == pytest.approx(0.3, abs=0.03)


def test_keypoints_are_dots_where_they_are_visible() -> None:
    entry = {**square(10, 10, 80), "segmentation": None, "keypoints": [30, 30, 2, 60, 60, 0]}
    picture = pixels(draw(Image.new("RGB", (100, 100), (9, 9, 9)), [entry], NAMES, COLORS).picture)
    at = LONGER_SIDE // 100
    assert tuple(picture[30 * at + 6, 30 * at + 6]) == COLORS["class 1"]
    assert tuple(picture[60 * at + 12, 60 * at + 12]) == (9, 9, 9)


@pytest.mark.parametrize(("number", "distance"), [(2, 60), (10, 40), (80, 10)])
def test_classes_have_colours_that_differ(number: int, distance: float) -> None:
    colors = class_colors(f"class {n}" for n in range(number))
    assert min(float(np.linalg.norm(np.subtract(a, b))) for a, b in combinations(colors.values(), 2)) > distance
    assert all(max(color) - min(color) > 30 for color in colors.values()), "grey"


def test_the_colour_of_a_class_does_not_depend_on_the_order_of_classes() -> None:
    names = ["person", "cat", "zebra", "truck", "Ünïcode \ud800", "字"]
    assert class_colors(names) == class_colors(reversed(names)) == class_colors([*names, "cat"])
    assert class_colors(["person"]) == {"person": class_colors(names)["person"]}
    assert class_colors([]) == {}


def test_more_classes_than_colours_still_have_one_each() -> None:
    assert len(class_colors(f"class {n}" for n in range(1203))) == 1203


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a version that kept the detections of the last evaluation alone."""
    return make_run(tmp_path_factory.mktemp("old") / "run", old=True)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_the_legend_names_the_classes_that_are_shown(run: Path) -> None:
    samples = sample_pictures(read_run_folder(run).trials[0])
    assert 0 < len(samples.legend) <= 3 and set(samples.legend) <= {"circle", "square", "triangle"}
    assert len(samples.pictures) == 3 and not any(sample.is_large for sample in samples.pictures)
    assert max(decoded(samples.pictures[0].true).size) == LONGER_SIDE


def test_what_was_left_out_is_said(old_run: Path) -> None:
    trial = read_run_folder(old_run).trials[0]
    saved = json.loads((trial.folder / SAMPLES_FILE).read_text())
    shown = saved["image_ids"][0]
    saved["detections"] = [
        {**entry, "image_id": shown, "score": 0.9} for entry in crowd(80, 96, 96)
    ]  # fmt: skip
    before = (trial.folder / SAMPLES_FILE).read_text()
    (trial.folder / SAMPLES_FILE).write_text(json.dumps(saved))
    try:
        samples = sample_pictures(trial)
    finally:
        (trial.folder / SAMPLES_FILE).write_text(before)
    (large,) = [sample for sample in samples.pictures if sample.is_large]
    assert large.num_predicted == 80 and "objects without a label, for want of room" in large.notes


def test_an_older_run_has_its_samples_and_neither_progress_nor_worst_images(old_run: Path) -> None:
    samples = sample_pictures(read_run_folder(old_run).trials[0])
    assert len(samples.pictures) == 3 and samples.progress is None and samples.worst == []


def test_the_same_images_are_shown_at_several_evaluations(run: Path) -> None:
    trial = read_run_folder(run).trials[0]
    progress = sample_pictures(trial).progress
    assert progress is not None
    assert [text.split(",")[0] for text in progress.evaluations] == [f"iteration {n}" for n in (60, 120, 180, 240)]
    assert len(progress.images) == 3
    for _, pictures in progress.images:
        assert len(pictures) == 1 + 4
        assert max(decoded(pictures[0][0]).size) == overlay.THUMBNAIL_SIDE
    found = [sum(pictures[at][1] for _, pictures in progress.images) for at in range(5)]
    assert found[0] >= found[-1] > found[1], "a better model finds more"


def test_an_evaluation_whose_file_is_gone_is_left_out_and_the_last_one_is_named(run: Path, tmp_path: Path) -> None:
    trial = read_run_folder(Path(shutil.copytree(run, tmp_path / "run"))).trials[0]
    (trial.folder / DETAILS_FOLDER / "0000120.json").write_text("{}")
    progress = sample_pictures(trial).progress
    assert progress is not None and len(progress.evaluations) == 3 <= MAX_EVALUATIONS
    (trial.folder / DETAILS_FOLDER / "0000240.json").unlink()
    with pytest.raises(OSError, match=r"0000240\.json"):
        sample_pictures(trial)


def test_the_worst_images_say_what_was_missed(run: Path) -> None:
    worst = sample_pictures(read_run_folder(run).trials[0]).worst
    assert [sample.notes for sample in worst] == [f"{missed} missed, 2 false" for missed in (3, 2, 1)]
    assert all(sample.num_true for sample in worst)


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
def test_a_photo_of_more_than_eight_bits_is_neither_black_nor_white(tmp_path: Path, mode: str, dtype: Any) -> None:
    ramp = np.tile(np.linspace(100, 4000, 64), (8, 1)).astype(dtype)
    Image.fromarray(ramp).save(tmp_path / "deep.tiff")
    with Image.open(tmp_path / "deep.tiff") as file:
        assert file.mode == mode
    values = np.asarray(read_photo(tmp_path / "deep.tiff"))
    assert (values[0, 0, 0], values[0, -1, 0]) == (0, 255) and abs(int(values[0, 32, 0]) - 128) < 6
