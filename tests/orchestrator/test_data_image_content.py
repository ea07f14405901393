"""One image file: whole or cut off in any format, of the annotated size, and read by detectron2 as what it shows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from orchestrator.data import image_content
from orchestrator.data.image_content import inspect_image

WIDTH, HEIGHT = 64, 48
FORMATS = {
    "JPEG": {}, "PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "GIF": {}, "PPM": {}, "JPEG2000": {},
    "TIFF": {}, "TIFF-deflate": {"compression": "tiff_adobe_deflate"}, "TIFF-jpeg": {"compression": "jpeg"},
}  # fmt: skip


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def encode(kind: str) -> bytes:
    stream = io.BytesIO()
    noise().save(stream, kind.split("-")[0], **FORMATS[kind])
    return stream.getvalue()


def code(path: Path, width: int = WIDTH, height: int = HEIGHT, *, verify: bool = False) -> str:
    problem = inspect_image(str(path), width, height, verify=verify)
    return problem.code if problem else ""


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_image_of_any_format_passes_and_a_cut_one_is_found_without_decoding_all(
    tmp_path: Path, kind: str
) -> None:
    path, content = tmp_path / "image", encode(kind)
    path.write_bytes(content)
    assert code(path) == code(path, verify=True) == ""
    for missing in (1, 20, len(content) // 2):
        path.write_bytes(content[:-missing])
        assert code(path) == code(path, verify=True)  # which decodes: the end of some formats holds no pixels
    assert code(path) in ("image_truncated", "image_corrupt")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "TIFF-deflate"])
def test_the_end_of_a_whole_file_is_enough(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image"
    path.write_bytes(encode(kind))
    monkeypatch.setattr(Image.Image, "convert", None)  # decoding would fail
    assert code(path) == ""


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_modes_that_detectron2_converts_pass(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    noise().convert(mode).save(path)
    assert code(path, verify=True) == ""


@pytest.mark.parametrize(
    ("pixels", "suffix", "words"),
    [
        (np.full((HEIGHT, WIDTH), 40_000, np.uint16), "png", "16 bits a pixel, values from 40000 to 40000"),
        (np.full((HEIGHT, WIDTH), 300, np.uint16), "tif", "all above 255 as white"),
        (np.full((HEIGHT, WIDTH), 0.5, np.float32), "tif", "32 bits a pixel (floating point)"),
        (np.full((HEIGHT, WIDTH), np.nan, np.float32), "tif", "floating point"),
        (np.full((HEIGHT, WIDTH), -7, np.int32), "tif", "whole numbers from 0"),
        (np.full((HEIGHT, WIDTH), 200, np.uint16), "png", ""),  # detectron2 reads these as they are
        (np.full((HEIGHT, WIDTH), 200, np.float32), "tif", ""),
    ],
)
def test_pixels_that_8_bits_cannot_hold_are_refused(
    tmp_path: Path, pixels: NDArray[Any], suffix: str, words: str
) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels).save(path)
    problem = inspect_image(str(path), WIDTH, HEIGHT, verify=False)
    assert (problem is not None) == bool(words)
    if problem:
        assert problem.code == "image_depth" and words in problem.what and "8 bits" in problem.hint


@pytest.mark.parametrize(
    ("content", "found", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n", "image_placeholder", "Git LFS"),
        (b"/annex/objects/MD5E-s1--12.jpg\n", "image_placeholder", "git-annex"),
        (b"\n<!DOCTYPE html>\n<html>", "image_placeholder", "web page"),
        (b"", "image_corrupt", "empty"),
        (b"never an image" * 9, "image_corrupt", "no image format"),
        (b"II*\0" + b"\0" * 40, "image_corrupt", "TIFF of a kind"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "image_corrupt", "HEIC or HEIF"),
    ],
)
def test_what_lies_in_the_place_of_an_image_is_named(tmp_path: Path, content: bytes, found: str, words: str) -> None:
    (tmp_path / "image.jpg").write_bytes(content)
    problem = inspect_image(str(tmp_path / "image.jpg"), WIDTH, HEIGHT, verify=False)
    assert problem is not None and problem.code == found and words in problem.what


def test_an_image_too_large_for_pillow_is_not_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    noise().save(path)
    monkeypatch.setattr(image_content.Image, "MAX_IMAGE_PIXELS", 1000)
    problem = inspect_image(str(path), WIDTH, HEIGHT, verify=False)
    assert problem is not None and problem.code == "image_too_large"
    assert "3,072 pixels: too large for Pillow" in problem.what and "tiles" in problem.hint
    monkeypatch.setattr(image_content.Image, "MAX_IMAGE_PIXELS", 2000)
    assert code(path) == "image_large" and code(path) in image_content.WARNINGS


@pytest.mark.parametrize(
    ("kind", "orientation", "annotated", "found"),
    [
        ("JPEG", 1, (WIDTH, HEIGHT), ""),
        ("JPEG", 6, (HEIGHT, WIDTH), ""),
        ("JPEG", 6, (WIDTH, HEIGHT), "exif_orientation"),
        ("JPEG", 3, (WIDTH, HEIGHT), "exif_ambiguous"),
        ("PNG", 6, (WIDTH, HEIGHT), "exif_orientation"),
        ("WEBP", 8, (WIDTH, HEIGHT), "exif_orientation"),
        ("TIFF", 6, (WIDTH, HEIGHT), "exif_ambiguous"),
        ("TIFF", 6, (HEIGHT, WIDTH), "exif_orientation"),
        ("JPEG", 1, (HEIGHT, WIDTH), "size_mismatch"),
    ],
)
def test_an_image_is_of_the_size_in_which_detectron2_sees_it(
    tmp_path: Path, kind: str, orientation: int, annotated: tuple[int, int], found: str
) -> None:
    from detectron2.data.detection_utils import read_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    noise().save(tmp_path / "image", kind, exif=exif)
    assert code(tmp_path / "image", *annotated) == found
    seen = read_image(str(tmp_path / "image"), "BGR").shape[1::-1]
    assert (seen == annotated) == (found in ("", "exif_ambiguous"))
