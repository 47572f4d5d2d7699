"""The gateway's dashboard: its traffic, the controller's decisions and forecasts, API keys."""

import asyncio
import json
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from farthing.server.config import KeyRing
from farthing.server.dashboard.site import Dashboard
from farthing_fleet.decision_log import DecisionLog, sentence
from farthing_fleet.gateway import process
from farthing_fleet.gateway.process import fleet_data, pages_of
from farthing_fleet.gateway.server import Gateway
from farthing_fleet.types import Decision, Levels

SNAPSHOT = {"time": 1.0, "current": 2, "request_rate": 12.0, "prompt_token_rate": 900.0}


def decision(target: int) -> Decision:
    inputs = {
        "snapshot": SNAPSHOT | {"output_token_rate": 100.0, "cold_start_s": 42.0},
        "capacity": 5.0,
        "plan": {"now": 1.0, "load": 1.4},
        "unit": "requests",
        "lead_s": 60.0,
    }
    return Decision(1.0, 2, target, "up", "short", Levels(short=target), "short: needs more", inputs=inputs)


def fetch(port: int, path: str, key: str = "") -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_decisions_forecasts_and_prices_come_from_the_state_directory(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "decisions.jsonl")
    for target in range(3, 80):
        log.append(decision(target))
    with log.path.open("a") as file:
        file.write('{"time": 1, "torn')
    gateway = Gateway()
    gateway.set_replicas = lambda wanted: gateway.balancer.update(wanted)  # type: ignore[assignment]
    gateway.set_replicas({"a": "http://127.0.0.1:9001"})
    gateway.balancer.replicas["a"].healthy = True
    data = fleet_data(gateway, tmp_path, usd_per_hour=0.72)
    assert json.dumps(data)
    assert [d["target"] for d in data["decisions"]] == list(range(30, 80)), (
        "the newest, the torn line left out"
    )
    assert data["gauges"]["desired"] == 79 and data["gauges"]["load"] == 12.0
    assert data["forecasts"]["short"] == {
        "start": 1.0,
        "step_s": 60.0,
        "p50": [5.0],
        "p90": [7.0],
        "source": "plan",
    }
    assert data["forecasts"]["realtime"]["p50"] == [12.0]
    assert data["replicas"][0]["state"] == "ready" and data["gauges"]["usd_per_hour"] == 0.72
    assert abs(data["gauges"]["usd_per_million"] - 0.72 / 3600 / 1000 * 1e6) < 1e-12
    assert data["facts"]["capacity"] == "5 requests/s per replica"
    assert data["why"] == "Goes from 2 to 79 replicas: needs more."


def test_last_decision_is_a_sentence() -> None:
    need = "short: highest of 2 min by the last minute plans for 6.863 requests/s at 83% utilization, needs 2"
    assert sentence(replace(decision(1), reason=need)) == (
        "Goes from 2 to 1 replica: highest of 2 min by the last minute plans for 6.863 requests/s at 83% "
        "utilization, which needs 2."
    )
    limited = "realtime: load is 4.6 requests/s, needs 6; limited to [1, 2]"
    assert sentence(replace(decision(2), reason=limited)) == (
        "Keeps 2 replicas: load is 4.6 requests/s, which needs 6 (limited to [1, 2])."
    )
    stale = "signals are missing or stale: hold, no scale-down"
    assert sentence(replace(decision(2), reason=stale)) == f"Keeps 2 replicas: {stale}."


def test_repeated_holds_are_shown_once_with_the_last(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "decisions.jsonl")
    for second in range(5):
        log.append(replace(decision(2), time=float(second), action="hold"))
    log.append(replace(decision(3), time=5.0))
    for second in range(6, 9):
        log.append(replace(decision(3), time=float(second), action="hold"))
    shown = fleet_data(Gateway(), tmp_path)["decisions"]
    assert [d["time"] for d in shown] == [0.0, 5.0, 6.0, 8.0]


def test_without_a_controller_the_gateway_shows_its_own_traffic(tmp_path: Path) -> None:
    for state in (None, tmp_path / "none"):
        data = fleet_data(Gateway(), state)
        assert data["decisions"] == [] and data["replicas"] == [] and data["gauges"]["ready"] == 0
        bounds, cumulative = data["histograms"]["ttfb"]["bounds"], data["histograms"]["ttfb"]["cumulative"]
        assert len(cumulative) == len(bounds) + 1


def test_dashboard_is_sampled_again_after_its_source_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    class Source:
        def sample(self) -> None:
            nonlocal taken
            taken += 1
            if taken == 1:
                raise OSError("the disk is full")

    async def scenario() -> None:
        sampling = asyncio.create_task(process._sample(cast(Dashboard, Source())))
        async with asyncio.timeout(10):
            while taken < 3:
                await asyncio.sleep(0)
        assert not sampling.done()
        sampling.cancel()

    monkeypatch.setattr(process, "_SAMPLE_S", 0)
    asyncio.run(scenario())


def test_page_is_public_and_its_data_requires_a_key() -> None:
    async def scenario() -> list[Any]:
        dashboard = Dashboard(lambda: fleet_data(gateway, None))
        gateway = Gateway(keys=KeyRing(["team:secret"]), pages=pages_of(dashboard))
        port = await gateway.start()
        asks = [("/", ""), ("/dashboard/app.js", ""), ("/dashboard/data?since=nonsense", "")]
        asks += [("/dashboard/data?since=0", "secret")]
        try:
            return [await asyncio.to_thread(fetch, port, path, key) for path, key in asks]
        finally:
            await gateway.stop(0)

    page, script, refused, data = asyncio.run(scenario())
    assert page[0] == 200 and b"<title>Farthing</title>" in page[1]
    assert script[0] == 200 and refused[0] == 401
    assert data[0] == 200 and json.loads(data[1])["kind"] == "gateway"
