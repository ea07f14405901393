"""Options of the smaller commands that would have no effect as they are given are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.commands import run_command


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("prediction", (".", "--sizes", "8", "--latency", "5"), "--latency: it has no effect without --bandwidth"),
        ("prediction", (".", "--sizes", "8", "--algorithm", "tree"), "--algorithm: it has no effect without"),
        ("replay", ("log.txt", "--tracking-uri", "http://host"), "--tracking-uri: it has no effect without --track"),
        ("data", ("check", ".", "--images", "images"), "--images: it has no effect unless PATH is an annotation JSON"),
    ],
)
def test_an_option_without_effect_is_refused(
    tmp_path: Path, module: str, arguments: tuple[str, ...], words: str
) -> None:
    done = run_command(*arguments, cwd=tmp_path, module=f"orchestrator.{module}")
    assert done.returncode == 2 and words in done.stderr
