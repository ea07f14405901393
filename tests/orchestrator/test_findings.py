"""Findings are shown as they are, whatever an untrusted file put into them."""

import sys

import pytest
from rich.console import Console

from orchestrator.findings import Finding, FindingList, print_findings, printable, root_cause


def test_control_characters_of_a_name_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    findings = FindingList()
    findings.error("image_missing", "a\x1b[2Jb\udc80", "image 1\nerror [faked]", "not \x07 there", "Copy it")
    for force in (True, False):
        print_findings(findings.to_list(), Console(file=sys.stdout, force_terminal=force, width=200, color_system=None))
        shown = capsys.readouterr().out
        assert "\x1b[2J" not in shown and "\x07" not in shown and "\nerror [faked]" not in shown
    assert printable("größer") == "größer"


def test_markup_in_a_name_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    finding = Finding("error", "image_missing", "[bold]x[/bold].jpg", "", "gone", "Copy it")
    print_findings([finding], Console(file=sys.stdout, force_terminal=True, width=200, color_system=None))
    assert "[bold]x[/bold].jpg" in capsys.readouterr().out


def test_the_root_cause_of_a_wrapped_error_is_named() -> None:
    error = RuntimeError("HTTPConnectionPool(...): Max retries exceeded")
    error.__cause__ = OSError(111, "Connection refused")
    assert root_cause(error) == "Connection refused"
    assert root_cause(TimeoutError()) == "TimeoutError"
