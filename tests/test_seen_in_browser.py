"""The report and MLflow's pages as a person sees them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select, WebDriverWait

from orchestrator.report.mlflow_links import mlflow_links
from orchestrator.report.plots import PLOTS
from orchestrator.report.writer import write_report
from orchestrator.runlog.folder import RunFolder, read_run_folder
from orchestrator.tracking.driver import Tracker
from tests.builders.browser import as_device, browser, keep_screenshot, needs_chromium
from tests.builders.run_folder import made_experiment, make_run
from tests.builders.s3 import free_port
from tests.builders.waiting import DEADLINE_SECONDS, wait_for, wait_until_served

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[WebDriver]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


DEMO_RUN = "DEMO_RUN"
"""Environment variable with the folder of a real run of the demo: pictures of it instead of made-up figures."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """A run that is tracked, with a model logged for every trial, and its report."""
    if real := os.environ.get(DEMO_RUN):
        return read_run_folder(Path(real).absolute())
    place = tmp_path_factory.mktemp("seen")
    folder = make_run(place / "run", made_experiment(tracking={"log_model": True}))
    before = Path.cwd()
    os.chdir(place)  # where MLflow's default store lies, and its artifacts
    try:
        assert Tracker(folder, f"sqlite:///{place}/mlflow.db").sync()
    finally:
        os.chdir(before)
    run = read_run_folder(folder)
    ids = run.tracking["runs"]
    run.result.mlflow_run_id, run.result.mlflow_tracking_uri = ids[""], f"sqlite:///{place}/mlflow.db"
    for trial in run.result.trials:
        trial.mlflow_run_id = ids[trial.name]
    run.result.write(folder / "results.json")
    write_report(run.result, folder)
    return run


def names(run: RunFolder) -> list[str]:
    """What MLflow calls the trials, and the published figures next to them."""
    return [trial.name for trial in run.result.trials] + [row.name for row in run.result.reference_rows]


def _open_report(driver: WebDriver, run: RunFolder) -> None:
    driver.get((run.path / "report.html").as_uri())


def test_the_report_opens_from_disk_and_shows_every_figure(driver, run):
    as_device(driver, 1200, 900)
    _open_report(driver, run)
    for plot in PLOTS:
        figure = driver.find_element(By.ID, plot.name)
        svg = figure.find_element(By.TAG_NAME, "svg")
        assert figure.is_displayed() and svg.size["width"] > 400 and svg.size["height"] > 150, plot.name
    table = driver.find_element(By.CSS_SELECTOR, "[data-testid=results]").text
    columns = ["Efficiency"] + ["Cost to target"] * (run.result.trials[0].cost is not None)
    for text in (*names(run), *columns):
        assert text in table
    images = driver.find_elements(By.CSS_SELECTOR, ".pictures img")
    assert len(images) >= 6
    assert all(driver.execute_script("return arguments[0].naturalWidth", image) > 100 for image in images)
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    keep_screenshot(driver, "report", 1500)


def test_a_figure_s_link_leads_to_its_definition(driver, run):
    _open_report(driver, run)
    link = driver.find_element(By.CSS_SELECTOR, "#wall_clock figcaption a")
    assert "the driver's start of the trial to its end" in link.get_attribute("title")
    driver.execute_script("arguments[0].click()", link)
    assert driver.current_url.endswith("#def-wall-clock")
    assert driver.find_element(By.ID, "def-wall-clock").is_displayed()


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_curves_stand_out_in_either_theme(driver, run, dark):
    as_device(driver, 1200, 900, dark=dark)
    _open_report(driver, run)
    background = _luminance(driver, "return getComputedStyle(document.body).backgroundColor")
    assert background < 0.05 if dark else background > 0.9
    for script in (
        "return getComputedStyle(document.body).color",
        "return getComputedStyle(document.querySelector('#throughput svg text')).fill",
        "return getComputedStyle(document.querySelector('.note')).color",
    ):
        ink = _luminance(driver, script)
        contrast = (max(ink, background) + 0.05) / (min(ink, background) + 0.05)
        assert contrast >= 4.5, script  # WCAG 2.2, success criterion 1.4.3
    if dark:
        keep_screenshot(driver, "report-dark", 900)


def test_a_phone_shows_the_report_without_scrolling_sideways(driver, run):
    as_device(driver, 375, 800)
    _open_report(driver, run)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 375
    assert driver.find_element(By.CSS_SELECTOR, "#throughput svg").size["width"] > 300
    assert driver.find_element(By.CSS_SELECTOR, "td[data-label='Box AP']").is_displayed()
    keep_screenshot(driver, "report-phone", 1600)


def test_paper_gets_light_colours_and_the_whole_table(driver, run):
    as_device(driver, 794, 1123, dark=True, print_=True)
    _open_report(driver, run)
    assert _luminance(driver, "return getComputedStyle(document.documentElement).getPropertyValue('--paper')") > 0.9
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 794
    as_device(driver, 1200, 900)


def _column(driver: WebDriver, table: str, number: int) -> list[str]:
    """Texts of a column's cells in the rows that are shown."""
    script = """return [...document.getElementById(arguments[0]).tBodies[0].rows].filter(row => row.checkVisibility())
        .map(row => row.cells[arguments[1]].textContent)"""
    return list(driver.execute_script(script, table, number))


def test_eighty_classes_are_sorted_searched_and_chosen(driver, tmp_path):
    experiment = made_experiment(trials={"world_sizes": [1]})
    made = read_run_folder(make_run(tmp_path / "run", experiment, classes=[*COCO_NAMES, *map(str, range(72))]))
    write_report(made.result, made.path)
    as_device(driver, 1200, 900)
    _open_report(driver, made)
    ap, names = _column(driver, "classes-1", 1), _column(driver, "classes-1", 0)
    assert len(names) == 80 and ap == sorted(ap, key=float, reverse=True)
    heading = driver.find_element(By.CSS_SELECTOR, "#classes-1 th:first-child")
    heading.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert heading.get_attribute("aria-sort") == "ascending"
    assert _column(driver, "classes-1", 0)[-8:] == sorted(COCO_NAMES)
    search = driver.find_element(By.CSS_SELECTOR, "#classes input[data-table=classes-1]")
    search.send_keys("light TRAFFIC")
    assert _column(driver, "classes-1", 0) == ["traffic light"]
    assert driver.find_element(By.CSS_SELECTOR, "#classes output").text == "1 of 80"
    choice = Select(driver.find_element(By.CSS_SELECTOR, "#classes .chooser select"))
    for name in ("traffic light", "all classes, mean"):
        choice.select_by_visible_text(name)
        value = choice.first_selected_option.get_attribute("value")
        curves = driver.find_elements(By.CSS_SELECTOR, "#classes [id*='-choice-']")
        shown = {curve.get_attribute("id") for curve in curves if curve.value_of_css_property("display") != "none"}
        assert shown == {
            f"run-1-{figure}-{part}-choice-{value}" for figure in ("recall", "f1") for part in ("box", "mask")
        }
    as_device(driver, 375, 800)
    _open_report(driver, made)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 375


def test_the_same_images_are_seen_side_by_side(driver, run):
    as_device(driver, 1200, 900)
    _open_report(driver, run)
    keep_screenshot(driver, "report-classes", 1150, "#classes")
    rows = driver.find_elements(By.CSS_SELECTOR, ".progress tbody tr")
    assert rows and all(len(row.find_elements(By.TAG_NAME, "img")) >= 3 for row in rows)
    keep_screenshot(driver, "report-progress", 700, ".progress table")


@pytest.fixture(scope="module")
def mlflow_ui(run) -> Iterator[str]:
    """MLflow's pages on the store of the run, served as `make ui` does it."""
    port = free_port()
    place = Path(run.result.mlflow_tracking_uri.removeprefix("sqlite:///")).parent
    makefile = Path(__file__).resolve().parent.parent / "Makefile"
    arguments = re.search(r"mlflow (ui .*)", makefile.read_text()).group(1).split()
    command = [sys.executable, "-m", "mlflow", *arguments, "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_served(address, server)
        yield address
    finally:
        server.terminate()
        server.wait(300)


COCO_NAMES = ("person", "bicycle", "car", "dog", "cat", "traffic light", "dining table", "zebra")

ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"
"""What closes the panel that MLflow opens once in every new browser."""

REDRAWN = (NoSuchElementException, StaleElementReferenceException)
"""Of an element that the page is just redrawing."""

SCROLLABLE = """return [...document.querySelectorAll('div')].filter(
    e => e.scrollHeight > e.clientHeight + 20 && /auto|scroll/.test(getComputedStyle(e).overflowY))"""

SCROLL_ON = """const [box, done] = arguments, at = box.scrollTop;
    box.scrollTop += 200;
    const drawn = () => requestAnimationFrame(() => requestAnimationFrame(() => done(box.scrollTop == at)));
    setTimeout(drawn, 100)"""
"""Scrolls on, waits until what came into sight is drawn, and says whether the end had been reached before."""


def _visit(
    driver: WebDriver, run: RunFolder, ui: str, page: int, until: Callable[[str], bool], wanted: Iterable[str]
) -> None:
    """Opens a page of MLflow by the report's link, waits until its text is there, and looks for some words in it."""
    _, address = mlflow_links(run)[page]
    driver.get("about:blank")
    driver.get(address.replace("http://localhost:5000", ui))

    def shown(driver: WebDriver) -> str | None:
        for button in driver.find_elements(By.CSS_SELECTOR, ASSISTANT):
            button.click()
        text = driver.find_element(By.TAG_NAME, "body").text
        return text if until(text) else None

    seen = [WebDriverWait(driver, DEADLINE_SECONDS, poll_frequency=2, ignored_exceptions=REDRAWN).until(shown)]

    def missing() -> list[str]:
        return [words for words in wanted if not any(words in text for text in seen)]

    def found() -> bool:
        # Long tables hold only the rows in sight: scroll every one of them through, until they have been drawn.
        with suppress(*REDRAWN):
            for box in driver.execute_script(SCROLLABLE) if missing() else []:
                driver.execute_script("arguments[0].scrollTop = 0", box)
                for _ in range(30):
                    seen.append(driver.find_element(By.TAG_NAME, "body").text)
                    if driver.execute_async_script(SCROLL_ON, box):
                        break
        return not missing()

    wait_for(found, lambda: f"not on the page: {missing()}", seconds=120)


COLUMNS = (
    "workers", "throughput/images_per_second", "time/to_train_seconds", "coco/box_ap", "coco/mask_ap",
    "scaling/efficiency",
)  # fmt: skip


def test_mlflow_s_table_shows_the_columns_that_matter_without_choosing_them(driver, run, mlflow_ui):
    as_device(driver, 1500, 560)
    _visit(driver, run, mlflow_ui, 0, lambda text: all(name in text for name in names(run)), COLUMNS)
    keep_screenshot(driver, "mlflow-table", 560)


def test_mlflow_s_compare_page_sets_trials_next_to_the_seed_s_figures(driver, run, mlflow_ui):
    as_device(driver, 1500, 1000)
    found = f"Comparing {len(names(run))} Runs"
    rates = [str(row.images_per_second) for row in run.result.reference_rows]
    assert rates
    wanted = [*names(run), *COLUMNS, *rates]
    _visit(driver, run, mlflow_ui, 1, lambda text: found in text and "coco/box_ap" in text, wanted)
    driver.refresh()  # nothing is scrolled any more
    drawn = WebDriverWait(driver, DEADLINE_SECONDS, ignored_exceptions=REDRAWN)
    drawn.until(lambda driver: "coco/box_ap" in driver.find_element(By.TAG_NAME, "body").text)
    for above in ("Visualizations", "Parameters"):  # folded away, so that names and metrics are in one picture
        heading = driver.find_element(By.XPATH, f"//*[text()='{above}']")
        driver.execute_script("arguments[0].click()", heading)  # the assistant's panel may lie over it
    time.sleep(1)
    keep_screenshot(driver, "mlflow-compare", 900)


def test_the_parent_s_page_holds_the_table(driver, run, mlflow_ui):
    as_device(driver, 1500, 1000)
    _visit(driver, run, mlflow_ui, 2, lambda text: "Time to train" in text, [*names(run), "Efficiency"])


def test_mlflow_s_page_of_a_trial_shows_the_photos_by_step(driver, run, mlflow_ui):
    as_device(driver, 1500, 1100)
    trial = run.result.trials[-1].mlflow_run_id
    driver.get("about:blank")
    experiment = run.tracking["experiment_id"]
    driver.get(f"{mlflow_ui}/#/experiments/{experiment}/runs/{trial}/model-metrics?workflowType=machine_learning")
    wait = WebDriverWait(driver, DEADLINE_SECONDS, poll_frequency=1, ignored_exceptions=REDRAWN)
    wait.until(lambda driver: driver.find_element(By.CSS_SELECTOR, "input[placeholder*='metric charts']")).send_keys(
        "photos"
    )
    photos = "img[src*='photos'][src*='step%2B0']"  # what is annotated
    wait.until(lambda driver: len(driver.find_elements(By.CSS_SELECTOR, photos)) >= 3)


def _luminance(driver: WebDriver, script: str) -> float:
    """Relative luminance (WCAG 2.2) of a CSS colour that a script returns."""
    color = driver.execute_script(script).strip()
    if color.startswith("#"):
        channels = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    else:
        channels = [int(float(part)) for part in re.findall(r"[\d.]+", color)[:3]]
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
