"""Larger models on the page: who may ask and download, one at a time, and what the page shows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from farthing.planner.estimate import Machine
from farthing.planner.offers import offers
from farthing.process import Progress
from farthing.server import pulls
from farthing.server.config import KeyRing
from tests.server.browser import browser_only, complaints, look, wait_for
from tests.server.harness import ScriptedEngine, running, until
from tests.server.test_page import press, texts
from tests.server.test_page_access import faults

MEMORY = 16 << 30


class Download:
    """Stands for the hub: what it is asked for, and when it sends it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go = threading.Event()
        self.error: Exception | None = None

    def find(self, model: str) -> Any:
        self.asked.append(model)
        return SimpleNamespace(fetch=self._fetch)

    def _fetch(self, progress: Progress) -> Path:
        progress("downloading a/b", 25, 100)
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return Path()


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> Iterator[Download]:
    made = Download()
    monkeypatch.setattr(pulls, "offers_here", lambda: list(offers(Machine(1, 8, 60.0, 200.0), MEMORY)))
    monkeypatch.setattr(pulls, "machine_memory", lambda: MEMORY)
    monkeypatch.setattr("farthing.hub.cached", lambda: iter(()))
    monkeypatch.setattr("farthing.hub.find_model", made.find)
    yield made
    made.go.set()


def test_what_fits_is_listed_and_one_is_downloaded(download: Download) -> None:
    with running(ScriptedEngine()) as server, httpx.Client(base_url=server.url) as http:
        found = http.get("/dashboard/models").json()
        names = [each["name"] for each in found["models"]]
        assert "qwen3-8b" in names and "qwen3-32b" not in names and found["pull"] is None
        for other in ("qwen3-32b", "owner/name", "../x"):
            refused = http.post("/dashboard/pull", json={"model": other})
            assert refused.status_code == 404 and "fits" in refused.json()["error"]["message"]
        assert http.post("/dashboard/pull", json={"model": "qwen3-8b"}).status_code == 202
        until(lambda: http.get("/dashboard/pull").json()["total"])
        now = {"model": "qwen3-8b", "what": "downloading a/b", "done": 25, "total": 100, "error": ""}
        assert http.get("/dashboard/pull").json() == now == http.get("/dashboard/models").json()["pull"]
        assert http.post("/dashboard/pull", json={"model": "qwen3-4b"}).status_code == 409
        download.error = OSError("the disk has 1 GB free")
        download.go.set()
        until(lambda: not http.get("/dashboard/pull").json()["what"])
        assert http.get("/dashboard/pull").json()["error"] == "the disk has 1 GB free"
        download.error = None
        assert http.post("/dashboard/pull", json={"model": "qwen3-8b"}).status_code == 202
        until(lambda: not http.get("/dashboard/pull").json()["what"])
        assert http.get("/dashboard/pull").json()["error"] == "" and download.asked == ["qwen3-8b"] * 2


STRANGERS = [
    ({"Origin": "https://evil.example"}, "another server's page"),
    ({"Origin": "null"}, "another server's page"),
    ({"Sec-Fetch-Site": "cross-site"}, "another server's page"),
    ({"X-Forwarded-For": "10.0.0.1"}, "through a proxy"),
    ({"Forwarded": "for=10.0.0.1"}, "through a proxy"),
]


@pytest.mark.parametrize(("headers", "why"), STRANGERS)
def test_strangers_download_nothing(download: Download, headers: dict[str, str], why: str) -> None:
    with running(ScriptedEngine()) as server, httpx.Client(base_url=server.url, headers=headers) as http:
        answers = [http.get("/dashboard/models"), http.get("/dashboard/pull")]
        answers.append(http.post("/dashboard/pull", json={"model": "qwen3-8b"}))
        assert [each.status_code for each in answers] == [403] * 3
        assert all(why in each.json()["error"]["message"] for each in answers)
    assert download.asked == []


def test_only_a_server_of_this_machine_and_with_keys_only_an_admin(download: Download) -> None:
    keys = {"keys": KeyRing(["a:user"]), "admin_keys": KeyRing(["b:admin"])}
    body = {"model": "qwen3-8b"}
    with running(ScriptedEngine(), **keys) as server:
        for key, status in (("wrong", 401), ("user", 403), ("admin", 202)):
            headers = {"Authorization": f"Bearer {key}"}
            found = httpx.post(f"{server.url}/dashboard/pull", json=body, headers=headers)
            assert found.status_code == status
    with running(ScriptedEngine(), host="0.0.0.0", **keys) as server:
        headers = {"Authorization": "Bearer admin"}
        found = httpx.post(f"{server.url}/dashboard/pull", json=body, headers=headers)
        assert found.status_code == 403 and "reachable" in found.json()["error"]["message"]
    assert download.asked == ["qwen3-8b"]


@browser_only
@pytest.mark.parametrize("width", [360, 1440])
def test_the_page_offers_larger_models_and_shows_the_download(
    browser: Any, download: Download, width: int
) -> None:
    complaints(browser)
    with running(ScriptedEngine()) as server:
        for _ in range(2):
            look(browser, server.url, width)
            browser.execute_script("localStorage.clear()")
        press(browser, "Larger models that fit")
        wait_for(browser, "document.querySelectorAll('.pulls li').length > 1")
        at = texts(browser, ".pulls b").index("qwen3-8b")
        assert "GB to download" in texts(browser, ".pulls span")[at]
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert faults(browser) == []
        browser.execute_script("document.querySelectorAll('.pulls button')[arguments[0]].click()", at)
        bar = "document.querySelector('.larger .waiting:not([hidden]) progress')"
        wait_for(browser, f"{bar}?.value === 0.25")
        look(browser, server.url, width)
        press(browser, "Larger models that fit")
        wait_for(browser, f"{bar}?.value === 0.25 && document.querySelector('.pulls button').disabled")
        download.go.set()
        said = "document.querySelector('.larger p').textContent"
        wait_for(browser, f"{said}.endsWith('(farthing stop), then type farthing serve --fit qwen3-8b')")
        assert browser.execute_script(f"return !{bar} && !document.querySelector('.pulls button').disabled")
        browser.get("about:blank")
    assert complaints(browser) == []
