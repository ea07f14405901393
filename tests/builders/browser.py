"""A headless Chromium as the tests use it; nothing is installed, a test is skipped where there is none."""

import base64
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver

from tests.builders.waiting import DEADLINE_SECONDS

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
KEEP = "KEEP_SCREENSHOTS"
"""Environment variable with the folder that screenshots are kept in, such as docs/images."""

needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="no Chromium: apt-get install chromium chromium-driver",
)


@contextmanager
def browser(profile: Path) -> Iterator[WebDriver]:
    """A browser with an empty profile."""
    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(DEADLINE_SECONDS)
    driver.set_script_timeout(DEADLINE_SECONDS)
    try:
        yield driver
    finally:
        driver.quit()


def as_device(driver: WebDriver, width: int, height: int, *, dark: bool = False, print_: bool = False) -> None:
    """Makes the page believe in a screen of that size, a dark theme, or paper."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print" if print_ else "", "features": [theme]})


def keep_screenshot(driver: WebDriver, name: str, height: int, selector: str = "") -> Image.Image:
    """The upper part of the page or of an element as a picture; kept as a small WebP where the environment says so."""
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    left, top, right, bottom = 0, 0, picture.width, picture.height
    if selector:
        script = """const box = document.querySelector(arguments[0]).getBoundingClientRect();
            return [box.left, box.top + scrollY, box.right, box.bottom + scrollY].map(Math.round)"""
        left, top, right, bottom = driver.execute_script(script, selector)
    picture = picture.crop((max(0, left - 8), top, right + 8, min(top + height, bottom)))
    if folder := os.environ.get(KEEP):
        Path(folder).mkdir(parents=True, exist_ok=True)
        picture.save(Path(folder) / f"{name}.webp", quality=80, method=6)
    return picture
