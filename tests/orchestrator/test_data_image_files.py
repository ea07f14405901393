"""A file name of an annotation file cannot lead out of the image folder."""

import pytest

from orchestrator.data.image_names import check_name


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("/etc/passwd", "path_absolute"),
        ("C:\\x.jpg", "path_absolute"),
        ("a/../../x.jpg", "path_parent"),
        ("..\\x.jpg", "path_parent"),
        ("a\0b", "path_invalid"),
        ("\udc80.jpg", "path_invalid"),
        ("x" * 5000, "path_invalid"),
        ("a..b/c...jpg", None),
        ("deep/er/x.jpg", None),
    ],
)
def test_a_name_stays_inside_the_image_folder(name: str, code: str | None) -> None:
    problem = check_name(name)
    assert (problem and problem.code) == code
