"""What a bundle shows to anybody who doubts it: doctored ones are refused with the reason, honest ones are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.bundle.verify import Verified, unpack_verified, verify
from tests.builders.bundles import (
    Files,
    edit_events,
    edit_json,
    files_of,
    make_run,
    pack,
    pack_carelessly,
    with_figures,
)

RESULTS, EVENTS = "runs/run/results.json", "runs/run/events.jsonl"
TRIAL = "reference-1xcpu-seed1"
LOG = f"runs/run/{TRIAL}/log.txt"


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of an honest bundle."""
    folder = tmp_path_factory.mktemp("bundle")
    return files_of(make_run(folder / "run", folder / "data"))


def codes(verified: Verified) -> dict[str, str]:
    """The errors by their code, as text."""
    found: dict[str, str] = {}
    for finding in verified.findings:
        if finding.level == "error":
            found[finding.code] = found.get(finding.code, "") + finding.to_line() + "\n"
    return found


def test_an_honest_bundle_is_verified(true: Files, tmp_path: Path) -> None:
    verified = verify(pack(tmp_path / "b.zip", true), tmp_path / "to")
    assert verified.findings == []
    assert verified.statements == ("files", "figures", "settings", "times", "logs")
    assert [path.name for path in verified.runs] == ["run"] and (verified.runs[0] / "results.json").is_file()
    assert unpack_verified(tmp_path / "b.zip", tmp_path / "again").manifest_sha256 == verified.manifest_sha256


def in_results(change: Callable[[dict], None]) -> Callable[[Files], Files]:
    return lambda files: {**files, RESULTS: edit_json(files[RESULTS], change)}


def in_events(change: Callable[[dict], bool | None]) -> Callable[[Files], Files]:
    return lambda files: {**files, EVENTS: edit_events(files[EVENTS], change)}


def without_seed(result: dict) -> None:
    del result["trials"][2]


def edited_ap(event: dict) -> None:
    if event["kind"] == "evaluated" and event["trial"] == TRIAL and event["iteration"] == 8:
        event["figures"]["box_ap"] += 3
        event["class_ap"] = {name: ap and ap + 3 for name, ap in event["class_ap"].items()}


def edited_ap50(event: dict) -> None:
    if event["kind"] == "evaluated" and event["trial"] == TRIAL:
        event["figures"]["box_ap50"] += 1


def started_later(event: dict) -> None:
    if event["kind"] == "worker_started" and event["trial"] == TRIAL:
        event["time"] += 3


def compressed(event: dict) -> None:
    """Everything of one trial takes half as long, durations too: consistent among the events alone."""
    if event["trial"] != TRIAL:
        return
    start = 1_790_000_051.0
    for name in ("time", "box_scored", "mask_scored"):
        if event.get(name):
            event[name] = start + (event[name] - start) / 2
    for name in ("seconds", "setup_seconds", "stall_seconds", "write_seconds"):
        if event.get(name):
            event[name] /= 2
    for name in ("step_seconds", "data_seconds"):
        event[name] = [second / 2 for second in event.get(name, [])]
    for name in ("part_seconds", "step_part_seconds"):
        halves = {key: [s / 2 for s in v] if isinstance(v, list) else v / 2 for key, v in event.get(name, {}).items()}
        event[name] = halves


def other_rate(event: dict) -> None:
    if event["kind"] == "trial_started":
        event["plan"]["solver"]["base_lr"] = 0.01


def foreign_data(event: dict) -> None:
    if event["kind"] == "run_started":
        event["datasets"]["val"]["annotations_sha256"] = "1" * 64


def cut(event: dict) -> bool:
    return not (event["kind"] == "steps_done" and event["trial"] == TRIAL and event["iteration"] == 6)


def cut_end(event: dict) -> bool:
    return event["kind"] not in ("trial_ended", "run_ended") or event["trial"] not in ("", "reference-1xcpu-seed2")


def other_config(event: dict) -> None:
    if event["kind"] == "loop_started" and event["trial"] == TRIAL:
        event["config_yaml"] = event["config_yaml"].replace("GAMMA: 0.1", "GAMMA: 0.5")


def never_asked(event: dict) -> bool:
    return event["trial"] != "reference-1xcpu-seed2"


def add_file(files: Files) -> Files:
    return {**files, f"runs/run/{TRIAL}/notes.txt": b"trust me"}


def other_log(files: Files) -> Files:
    return {**files, LOG: files[LOG].replace(b"'box_ap': 41.0", b"'box_ap': 41.5")}


def set_rate(result: dict) -> None:
    result["trials"][1]["base_lr"] = 0.02


def set_ap(result: dict) -> None:
    result["trials"][1]["box_ap"] = 44.0


def set_start(result: dict) -> None:
    result["started"] = "2026-09-21T12:00:00+00:00"


def set_config(files: Files) -> Files:
    return {**files, f"runs/run/{TRIAL}/config.yaml": b"SOLVER:\n  BASE_LR: 0.02\n"}


def cut_log(files: Files) -> Files:
    return {**files, EVENTS: files[EVENTS][:-20]}


CARELESS: dict[str, tuple[Callable[[Files], Files], str, str]] = {
    "a learning rate": (in_results(set_rate), "figure_differs", "base_lr: it is 0.02. The events give 0.005"),
    "a dropped seed": (in_results(without_seed), "trial_dropped", "reference-1xcpu-seed2: the events have this trial"),
    "an AP": (in_results(set_ap), "figure_differs", "box_ap: it is 44.0. The events give 41.0"),
    "a moved clock": (in_results(set_start), "clock_moved", "started: it is '2026-09-21T12:00:00+00:00'"),
    "a foreign data set": (in_events(foreign_data), "data_differ", "not those that the experiment generates"),
    "a cut event log": (cut_log, "events_cut", "the last line is cut off"),
    "a config": (set_config, "config_differs", "config.yaml: it is not what the events hold"),
    "a log": (other_log, "log_disagrees", "after 8 iterations, box_ap is 41.5 in the log, 41.0 in the events"),
    "an added file": (add_file, "file_added", "notes.txt"),
}
"""What was changed, how, and what is said of it; in a bundle with the old manifest and in one with a new one."""


@pytest.mark.parametrize("what", CARELESS)
def test_a_changed_file_is_named_and_what_does_not_follow_from_it(what: str, true: Files, tmp_path: Path) -> None:
    change, code, text = CARELESS[what]
    found = codes(verify(pack_carelessly(tmp_path / "b.zip", change(true), true), tmp_path / "to"))
    assert found.keys() >= {code, "file_added" if code == "file_added" else "file_changed"}
    rehashed = codes(verify(pack(tmp_path / "c.zip", change(true)), tmp_path / "to2"))
    assert text in rehashed[code] and "file_changed" not in rehashed


FORGED: dict[str, tuple[Callable[[dict], bool | None], str, str]] = {
    "a learning rate": (other_rate, "settings_differ", "SOLVER.BASE_LR 0.01, the config of its workers 0.005"),
    "its schedule": (other_rate, "rate_differs", "The plan's schedule has 0.005005 there"),
    "a dropped seed": (never_asked, "trial_dropped", "asks for reference on 1 workers (strong) with seed 2"),
    "an AP": (edited_ap, "log_disagrees", "box_ap is 41.0 in the log, 44.0 in the events"),
    "an AP and its checkpoint": (edited_ap, "checkpoint_differs", "its score is 41"),
    "an AP50": (edited_ap50, "curves_differ", "its box curves have AP50 75.25. The evaluation after 4"),
    "a clock": (started_later, "clock_moved", "took 1.000 s from its start to its loop, and set up for 4.000 s"),
    "all clocks of a trial": (compressed, "clock_moved", "loop_started at iteration 0 is 7 s away from its line"),
    "a cut event log": (cut, "events_cut", "the events of iterations 5 to 6 are not in events.jsonl"),
    "the end of the events": (cut_end, "events_cut", "do not hold the end of the run"),
    "a config": (other_config, "log_disagrees", "the config that it prints is not that of the events"),
}
"""What somebody changes who knows that figures are recomputed: the events, and the record and manifest made of them."""


@pytest.mark.parametrize("what", FORGED)
def test_forged_events_disagree_with_another_witness(what: str, true: Files, tmp_path: Path) -> None:
    change, code, text = FORGED[what]
    forged = in_events(change)(true)
    if what != "the end of the events":
        forged = with_figures(forged, tmp_path / "scratch")
    found = codes(verify(pack(tmp_path / "b.zip", forged), tmp_path / "to"))
    assert text in found[code]
    assert "figure_differs" not in found or what == "the end of the events"


def test_an_evaluation_is_not_missed_where_the_events_say_that_its_process_was_lost(
    true: Files, tmp_path: Path
) -> None:
    def drop(event: dict) -> bool:
        return (event["kind"], event["iteration"]) != ("evaluated", 4) if "iteration" in event else True

    def lose(event: dict) -> None:
        if not drop(event):
            kept = {name: event[name] for name in ("time", "trial", "attempt", "rank", "iteration")}
            event.clear()
            event.update(kept, kind="evaluation_lost", message="lost 3 times")

    text = "the evaluation after 4 iterations is missing"
    for change, missed in ((drop, True), (lose, False)):
        found = codes(verify(pack(tmp_path / "b.zip", in_events(change)(true)), tmp_path / change.__name__))
        assert (text in str(found)) == missed and "events_damaged" not in found


def test_an_ap_that_is_not_the_mean_of_its_classes_is_found(true: Files, tmp_path: Path) -> None:
    def change(event: dict) -> None:
        if event["kind"] == "evaluated" and event["iteration"] == 8:
            event["figures"]["box_ap"] = 60.0

    found = codes(verify(pack(tmp_path / "b.zip", in_events(change)(true)), tmp_path / "to"))
    assert "has box_ap 60.0000, and its 2 classes 40.0000" in found["classes_differ"]


def test_an_edited_manifest_is_found_by_a_file_or_by_its_known_hash(true: Files, tmp_path: Path) -> None:
    honest = verify(pack(tmp_path / "a.zip", true), tmp_path / "a")
    wrong = {**true, RESULTS: true[RESULTS] + b" "}
    found = codes(verify(pack_carelessly(tmp_path / "b.zip", true, wrong), tmp_path / "b"))
    assert found.keys() == {"file_changed"}
    forged = pack(tmp_path / "c.zip", wrong)
    assert codes(verify(forged, tmp_path / "c")) == {}  # a blank changes no statement
    found = codes(verify(forged, tmp_path / "d", manifest_sha256=honest.manifest_sha256))
    assert honest.manifest_sha256 in found["manifest_changed"]


def test_a_missing_file_is_named(true: Files, tmp_path: Path) -> None:
    less = {name: content for name, content in true.items() if name != LOG}
    found = verify(pack_carelessly(tmp_path / "b.zip", less, true), tmp_path / "to")
    assert f"{LOG}: the manifest lists it" in codes(found)["file_missing"]
    assert "logs" not in found.statements
    assert any(finding.code == "log_unchecked" for finding in found.findings)


def test_values_of_any_kind_end_in_a_finding(true: Files, tmp_path: Path) -> None:
    def change(event: dict) -> None:
        if event["kind"] == "evaluated":
            event |= {"iteration": "many", "figures": [1], "box_scored": {}}
        if event["kind"] == "loop_started":
            event["config_yaml"] = "SOLVER:\n" * 1000

    found = codes(verify(pack(tmp_path / "b.zip", in_events(change)(true)), tmp_path / "to"))
    assert "not_computable" in found and "trial_invented" in found


def test_a_figure_that_an_older_version_did_not_know_is_not_missed(true: Files, tmp_path: Path) -> None:
    def older(result: dict) -> None:
        for trial in result["trials"]:
            del trial["goodput"], trial["energy"]
        del result["benchmark"]

    assert codes(verify(pack(tmp_path / "b.zip", in_results(older)(true)), tmp_path / "to")) == {}


def test_a_bundle_of_one_run_is_the_same_bytes_each_time(true: Files, tmp_path: Path) -> None:
    first, second = pack(tmp_path / "a.zip", true), pack(tmp_path / "b.zip", true)
    assert first.read_bytes() == second.read_bytes()


def test_home_folders_are_taken_out(true: Files) -> None:
    assert not [name for name, content in true.items() if b"alice" in content]
    environment = json.loads(true["runs/run/environment.json"])
    assert environment["environment"]["git_commit"] == "0" * 40
    assert "sha256:" in environment["packages"]["numpy"]
    assert environment["datasets"]["train"]["num_images"] == 16
