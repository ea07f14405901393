"""What a cluster's monitoring sees of a run: figures of running trials, the dashboard that draws them, and links."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.grafana import DASHBOARD, dashboard
from orchestrator.figures.catalog import FIGURES
from orchestrator.figures.gauges import GAUGES, LiveFigures
from orchestrator.report.page import html_page
from orchestrator.report.writer import markdown_report
from orchestrator.runlog.folder import read_run_folder
from orchestrator.tracking.notes import resume_tags, run_tags
from tests.builders.run_folder import make_run
from tests.builders.trials import TrialBuilder, plan, trained
from trainers.contract.events import Event, RunStarted, TrialEnded, WorkerStarted

EPOCH = 1_700_000_000.0
TRIAL = ("demo", "demo/1", "reference-2xcpu")


def run_started() -> RunStarted:
    return RunStarted(
        trial="", attempt=0, rank=-1, time=EPOCH, experiment={"name": "demo"}, run_id="demo/1", tags={}
    )  # fmt: skip


def events(made: TrialBuilder) -> list[Event]:
    return [run_started(), *(event for event in made.events if not isinstance(event, TrialEnded))]


def shown(events: list[Event]) -> dict[str, float]:
    figures = LiveFigures()
    for event in events:
        figures.take(event)
    figures.take_goodput(events)
    values = figures.values()
    assert {labels for _, labels, _ in values} <= {TRIAL}
    return {name.removeprefix("detectron2_"): value for name, _, value in values}


def test_a_running_trial_shows_its_last_window_and_evaluation():
    # Its second window: two ranks of 4 steps with 2 images each; the slower takes 1.1 s a step. A tenth is data.
    values = shown(events(trained()))
    assert values.pop("images_per_second") == pytest.approx(16 / 4.4)
    assert values.pop("step_p50_seconds") == pytest.approx(1.0)
    assert values.pop("data_wait_ratio") == pytest.approx(0.1)
    assert 1.0 < values.pop("step_p95_seconds") <= 1.1
    # 8.4 s of rank 0's steps are useful of the 28 s until its last event.
    assert values.pop("goodput_ratio") == pytest.approx((3.6 + 3.6) / 28)
    assert values == {
        "total_loss": 1.0, "learning_rate": 0.02, "peak_memory_bytes": 2 * 2**30, "box_ap": 55.0, "mask_ap": 46.0,
        "restarts": 0, "iterations": 8, "workers": 2,
    }  # fmt: skip


def test_what_is_not_known_yet_is_not_shown():
    made = TrialBuilder(plan())
    made.started()
    assert shown(events(made)) == {"restarts": 0, "workers": 2}


def test_a_trial_that_has_ended_is_not_shown_until_it_goes_on():
    made = trained()
    assert shown([run_started(), *made.events]) == {}
    made.restarted(40.0, 8)
    again = [run_started(), *made.events]
    assert shown(again)["restarts"] == 1 and shown(again)["box_ap"] == 55.0


def test_what_workers_report_after_the_end_of_their_trial_does_not_show_it_again():
    made = trained()
    made.steps(60.0, 8, 0.5, 0.5)
    assert shown([run_started(), *made.events]) == {}


def test_a_trial_that_lost_its_driver_is_not_shown_before_it_goes_on():
    made = trained()
    lost = [*events(made), run_started()]
    assert shown(lost) == {}
    made.restarted(40.0, 8)
    assert shown([*lost, made.events[-1]])["restarts"] == 1


def test_fewer_workers_after_a_restart_complete_a_window_by_themselves():
    made = trained()
    made.events.pop()
    made.restarted(40.0, 8)
    made.emit(
        WorkerStarted, 50.0, 0, host="a", node_id="a", pid=1, local_rank=0, device_name="", device_memory_gib=None,
        versions={}, world_size=1,
    )  # fmt: skip
    made.steps(60.0, 8, 0.5, 0.5, num_images=8)
    values = shown(events(made))
    assert (values["workers"], values["iterations"], values["images_per_second"]) == (1, 10, 8.0)


def test_names_keep_prometheus_conventions():
    assert GAUGES.keys() <= FIGURES.keys()
    units = {"s": "_seconds", "GiB": "_bytes"}
    for key, name in GAUGES.items():
        assert re.fullmatch(r"detectron2_[a-z0-9_]+", name)
        unit = FIGURES[key].unit
        assert name.endswith(units.get(unit, "")), f"{name} is in {unit}"
    assert len(set(GAUGES.values())) == len(GAUGES)


def test_the_dashboard_draws_every_gauge_and_no_other():
    text = DASHBOARD.read_text()
    drawn = set(re.findall(r"ray_(detectron2_\w+)", text))
    assert drawn == set(GAUGES.values())
    assert json.loads(text) == dashboard(), "`python -m cluster.grafana` writes it"


def test_a_run_links_its_page_in_rays_dashboard_also_where_it_goes_on(tmp_path: Path):
    page = "http://10.0.0.10:8265/#/jobs/02000000"
    run, forged = (replace(read_run_folder(make_run(tmp_path / name)), trials=[]) for name in ("run", "forged"))
    run.result.environment["ray_dashboard"] = page
    forged.result.environment["ray_dashboard"] = "javascript:alert(1)"
    html = html_page([run, forged], tmp_path)
    assert f'<a href="{page}">{page}</a>' in html and 'href="javascript' not in html
    assert f"[Ray's dashboard](<{page}>)" in markdown_report(run.result)
    assert "](" not in markdown_report(forged.result)
    started = replace(run_started(), attempt=1, tags={"run.ray_dashboard": page, "run.host": "head"})
    assert run_tags(started)["run.ray_dashboard"] == page
    assert resume_tags(started) == {"run.ray_dashboard": page}
    assert resume_tags(replace(started, changes={"faults.max_failures": 2})).keys() == {"run.ray_dashboard", "resume.1"}
