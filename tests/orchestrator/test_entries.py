"""The page of many entries: what becomes a row, what is verified, and what is refused."""

import base64
import hashlib
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from orchestrator.figures.records import ExperimentResult
from orchestrator.report.__main__ import main
from orchestrator.report.entries import Entry, Estimate, Unpacked, read_entries
from orchestrator.report.entries_page import PAGE, entries_html
from orchestrator.report.entries_plots import ENTRY_PLOTS, time_against_cost
from tests.builders import bundles
from tests.builders.entries import made_entries
from tests.builders.run_folder import made_experiment, make_run

REFERENCES = """\
reference_rows:
  - {name: "seed, 8 x V100", world_size: 8, images_per_second: 55.26, time_to_train_seconds: 22898, box_ap: 37.8,
     mask_ap: 34.4, accelerator: NVIDIA V100, precision: fp32, source: the seed's second protocol}
  - {name: "MLPerf v3.0, 8 x H100", world_size: 8, mlperf_seconds: 1151, accelerator: NVIDIA H100, source: NVIDIA}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three seeds of one and two workers."""
    trials = {"world_sizes": [1, 2], "scaling": "strong", "seeds": [0, 1, 2]}
    return make_run(tmp_path_factory.mktemp("entries") / "run", made_experiment(trials=trials))


@pytest.fixture
def references(tmp_path) -> Path:
    path = tmp_path / "published.yaml"
    path.write_text(REFERENCES)
    return path


def no_bundle(path: Path, to: Path) -> Unpacked:
    raise AssertionError(f"{path} was opened as a bundle")


def changed(run: Path, to: Path, **fields: object) -> Path:
    """A copy of a run's folder whose first trial's results were edited."""
    to.mkdir()
    values = json.loads((run / "results.json").read_text())
    values["trials"][0] |= fields
    (to / "results.json").write_text(json.dumps(values))
    (to / "events.jsonl").write_bytes((run / "events.jsonl").read_bytes())
    return to


def report(*arguments: object):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_repeats_are_one_row_with_their_median_and_the_interval_of_their_mean(run):
    first, second = read_entries([run], no_bundle)
    trials = ExperimentResult.model_validate_json((run / "results.json").read_bytes()).trials
    times = [trial.time_to_train_seconds for trial in trials if trial.world_size == 2]
    assert len(times) == 3 and second.time_to_train.value == statistics.median(times)
    half = 4.302653 * statistics.stdev(times) / 3**0.5  # Student's t, 2 degrees of freedom
    assert second.time_to_train.low == pytest.approx(statistics.fmean(times) - half)
    assert second.time_to_train.high == pytest.approx(statistics.fmean(times) + half)
    rates = [trial.images_per_second for trial in trials if trial.world_size == 2]
    assert second.rate_per_chip.value == pytest.approx(statistics.median(rates) / 2)
    assert second.images_per_second == pytest.approx(statistics.median(rates))
    assert (first.chips, second.chips) == (1, 2) and first.efficiency.value == 1
    assert second.efficiency.low < second.efficiency.value < second.efficiency.high
    assert second.cost.value == pytest.approx(2.5 * 2 * statistics.median(times) / 3600)
    assert "8 images" in second.target and "median of 3" in second.note


def test_a_repeat_that_missed_the_target_leaves_no_interval_and_most_of_them_no_time(run, tmp_path):
    values = json.loads((run / "results.json").read_text())
    for missed, expected in ((1, True), (2, False)):
        for trial in values["trials"][:missed]:
            trial["time_to_train_seconds"] = None
        (tmp_path / "results.json").write_text(json.dumps(values))
        time = read_entries([tmp_path], no_bundle)[0].time_to_train
        assert (time.value is not None) is expected and time.low is None


def test_a_run_s_figures_are_recomputed_from_its_events(run, tmp_path):
    assert {(row.verdict, row.verified) for row in read_entries([run], no_bundle)} == {
        ("verified", "run folder: figures recomputed from its events")
    }
    edited = read_entries([changed(run, tmp_path / "edited", time_to_train_seconds=1.0, device_name="H100")], no_bundle)
    assert [row.verdict for row in edited] == ["refuted", "verified"]
    assert edited[0].verified == "run folder: its events give another chip, time to train"
    without = changed(run, tmp_path / "without")
    (without / "events.jsonl").unlink()
    assert {(row.verdict, row.verified) for row in read_entries([without], no_bundle)} == {
        ("open", "run folder: not recomputed: its events are not there")
    }


def test_published_figures_are_rows_that_nothing_verifies(references):
    seed, mlperf = read_entries([references], no_bundle)
    assert seed == Entry(
        name="seed, 8 x V100", kind="reference", source="the seed's second protocol", chips=8, chip="NVIDIA V100",
        precision="fp32", time_to_train=Estimate(22898.0), rate_per_chip=Estimate(55.26 / 8),
        note="reached box AP 37.8, mask AP 34.4", verified="source only",
    )  # fmt: skip
    assert mlperf.time_to_train == Estimate() and mlperf.seconds == 1151.0
    assert mlperf.chip_hours == pytest.approx(8 * 1151 / 3600)


def test_a_bundle_is_verified_and_read_from_where_it_was_unpacked(run, tmp_path):
    bundle = tmp_path / "made.zip"
    bundle.write_bytes(b"made")
    places = []

    def opened(path: Path, to: Path) -> Unpacked:
        assert path == bundle
        places.append(changed(run, to / "run"))
        return Unpacked([to / "run"], "files, figures")

    rows = read_entries([bundle, tmp_path / "." / "made.zip"], opened)
    assert len(places) == 1 and not places[0].exists(), "given twice, it counts once, and nothing is left behind"
    assert {(row.verdict, row.verified) for row in rows} == {("verified", "bundle: files, figures")}
    assert rows[0].source == f"{tmp_path.name}/made.zip"


def test_the_command_verifies_bundles_and_refuses_one_that_was_doctored(tmp_path):
    files = bundles.files_of(bundles.make_run(tmp_path / "run", tmp_path / "data"))
    honest, doctored = bundles.pack(tmp_path / "honest.zip", files), tmp_path / "doctored.zip"
    name = "runs/run/results.json"

    def faster(result: dict) -> None:
        result["trials"][0]["images_per_second"] *= 2

    bundles.pack(doctored, {**files, name: bundles.edit_json(files[name], faster)})
    assert report(honest, "--to", tmp_path / "page").exit_code == 0
    assert "✓ bundle: files, figures, settings, times, logs<" in (tmp_path / "page" / PAGE).read_text()
    done = report(honest, doctored, "--to", tmp_path / "other")
    assert done.exit_code == 2 and not (tmp_path / "other").exists()
    assert done.output.startswith(f"error: {doctored}: not verified: ") and "images_per_second" in done.output
    assert len(done.output.splitlines()) == 1


def test_every_wrong_entry_is_named_in_one_line_and_nothing_is_written(run, references, tmp_path):
    empty, words = tmp_path / "empty", tmp_path / "words.yaml"
    empty.mkdir()
    words.write_text("reference_rows: [{name: x, world_size: 0}]\n")
    many = changed(run, tmp_path / "many", world_size=10**30)
    later = changed(run, tmp_path / "later")
    events = (later / "events.jsonl").read_text()
    (later / "events.jsonl").write_text(events.replace('"plan":{', '"plan":{"of_a_later_version":1,'))
    bad = [empty, words, tmp_path / "gone", many, tmp_path / "none", later]
    (tmp_path / "none").mkdir()
    values = json.loads((run / "results.json").read_text()) | {"trials": []}
    (tmp_path / "none" / "results.json").write_text(json.dumps(values))
    done = report(run, references, *bad, "--to", tmp_path / "page")
    assert done.exit_code == 2 and not (tmp_path / "page").exists()
    lines = done.output.splitlines()
    assert [line.startswith(f"error: {path}") for line, path in zip(lines, bad, strict=True)] == [True] * len(bad)
    reasons = ("not a run's folder", "world_size", "no such file", "accelerators", "no trial", "version")
    assert [reason in line for reason, line in zip(reasons, lines, strict=True)] == [True] * len(bad)


def test_a_bundle_that_cannot_be_verified_is_named_with_what_does_not_follow(tmp_path):
    (tmp_path / "made.zip").write_bytes(b"made")

    def opened(path: Path, _: Path) -> Unpacked:
        raise ValueError(f"{path}: box AP was edited")

    with pytest.raises(ValueError, match=r"^[^\n]*made.zip: box AP was edited$"):
        read_entries([tmp_path / "made.zip"], opened)


def test_the_command_writes_one_page_and_keeps_what_it_did_without_to(run, references, tmp_path):
    done = report(run, references, "--to", tmp_path / "new" / "page")
    assert done.exit_code == 0 and done.output.strip() == str(tmp_path / "new" / "page" / PAGE)
    assert sorted(path.name for path in (tmp_path / "new" / "page").iterdir()) == [PAGE]
    refused = report(run, "--to", tmp_path, "--against", run)
    assert refused.exit_code == 2 and "--against" in refused.output
    (tmp_path / "file").write_text("")
    assert report(run, "--to", tmp_path / "file").exit_code == 2
    assert report(run, "--output", tmp_path / "alone").exit_code == 0 and (tmp_path / "alone" / "report.html").exists()
    assert report(references).exit_code == 2


def test_the_page_loads_nothing_and_lets_no_script_run_but_its_own():
    html = entries_html(made_entries(3))
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in html
    assert "<link" not in html and "@import" not in html and not re.findall(r'src="(?!data:)', html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_strangers_text_is_shown_and_not_obeyed():
    evil = '"><img src=x onerror=alert(1)></script> $\\frac{1}{0 {{ 7 * 7 }}'
    row = replace(
        made_entries(1)[0], name=evil, source=evil, chip=evil, precision=evil, recipe=evil, target=evil, note=evil,
        verified=evil,
    )  # fmt: skip
    html = entries_html([row])
    assert "<img src=x" not in html and html.count("</script>") == 1 and "49" not in re.findall(r"<h1>.*?</h1>", html)
    assert "&lt;img src=x onerror=alert(1)&gt;" in html and "{{ 7 * 7 }}" in html


def test_the_shortest_time_is_on_top_and_what_was_not_measured_at_the_end():
    times = {
        "slow": Estimate(9.0, 8.0, 10.0), "none": Estimate(), "fast": Estimate(2.0), "never": Estimate(math.inf),
    }  # fmt: skip
    made = replace(made_entries(1)[0], mlperf_time=Estimate())
    rows = [replace(made, name=name, time_to_train=time) for name, time in times.items()]
    html = entries_html(rows)
    found = re.findall(r'<td class="text" data-label="Entry" data-value="(\w+)"', html)
    assert found == ["fast", "slow", "none", "never"]
    assert html.count('aria-sort="ascending"') == 1 and "8.0 – 10.0" in html


def test_pictures_have_logarithmic_axes_and_a_point_for_every_entry_that_has_the_figures(references):
    rows = [*made_entries(40), *read_entries([references], no_bundle)]
    for plot in ENTRY_PLOTS:
        axes = plot.draw(rows).axes[0]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    timed = {f"entry-{n}" for n, row in enumerate(rows) if row.seconds is not None}
    assert {line.get_gid() for line in time_against_cost(rows).axes[0].lines} == timed
    svg, missing = ENTRY_PLOTS[0].svg(rows)
    assert not missing and f'id="time-against-cost-{min(timed)}"' in svg
    unknown = {"time_to_train": Estimate(), "mlperf_time": Estimate(), "rate_per_chip": Estimate(0.0)}
    nothing = [replace(row, **unknown) for row in rows]
    for plot in ENTRY_PLOTS:
        svg, missing = plot.svg(nothing)
        assert not svg and missing.startswith("no entry has")


def test_two_hundred_entries_fit_into_a_mail():
    assert len(entries_html(made_entries(200))) < 2_000_000
