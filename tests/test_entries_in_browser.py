"""The page of many entries as a person uses it: sorted, filtered, by mouse, keyboard and phone, dark and on paper."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select

from orchestrator.report.entries import read_entries
from orchestrator.report.entries_page import write_entries
from tests.builders.browser import as_device, browser, keep_screenshot, needs_chromium
from tests.builders.commands import ROOT
from tests.builders.entries import made_entries

pytestmark = needs_chromium

REFERENCES = sorted((ROOT / "references").glob("*.yaml"))


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """The page of two hundred made-up entries with the published figures of this project."""
    published = read_entries(REFERENCES, lambda path, to: pytest.fail(f"{path} is no bundle"))
    assert len(published) > 10
    return write_entries([*made_entries(200), *published], tmp_path_factory.mktemp("page")).as_uri()


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[WebDriver]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def shown(driver: WebDriver, column: int) -> list[str]:
    """What the rows that are seen are sorted by in a column, from top to bottom."""
    script = """return [...document.querySelectorAll("#entries tbody tr")].filter(row => row.offsetParent)
        .map(row => row.cells[arguments[0]].dataset.value)"""
    return driver.execute_script(script, column)


def numbers(values: list[str]) -> list[float]:
    return [float(value) for value in values if value]


def heading(driver: WebDriver, text: str):
    xpath = f"//table[@id='entries']//th[button[normalize-space()='{text}']]"
    found = driver.find_element(By.XPATH, xpath)
    return found, driver.execute_script("return arguments[0].cellIndex", found)


def choose(driver: WebDriver, key: str, value: str) -> None:
    Select(driver.find_element(By.CSS_SELECTOR, f"select[data-key={key}]")).select_by_visible_text(value)


def test_headings_sort_by_mouse_and_keyboard_with_what_is_not_measured_last(driver, address):
    as_device(driver, 1400, 1000)
    driver.get(address)
    first, column = heading(driver, "Time to train (s)")
    assert first.get_attribute("aria-sort") == "ascending"
    times = shown(driver, column)
    assert len(times) > 210 and numbers(times) == sorted(numbers(times))
    assert times[len(numbers(times)) :] == [""] * (len(times) - len(numbers(times))) != []
    first.find_element(By.TAG_NAME, "button").click()
    assert first.get_attribute("aria-sort") == "descending"
    turned = shown(driver, column)
    assert numbers(turned) == sorted(numbers(times), reverse=True) and turned[-1] == ""
    rate, column = heading(driver, "Images/s per chip")
    button = rate.find_element(By.TAG_NAME, "button")
    driver.execute_script("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    assert rate.get_attribute("aria-sort") == "descending" and first.get_attribute("aria-sort") is None
    assert numbers(shown(driver, column)) == sorted(numbers(shown(driver, column)), reverse=True)
    button.send_keys(Keys.SPACE)
    assert rate.get_attribute("aria-sort") == "ascending"
    name, column = heading(driver, "Entry")
    name.find_element(By.TAG_NAME, "button").click()
    made = [text for text in shown(driver, column) if text.startswith("made ")]
    assert [text.split(":")[0] for text in made] == [f"made {number}" for number in range(200)]
    assert driver.get_log("browser") == []


def test_choices_and_words_filter_rows_and_points_together(driver, address):
    as_device(driver, 1400, 1000)
    driver.get(address)
    rows = made_entries(200)
    choose(driver, "chip", "NVIDIA L4")
    choose(driver, "precision", "bf16")
    wanted = {row.name for row in rows if (row.chip, row.precision) == ("NVIDIA L4", "bf16")}
    assert set(shown(driver, 0)) == wanted and 0 < len(wanted) < 50
    output = driver.find_element(By.CSS_SELECTOR, "output[data-table=entries]")
    total = len(rows) + len(read_entries(REFERENCES, lambda path, to: pytest.fail(str(path))))
    assert output.text == f"{len(wanted)} of {total}" and output.get_attribute("aria-live") == "polite"
    points = driver.execute_script("""return [...document.querySelectorAll("#rate_against_chips [id*='-entry-']")]
        .filter(point => point.style.display != "none").map(point => point.querySelector("title").textContent)""")
    assert set(points) == wanted
    search = driver.find_element(By.CSS_SELECTOR, "input[data-table=entries]")
    search.send_keys("FAST made")
    assert set(shown(driver, 0)) == {name for name in wanted if "fast" in name}
    search.clear()
    search.send_keys("mlperf v3.0")
    assert shown(driver, 0) == []
    choose(driver, "chip", "all")
    choose(driver, "precision", "all")
    assert shown(driver, 0) and all(name.startswith("MLPerf v3.0") for name in shown(driver, 0))
    choose(driver, "chips", "64")
    assert len(shown(driver, 0)) == 1


def test_a_point_leads_to_its_row(driver, address):
    as_device(driver, 1400, 1000)
    driver.get(address)
    identity = driver.execute_script("""const point = document.querySelector("#rate_against_chips [id*='-entry-']");
        point.dispatchEvent(new MouseEvent("click")); return location.hash""")
    assert driver.find_element(By.CSS_SELECTOR, f"tr{identity}").is_displayed()
    keep_screenshot(driver, "entries", 1250)


def test_a_phone_shows_cards_that_a_choice_sorts(driver, address):
    as_device(driver, 375, 800)
    driver.get(address)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 375
    order = Select(driver.find_element(By.CSS_SELECTOR, "select[data-sort]"))
    assert order.first_selected_option.text == "Time to train (s), ascending"
    order.select_by_visible_text("Chips, descending")
    assert numbers(shown(driver, 2)) == sorted(numbers(shown(driver, 2)), reverse=True)
    assert driver.find_element(By.CSS_SELECTOR, "td[data-label='Images/s per chip']").is_displayed()
    keep_screenshot(driver, "entries-phone", 1600)


def test_the_page_is_dark_where_the_reader_is_and_light_on_paper_without_controls(driver, address):
    as_device(driver, 1400, 1000, dark=True)
    driver.get(address)
    paper = "return getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()"
    assert driver.execute_script(paper) == "#11161d"
    color = "return getComputedStyle(document.querySelector(arguments[0])).color"
    assert driver.execute_script(color, ".controls select") == driver.execute_script(color, "body")
    keep_screenshot(driver, "entries-dark", 1250)
    as_device(driver, 1040, 730, dark=True, print_=True)
    assert driver.execute_script(paper) == "#fdfdfd"
    assert not driver.find_element(By.CSS_SELECTOR, ".controls").is_displayed()
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 1040
    assert len(shown(driver, 0)) > 210
    as_device(driver, 1400, 1000)


def test_without_scripts_the_page_has_all_rows_and_no_controls(address):
    text = Path(address.removeprefix("file://")).read_text()
    assert '<div class="controls screen" role="search" aria-label="Filter the entries" hidden>' in text
    assert text.count('<tr id="entry-') > 210
