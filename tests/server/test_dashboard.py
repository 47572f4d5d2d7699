"""The dashboard: curves from counters, the routes and their key, and the page in a real browser."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from farthing.cost.meter import CostMeter, EstimatedMeter, Usage
from farthing.cost.prices import Hardware, Machine
from farthing.engine.stats import BUCKETS, DiskStats, Histogram, HistogramSnapshot, StatsSnapshot
from farthing.server.dashboard.site import Dashboard, assets
from farthing.server.dashboard.source import History, quantile, server_data
from farthing.server.metrics import mount
from tests.server.browser import browser_only, complaints, look, wait_for

KEY = "a-key"


class Source:
    """A fake engine whose token counts grow with every read."""

    def __init__(self, experts: int = 16) -> None:
        self.looks = 0
        self.experts = experts
        self.ttft = Histogram()
        hardware = Hardware(name="box", kind="cpu", usd_per_hour=1, watts=10, idle_watts=5)
        self.meter = CostMeter(Machine(hardware, 2, declared="2026-01-01"), EstimatedMeter(20, 10))

    def snapshot(self) -> StatsSnapshot:
        self.looks += 1
        self.ttft.observe(0.03)
        empty = HistogramSnapshot(BUCKETS, (0,) * (len(BUCKETS) + 1), 0.0)
        return StatsSnapshot(
            num_requests_running=3,
            num_requests_waiting=1,
            kv_cache_usage=0.25,
            prompt_tokens=100 * self.looks,
            generation_tokens=40 * self.looks,
            prefix_cache_queries=100 * self.looks,
            prefix_cache_hits=25 * self.looks,
            preemptions=0,
            draft_tokens=20 * self.looks,
            accepted_tokens=15 * self.looks,
            drafts=10 * self.looks,
            steps=self.looks,
            busy_seconds=0.0,
            integrity_failures=0,
            failed_steps=0,
            prefix_disk=DiskStats(),
            requests_finished={"stop": self.looks, "error": 0},
            time_to_first_token=self.ttft.snapshot(),
            time_per_output_token=empty,
            inter_token_latency=empty,
            e2e_request_latency=empty,
            request_queue_time=empty,
            expert_tokens={layer: [self.looks * (e % 5) for e in range(self.experts)] for layer in (1, 2, 3)},
            uptime_seconds=5.0,
        )

    def __call__(self) -> dict[str, Any]:
        self.meter.record(Usage(decode_tokens=40, decode_seconds=0.1), 0.0, "m", "team")
        document = server_data("a model", self.snapshot(), self.meter.report(0.0), {"backend": "test"})
        document["layers"] = 3  # layer 3 drafts
        document["gauges"] |= {"memory": 4e8, "waiting": 60 if self.looks in (30, 31) else 1}
        document["counters"] |= {"refused": self.looks, "cpu_seconds": 0.1 * self.looks}
        return document


def fleet() -> dict[str, Any]:
    now = time.time()
    forecast = {"start": now, "step_s": 60.0, "p50": [5.0, 6.0], "p90": [7.0, 8.0], "source": "lstm"}
    decision = {"time": now, "current": 2, "target": 3, "action": "up", "decided_by": "short"}
    return {
        "kind": "gateway",
        "title": "a fleet",
        "counters": {"requests": int(now * 5), "errors": 0},
        "gauges": {"load": 5.0, "ready": 2, "desired": 3, "waiting": 0},
        "forecasts": {"short": forecast},
        "replicas": [{"name": "r0", "state": "ready", "inflight": 1, "served": 9, "failed": 0}],
        "decisions": [{**decision, "reason": "short: needs <b>3</b>", "alarms": ["a late signal"]}],
        "why": "Goes from 2 to 3 replicas: needs <b>3</b>.",
    }


def application(source: Any, key: str | None = None) -> FastAPI:
    def view(request: Request, document: dict[str, Any]) -> dict[str, Any]:
        if key is not None and request.headers.get("authorization") != f"Bearer {key}":
            raise HTTPException(401, "an API key is needed")
        return document

    app = FastAPI()
    mount(app, source, view, interval=0.1)
    return app


# ---- curves ----


def test_rates_ratios_and_quantiles_of_a_window() -> None:
    history, source = History(window=10.0), Source()
    history.add(100.0, source())
    history.add(102.0, source())
    columns = history.columns()
    assert columns["t"] == [100.0, 102.0]
    assert columns["generation_tps"] == [None, 20.0] and columns["prompt_tps"] == [None, 50.0]
    assert columns["prefix_hit"][1] == 0.25 and columns["acceptance"][1] == 0.75
    assert columns["accepted_length"][1] == 1.5
    ttft = columns["ttft_p50"][1]
    assert ttft is not None and 0.02 < ttft <= 0.04
    assert columns["tpot_p50"] == [None, None], "nothing happened: a gap, not a zero"
    assert columns["kv"] == [0.25, 0.25]
    assert history.columns(since=100.0)["t"] == [102.0]


def test_restarted_source_leaves_a_gap() -> None:
    history = History()
    history.add(1.0, {"counters": {"generation_tokens": 50}})
    history.add(2.0, {"counters": {"generation_tokens": 3}})
    history.add(3.0, {"counters": {"generation_tokens": 4}})
    assert history.columns()["generation_tps"] == [None, None, 1.0]


def test_clock_jumping_back_restarts_history() -> None:
    history = History()
    for now in (10.0, 11.0, 4.0, 5.0):
        history.add(now, {"gauges": {"kv": 0.5}})
    assert history.columns()["t"] == [4.0, 5.0]


@given(
    st.lists(st.tuples(st.floats(0.01, 30), st.integers(0, 1000)), min_size=2, max_size=60),
    st.floats(0.5, 20),
)
def test_rates_are_between_those_of_their_steps(steps: list[tuple[float, int]], window: float) -> None:
    history, now, total = History(keep=1000, window=window), 1.0, 0
    rates = []
    for seconds, tokens in steps:
        now, total = now + seconds, total + tokens
        rates.append(tokens / seconds)
        history.add(now, {"counters": {"generation_tokens": total}})
    shown = history.columns()["generation_tps"]
    assert shown[0] is None
    assert all(0 <= r <= max(rates) * (1 + 1e-5) for r in shown[1:] if r is not None)


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0.01, 0.99))
def test_quantiles_are_monotone_and_within_bounds(counts: list[int], q: float) -> None:
    bounds, cumulative = (1.0, 2.0, 4.0), [sum(counts[: i + 1]) for i in range(4)]
    values = [quantile(bounds, cumulative, p) for p in (q / 2, q, (1 + q) / 2)]
    if not sum(counts):
        assert values == [None] * 3
    else:
        assert all(v is not None and 0 <= v <= 4 for v in values)
        assert all(a <= b for a, b in pairwise(v for v in values if v is not None))


# ---- routes ----


def test_page_and_assets_are_served_completely() -> None:
    with TestClient(application(Source(), KEY)) as client:
        page = client.get("/")
        assert page.status_code == 200 and "Content-Security-Policy" in page.headers
        for path in assets():
            assert client.get(path).content == assets()[path].body
            assert (f'"{path}"' in page.text) or path.endswith(
                (".js", ".LICENSE", ".woff2", "index.html", "/", "/dashboard")
            )
        assert client.get("/dashboard/vendor/uPlot.LICENSE").text.startswith("The MIT License")
        assert client.get("/dashboard/../../etc/passwd").status_code == 404
        assert client.get("/dashboard/%2e%2e/router.py").status_code == 404


def test_data_requires_the_key() -> None:
    with TestClient(application(Source(), KEY)) as client:
        assert client.get("/dashboard/data").status_code == 401
        answer = client.get("/dashboard/data", headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200 and answer.json()["title"] == "a model"


def test_sampler_collects_without_a_viewer_and_stops_with_the_application() -> None:
    source = Source()
    with TestClient(application(source)) as client:
        deadline = time.monotonic() + 20
        while source.looks < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        data = client.get("/dashboard/data").json()
    assert len(data["points"]["t"]) >= 3 and data["points"]["generation_tps"][-1] > 0
    assert data["cost"]["accounts"][0]["api_key"] == "team" and data["cost"]["joules_source"] == "estimated"
    assert "histograms" not in data and json.dumps(data)
    assert not [t for t in threading.enumerate() if t.name == "dashboard"]


def test_failing_source_does_not_stop_the_sampler() -> None:
    looks = []

    def source() -> dict[str, Any]:
        looks.append(1)
        if len(looks) == 1:
            raise RuntimeError("not yet")
        return {"kind": "server", "gauges": {"kv": 0.5}}

    with Dashboard(source, interval=0.01) as dashboard:
        deadline = time.monotonic() + 20
        while len(looks) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert dashboard.document()["points"]["kv"][-1] == 0.5


# ---- the page in a browser ----


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


PAINTED = """[...document.querySelectorAll("canvas")].filter((canvas) => canvas.width).every((canvas) =>
  canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean))"""


@contextmanager
def charts(browser: Any, kind: str, width: int, scheme: str) -> Iterator[None]:
    """The charts of a server or gateway, drawn."""
    with serving(application(Source() if kind == "server" else fleet)) as url:
        look(browser, f"{url}#charts", width, scheme)
        wait_for(browser, "document.querySelectorAll('.plot canvas').length >= 4")
        yield


@browser_only
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["server", "gateway"])
def test_page_renders_fits_and_logs_no_errors(browser: Any, kind: str, scheme: str, width: int) -> None:
    with charts(browser, kind, width, scheme):
        wait_for(browser, PAINTED)
        assert wait_for(browser, "document.documentElement.dataset.theme") == scheme
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        text = browser.execute_script("return document.body.innerText")
        assert ("a model" if kind == "server" else "a fleet") in text
        if kind == "gateway":
            assert "2 → 3" in text and "needs <b>3</b>" in text and "a late signal" in text
            assert "Goes from 2 to 3 replicas" in text
            assert text.splitlines().count("Replicas") == 1
        else:
            assert "Spending per key" in text and "team" in text and "3 × the layer's mean" in text
            assert "draft" in text.splitlines() and "Memory" in text
        browser.get("about:blank")
    assert complaints(browser) == []
