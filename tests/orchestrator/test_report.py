"""The report's page: what it shows, and that it loads and runs nothing."""

import base64
import csv
import hashlib
import io
import re
from pathlib import Path

import pytest
from markupsafe import escape

from orchestrator.report import page, writer
from orchestrator.report.comparison import differing, labels, result_differences
from orchestrator.report.plots import PLOTS
from orchestrator.report.table import table_rows
from orchestrator.report.writer import try_report, write_comparison, write_report
from orchestrator.runlog.folder import read_run_folder
from tests.builders.run_folder import made_experiment, make_run

DOCS = Path(__file__).resolve().parents[2] / "docs" / "measurement.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("made") / "run")
    write_report(read_run_folder(folder).result, folder)
    return folder


@pytest.fixture(scope="module")
def html(run) -> str:
    return (run / "report.html").read_text()


def test_the_report_is_one_small_file_that_loads_nothing_and_runs_one_script(html):
    assert len(html) < 3_000_000
    assert "<link" not in html and "@import" not in html
    assert not re.findall(r'src="(?!data:)', html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in html and f"script-src 'sha256-{digest}'" in html
    assert len(script) < 8_000 and "fetch(" not in script and "innerHTML" not in script


def test_every_figure_is_drawn_and_links_to_its_definition(html):
    for plot in PLOTS:
        figure = re.search(rf'<figure id="{plot.name}".*?</figure>', html, re.S)
        assert figure and "<svg" in figure.group(), plot.name
        assert f'href="#def-{plot.anchor}"' in figure.group() and f'title="{escape(plot.definition)}"' in figure.group()
        assert f'id="def-{plot.anchor}"' in html and f'measurement.md#{plot.anchor}"' in html


def test_ids_are_unique_on_the_page(html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_table_has_trials_references_efficiency_and_costs(run, html):
    rows = table_rows(read_run_folder(run).result)
    assert [row.workers for row in rows] == [1, 2, 4, 1]
    assert all(row.efficiency and row.cost and row.cost_to_target for row in rows[:3])
    assert rows[0].cost == pytest.approx(2.5 * read_run_folder(run).result.trials[0].sections.wall / 3600)
    for text in ("seed, 1 x V100 (reference)", "Efficiency", "Cost to target", "worker_lost", "reference-4xcpu"):
        assert text in html


def test_sample_images_show_what_is_true_and_what_was_found(html):
    # 3 samples and 3 worst images twice, 3 images at 4 evaluations and annotated.
    assert html.count("data:image/webp;base64,") == 6 + 6 + 15
    assert "predicted: " in html and "true: " in html


def test_colours_follow_the_reader_s_theme(html):
    assert "prefers-color-scheme: dark" in html
    figure = html[html.index('id="throughput"') : html.index('id="accuracy_over_time"')]
    assert "var(--series-0)" in figure and not re.findall(r"#[0-9a-f]{6}", figure)


def test_hostile_names_are_shown_and_not_obeyed(tmp_path):
    evil = "<img src=x onerror=alert(1)> $\\frac{1}{0 {{ 7 * 7 }}"
    row = {"name": evil, "world_size": 2, "images_per_second": 5.0, "source": evil}
    folder = make_run(tmp_path / "run", made_experiment(description=evil, reference_rows=[row]))
    write_report(read_run_folder(folder).result, folder)
    html = (folder / "report.html").read_text()
    assert "<img src=x" not in html and "&lt;img src=x onerror=alert(1)&gt;" in html and "{{ 7 * 7 }}" in html
    assert "<img" not in (folder / "report.md").read_text().replace("\\<", "")


def test_a_report_that_fails_is_reported_and_fails_nothing_else(run, tmp_path, monkeypatch):
    def broken(*_: object) -> str:
        raise RuntimeError("no ink")

    monkeypatch.setattr(page, "html_page", broken)
    made, what = try_report(read_run_folder(run).result, tmp_path)
    assert made == tmp_path / "report.md" and made.exists() and (tmp_path / "table.csv").exists()
    assert "no ink" in what and "python -m orchestrator.report" in what
    assert "RuntimeError" in (tmp_path / writer.FAILURE_FILE).read_text()


def test_a_report_is_rebuilt_without_events_and_without_the_data(run, tmp_path):
    (tmp_path / "results.json").write_bytes((run / "results.json").read_bytes())
    write_report(read_run_folder(tmp_path).result, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "Nothing to show: no loss is known." in html and "No pictures:" in html
    assert "<td>circle</td>" in html, "AP by class is in the results"


def test_a_folder_without_results_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="not a run's folder"):
        read_run_folder(tmp_path)


def test_experiments_are_compared_by_config_and_result(run, tmp_path):
    other = make_run(tmp_path / "other", made_experiment("faster", log_period_iterations=10), slower=0.7, seed=5)
    runs = [read_run_folder(run), read_run_folder(other)]
    names = [path.name for path in write_comparison(runs, tmp_path)]
    assert names == ["comparison.html", "comparison.md", "comparison.csv"]
    html = (tmp_path / "comparison.html").read_text()
    assert "log_period_iterations" in html and "more than noise" in html and "cannot tell: one run each" in html
    rows = list(csv.reader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert [row[0] for row in rows[1:]] == ["demo"] * 3 + ["faster"] * 3
    assert labels([runs[0], runs[0]]) == ["demo run (1)", "demo run (2)"]
    assert differing([{"a": "1", "b": "2"}, {"a": "1"}]) == [("b", ["2", "–"])]


def test_a_run_against_its_like_is_within_noise(run, tmp_path):
    like = make_run(tmp_path / "like", made_experiment("like"), seed=9)
    found = result_differences(read_run_folder(run), [("like", read_run_folder(like))])
    rates = [row.verdict for row in found if row.figure == "Images/s"]
    assert len(rates) == 3 and sum(verdict.startswith("within noise") for verdict in rates) >= 2


def test_every_definition_has_its_heading_in_the_docs(html):
    headings = re.findall(r"^#+ (.+)$", DOCS.read_text(), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors |= set(re.findall(r'<a id="([^"]+)"', DOCS.read_text()))
    linked = set(re.findall(r'measurement\.md#([\w-]+)"', html))
    assert linked and linked <= anchors, linked - anchors
