"""A real browser for the tests of the page: Debian's chromium and chromium-driver."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

browser_only = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="chromium is not installed"
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser that logs its console and its requests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def look(browser: Any, url: str, width: int, scheme: str = "light") -> None:
    """Open a page at a width, in a color scheme."""
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get("about:blank")
    browser.get(url)


def wait_for(browser: Any, script: str) -> Any:
    """The value of an expression once it is true."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if value := browser.execute_script(f"return {script}"):
            return value
        time.sleep(0.02)
    said = browser.execute_script("return document.body.innerText.slice(0, 2000)")
    raise AssertionError(f"never true: {script}; the page says {said}")


def complaints(browser: Any) -> list[str]:
    """What the console has since the last call, without answers that the test wants to be refused."""
    entries = [entry["message"] for entry in browser.get_log("browser")]
    return [each for each in entries if "the server responded with a status of" not in each]


def requested(browser: Any) -> set[str]:
    """The addresses requested since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
