"""One reader takes annotation files in any Unicode encoding, and ids in any form that can be read as an integer."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from trainers.contract.annotations import AnnotationFileError, placeholder, read_annotations, to_utf8


def document(image_id: Any = 1, category_id: Any = 2, annotation_id: Any = 3) -> dict[str, Any]:
    return {
        "images": [{"id": image_id, "file_name": "größe.jpg", "width": 4, "height": 5}],
        "annotations": [{"id": annotation_id, "image_id": image_id, "category_id": category_id}],
        "categories": [{"id": category_id, "name": "größe"}],
    }


@pytest.mark.parametrize("loads", [json.loads, orjson.loads], ids=["json", "orjson"])
@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"],
)
def test_every_unicode_encoding_is_read(encoding: str, loads: Any) -> None:
    content = json.dumps(document(), ensure_ascii=False).encode(encoding)
    assert read_annotations(content, loads) == (document(), 0, "")
    assert json.loads(to_utf8(content)) == document()


@pytest.mark.parametrize("given", ["12", 12.0, "12.0", " 12 ", "000000000012"])
def test_ids_as_text_or_decimals_become_integers_everywhere(given: Any) -> None:
    read = read_annotations(json.dumps(document(given, given, given)).encode())
    assert read.document == document(12, 12, 12)
    assert read.num_converted == 5 and read.example == f"id {given!r}"


def test_a_reference_matches_its_image_whichever_of_the_two_is_text() -> None:
    mixed = document(7)
    mixed["annotations"][0]["image_id"] = "7"
    assert read_annotations(json.dumps(mixed).encode()).document == document(7)
    mixed["images"][0]["id"], mixed["annotations"][0]["image_id"] = "7", 7.0
    assert read_annotations(json.dumps(mixed).encode()).document == document(7)


def test_ids_that_are_no_numbers_are_numbered_in_their_order() -> None:
    both = document()
    both["images"] = [{"id": name} for name in ("img_10", "img_9", "7")]
    both["annotations"] = [{"id": n, "image_id": name} for n, name in enumerate(("img_9", "7", "img_10", 1, "other"))]
    read = read_annotations(json.dumps(both).encode()).document
    assert [image["id"] for image in read["images"]] == [2, 3, 1]  # "7" < "img_10" < "img_9"
    # A number is no text: it must not fall together with the number that an id was given.
    assert [entry["image_id"] for entry in read["annotations"]] == [3, 1, 2, "1", "other"]


@pytest.mark.parametrize("loads", [json.loads, orjson.loads], ids=["json", "orjson"])
@pytest.mark.parametrize("start", [2**63, 10**30, -(10**30)])
def test_huge_ids_are_numbered_in_their_order(start: int, loads: Any) -> None:
    ids = [start + 2**100, start, 3]
    both = document()
    both["images"] = [{"id": number} for number in ids]
    both["annotations"] = [{"id": n, "image_id": number} for n, number in enumerate([*ids, 2])]
    read = read_annotations(json.dumps(both).encode(), loads).document
    numbered = [sorted(ids).index(number) + 1 for number in ids]
    assert [image["id"] for image in read["images"]] == numbered
    assert [entry["image_id"] for entry in read["annotations"]] == [*numbered, "2"]  # 2 is no image's id
    assert [entry["id"] for entry in read["annotations"]] == [0, 1, 2, 3]


def test_texts_that_differ_stay_different() -> None:
    both = document()
    both["images"] = [{"id": "7"}, {"id": "07"}]
    read = read_annotations(json.dumps(both).encode()).document
    assert [image["id"] for image in read["images"]] == [2, 1]


@pytest.mark.parametrize("given", [None, True, 1.5, float("nan"), float("inf"), [1], "1e3", "9" * 40])
def test_what_is_no_id_is_left_as_it_is(given: Any) -> None:
    values = {**document(), "images": [{"id": 4}, {"id": given}]}
    assert repr(read_annotations(json.dumps(values).encode()).document["images"][1]["id"]) == repr(given)


@pytest.mark.parametrize("value", [[], 3, {}, {"images": 3}, {"images": [3, None], "annotations": {"id": "1"}}])
def test_what_is_not_cocos_format_is_left_to_the_checks(value: Any) -> None:
    assert read_annotations(json.dumps(value).encode()) == (value, 0, "")


def test_sizes_as_decimals_or_text_become_integers() -> None:
    image = {"id": 1, "width": 640.0, "height": "480"}
    assert read_annotations(json.dumps({"images": [image]}).encode()).document["images"] == [
        {"id": 1, "width": 640, "height": 480}
    ]


@pytest.mark.parametrize("loads", [json.loads, orjson.loads], ids=["json", "orjson"])
@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b" \n", "json_invalid", "empty"),
        (b"\xff\xfe", "json_invalid", "empty"),
        (b"\xff\xfe\x00", "json_invalid", "not UTF-16 text: byte 2 of 3"),
        ('{"a": "größe"}'.encode("latin-1"), "json_invalid", "not UTF-8 text: byte 9 of 14"),
        (b"\x1f\x8b\x08\x00rest\xff", "json_invalid", "compressed (gzip)"),
        (b'{"images": [1, 2', "json_truncated", "ends in the middle"),
        (b'{"images": ]' + b" " * 20, "json_invalid", "at byte 11 of 32"),
        (b"[" * 200_000, "json_invalid", "nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "json_placeholder", "Git LFS"),
        (b"\xef\xbb\xbf\r\n<!DOCTYPE html><html>", "json_placeholder", "web page"),
    ],
)
def test_what_is_no_json_is_refused_with_the_place(content: bytes, code: str, words: str, loads: Any) -> None:
    with pytest.raises(AnnotationFileError) as caught:
        read_annotations(content, loads)
    assert caught.value.code == code and words in caught.value.what and not caught.value.hint.endswith(".")


def test_nan_is_read_as_python_reads_it() -> None:
    assert str(read_annotations(b'{"a": NaN}', orjson.loads).document) == "{'a': nan}"


def test_placeholders_of_other_tools_are_recognised() -> None:
    for head in (b"/annex/objects/MD5E-s1--x.jpg\n", b'<?xml version="1.0"?><Error><Code>', b"<html>"):
        assert placeholder(head) is not None
    for head in (b"", b"\xff\xd8\xff\xe0", b"{}", b"<?xml version='1.0'?><svg>"):
        assert placeholder(head) is None
