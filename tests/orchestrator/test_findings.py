"""Findings are shown as they are, whatever an untrusted file put into them."""

import sys

import pytest
from rich.console import Console

from orchestrator.findings import Finding, FindingList, as_errors, has_errors, print_findings, printable, root_cause


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
    error.__cause__.__cause__ = error
    assert root_cause(error) in {str(error), "Connection refused"}


def test_one_finding_on_many_objects_is_one_line_with_a_count_and_examples() -> None:
    findings = FindingList()
    for number in range(1, 3001):
        findings.warning("box_empty", "train.json", f"annotation {number}", f"its bbox is {number} wide", "Remove it")
    findings.warning("box_empty", "val.json", "annotation 1", "its bbox is flat", "Remove it")
    many, single = findings.to_list()
    assert (many.count, many.id, single.count) == (3000, "annotation 1", 1)
    expected = "its bbox is 1 wide; and 2,999 more like this: annotation 2, annotation 3 …"
    assert many.what == expected and many.to_line().endswith("Remove it.")


def test_what_differs_in_more_than_a_number_is_listed_by_itself() -> None:
    findings = FindingList()
    findings.error("config_key", "model.overrides", "SOLVER.BASE_LRR", "no such key", "Did you mean SOLVER.BASE_LR?")
    findings.error("config_key", "model.overrides", "SOLVER.STEP", "no such key", "Did you mean SOLVER.STEPS?")
    assert [finding.id for finding in findings.to_list()] == ["SOLVER.BASE_LRR", "SOLVER.STEP"]


def test_files_of_one_folder_are_one_group() -> None:
    findings = FindingList()
    for number in (4, 7):
        findings.error("image_corrupt", f"set/{number}.jpg", f"image {number}", "corrupt", "Copy it", group="set")
    (finding,) = findings.to_list()
    assert (finding.file, finding.count) == ("set/4.jpg", 2) and finding.what.endswith("1 more like this: image 7")


@pytest.mark.parametrize(("hint", "end"), [("Copy it", "Copy it."), ("Are these corners?", "Are these corners?")])
def test_a_hint_ends_in_one_mark(hint: str, end: str) -> None:
    assert Finding("error", "code", "file", "", "what", hint).to_line() == f"error [code] file: what. {end}"


def test_strictness_makes_errors_of_warnings() -> None:
    warning = Finding("warning", "code", "file", "", "what", "hint")
    assert not has_errors([warning]) and has_errors(as_errors([warning]))
