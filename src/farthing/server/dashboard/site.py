"""The page, its assets and its data, independent of the server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from farthing.server.dashboard.source import History

log = logging.getLogger(__name__)

STATIC = Path(__file__).with_name("static")
PREFIX = "/dashboard/"
DATA_PATH = PREFIX + "data"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".LICENSE": "text/plain; charset=utf-8",
}
# Nothing from other hosts, no script or style within the page, and no text that becomes markup.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page."""

    body: bytes
    content_type: str


@cache
def assets() -> Mapping[str, Asset]:
    """Every file by its path on the server: `/` and `/dashboard` (the page), `/dashboard/app.js`, …"""
    found = {
        PREFIX + str(file.relative_to(STATIC)): Asset(file.read_bytes(), _TYPES[file.suffix])
        for file in sorted(STATIC.rglob("*"))
        if file.suffix in _TYPES
    }
    page = found[PREFIX + "index.html"]
    return {"/": page, PREFIX.rstrip("/"): page, PREFIX: page, **found}


class Dashboard:
    """Samples a source every `interval` seconds and keeps `keep` points. A context manager."""

    def __init__(self, data: Callable[[], Mapping[str, Any]], interval: float = 1.0, keep: int = 900) -> None:
        self._data = data
        self._interval = interval
        self._history = History(keep, window=max(5.0, 2 * interval))
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start sampling in a separate thread."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop sampling."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def sample(self) -> None:
        """Sample the source once: for servers that do this in their event loop instead of calling `start`."""
        with self._lock:
            self._sample()

    def asset(self, path: str) -> Asset | None:
        """The file at a path of the server; None if there is none."""
        return assets().get(path)

    def document(self, since: float = 0.0) -> dict[str, Any]:
        """The data for the page: the source's current facts, and the points after `since` (wall clock)."""
        with self._lock:
            if self._history.last is None:
                self._sample()
            last = self._history.last
            points = self._history.columns(since)
        assert last is not None
        shown = {k: v for k, v in last.data.items() if k != "histograms"}
        return {**shown, "now": last.time, "interval": self._interval, "points": points}

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.sample()
            except Exception:
                log.exception("the dashboard's source failed")
            self._stop.wait(self._interval)

    def _sample(self) -> None:
        self._history.add(time.time(), self._data())
