"""Real faults: no accepted request is lost without an error, and missing data never scales down."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from farthing_fleet.actuators.kubernetes import ScalePatch, Target, connect
from farthing_fleet.actuators.local import LocalConfig
from farthing_fleet.config import FleetConfig, PolicyConfig, SignalsConfig
from farthing_fleet.controller import Controller
from farthing_fleet.decision_log import read_log
from farthing_fleet.policy import Policy
from farthing_fleet.signals_prometheus import PrometheusSource
from farthing_fleet.signals_scrape import ScrapeSource
from farthing_fleet.types import Decision
from farthing_fleet.up import LocalFleet, UpConfig
from tests.fleet.doubles import replica as double
from tests.fleet.doubles.kubernetes import FakeKubernetes
from tests.fleet.doubles.replica import FakeReplica
from tests.fleet.doubles.services import prometheus

KEY = ("deployments", "prod", "deepseek")
TARGET = Target.parse("deployment/deepseek", "prod")
POLICY = PolicyConfig(capacity=1.0, interval_s=0.1, cold_start_s=1.0, stale_after_s=3.0, drain_s=5.0)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


def last(loop: Controller) -> Decision:
    assert loop.metrics.last is not None
    return loop.metrics.last


# ---- Prometheus gone ----


@pytest.mark.anyio
async def test_prometheus_gone_holds_and_comes_back(tmp_path: Path) -> None:
    async with FakeKubernetes() as api, FakeReplica(name="a") as replica:
        api.replicas[KEY] = 5
        manager = prometheus(tmp_path, [f"127.0.0.1:{replica.port}"])
        url, process = await asyncio.to_thread(manager.__enter__)
        source = PrometheusSource(SignalsConfig(url, window_s=2.0, timeout_s=0.5), stale_after_s=3.0)
        actuator = ScalePatch(connect(api.url), TARGET)
        # The load of 5 replicas: 3.5 requests/s at 0.7 · 1.0; it ends while metrics are unavailable.
        loop = Controller(Policy(POLICY), source, actuator, log_path=tmp_path / "d.jsonl")
        busy = asyncio.create_task(_keep_busy(replica, 3.3))
        stop = asyncio.Event()
        try:
            while ((await source.read(5)).request_rate or 0.0) < 3.0:
                await asyncio.sleep(0.1)
            task = asyncio.create_task(loop.run(stop))
            await until(lambda: loop.metrics.last is not None and last(loop).decided_by != "stale")
            os.kill(process.pid, signal.SIGSTOP)
            busy.cancel()
            await until(lambda: last(loop).decided_by == "stale")
            before = api.replicas[KEY]
            await asyncio.sleep(1.0)
            assert api.replicas[KEY] == before >= 5
            assert any("stale" in alarm for alarm in last(loop).alarms)
            os.kill(process.pid, signal.SIGCONT)
            await until(lambda: last(loop).decided_by != "stale")
        finally:
            os.kill(process.pid, signal.SIGCONT)
            stop.set()
            await asyncio.to_thread(manager.__exit__, None, None, None)
        await task
        await source.close()
        assert all(
            d.target >= d.current for d in read_log(tmp_path / "d.jsonl", 10_000) if d.decided_by == "stale"
        )


async def _keep_busy(replica: FakeReplica, rate: float) -> None:
    while True:
        replica.sums["ttft"] = [replica.sums["ttft"][0] + 0.1, replica.sums["ttft"][1] + rate / 10]
        replica.sums["queue"][1] += rate / 10
        await asyncio.sleep(0.1)


# ---- API server down ----


@pytest.mark.anyio
async def test_api_server_outage_holds_then_acts(tmp_path: Path) -> None:
    async with FakeKubernetes() as api, FakeReplica(name="a") as replica:
        api.replicas[KEY] = 2
        source = ScrapeSource(lambda: {"a": replica.url}, SignalsConfig(window_s=1.0))
        loop = Controller(
            Policy(POLICY), source, ScalePatch(connect(api.url), TARGET), log_path=tmp_path / "d.jsonl"
        )
        stop = asyncio.Event()
        task = asyncio.create_task(loop.run(stop))
        await until(lambda: loop.metrics.last is not None)
        api.down = True
        busy = asyncio.create_task(_keep_busy(replica, 10.0))
        await until(lambda: any("actuator" in alarm for alarm in last(loop).alarms))
        await asyncio.sleep(0.5)
        assert api.patches == []
        api.down = False
        await until(lambda: bool(api.patches))
        assert min(count for _, count in api.patches) > 2
        busy.cancel()
        stop.set()
        await task
        await source.close()


# ---- clock jumps ----


@pytest.mark.anyio
async def test_clock_jump_never_scales_down(tmp_path: Path) -> None:
    jump = [0.0]
    clock = asyncio.get_running_loop().time
    async with FakeKubernetes() as api, FakeReplica(name="a") as replica:
        api.replicas[KEY] = 5

        def wall() -> float:
            return 1e9 + clock() + jump[0]

        source = ScrapeSource(lambda: {"a": replica.url}, SignalsConfig(window_s=1.0), wall=wall)
        loop = Controller(
            Policy(POLICY),
            source,
            ScalePatch(connect(api.url), TARGET),
            log_path=tmp_path / "d.jsonl",
            wall=wall,
        )
        stop, busy = asyncio.Event(), asyncio.create_task(_keep_busy(replica, 3.3))
        for _ in range(12):  # first a whole window of the true load
            await source.read(5)
            await asyncio.sleep(0.1)
        task = asyncio.create_task(loop.run(stop))
        await until(lambda: loop.metrics.last is not None)
        for seconds in (3600.0, -7200.0):
            jump[0] += seconds
            await until(lambda: any("clock" in alarm for alarm in last(loop).alarms))
            await until(lambda: not any("clock" in alarm for alarm in last(loop).alarms))
            await asyncio.sleep(0.3)
        busy.cancel()
        stop.set()
        await task
        await source.close()
        assert api.replicas[KEY] >= 5
        decisions = read_log(tmp_path / "d.jsonl", 10_000)
        assert sum(any("clock" in alarm for alarm in d.alarms) for d in decisions) == 2
        assert all(d.target >= d.current for d in decisions)


# ---- local mode: killed replica, replaced and killed gateway ----


def local(tmp_path: Path, *, replicas: int = 2, tokens: int = 5, interval_s: float = 0.02) -> LocalFleet:
    command = (sys.executable, str(double.__file__), "--port", "{port}", "--tokens", str(tokens))
    fleet = FleetConfig(
        policy=PolicyConfig(
            capacity=1000.0, interval_s=0.2, min_replicas=replicas, max_replicas=replicas, cold_start_s=1.0
        ),
        signals=SignalsConfig(window_s=2.0),
        state=tmp_path / "state",
        metrics="127.0.0.1:0",
    )
    config = LocalConfig((*command, "--interval", str(interval_s)), tmp_path / "logs")
    return LocalFleet(UpConfig(fleet, {"m": config}, port=0))


async def _ask(session: aiohttp.ClientSession, number: int, results: list[str], *, stream: bool) -> None:
    """Send one request and append its outcome to `results`: whole, error, cut or refused."""
    body = {"messages": [{"role": "user", "content": f"{number}"}], "stream": stream}
    try:
        async with session.post("/v1/chat/completions", json=body) as answer:
            text = await answer.text()
            if answer.status != 200 or '"error"' in text:
                results.append("error")
            else:
                results.append("whole" if not stream or "[DONE]" in text else "cut")
    except aiohttp.ClientConnectorError:
        results.append("refused")
    except aiohttp.ClientError:
        results.append("broken off")  # the client sees a closed connection


async def _load(url: str, seconds: float, results: list[str], *, stream: bool) -> None:
    """Send 50 requests per second, each on its own connection."""
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as session, asyncio.TaskGroup() as group:
        for number in range(round(seconds * 50)):
            group.create_task(_ask(session, number, results, stream=stream))
            await asyncio.sleep(0.02)


@pytest.mark.anyio
async def test_killed_replica_loses_no_request_without_an_error_and_is_replaced(tmp_path: Path) -> None:
    async with local(tmp_path, tokens=15) as fleet:
        stop = asyncio.Event()
        scaling = asyncio.create_task(fleet.run(stop))
        assert await fleet.models[0].replicas.wait_ready(2, 30)
        await _healthy(fleet, 2)
        whole, streams = list[str](), list[str]()
        load = [
            asyncio.create_task(_load(fleet.url, 3.0, whole, stream=False)),
            asyncio.create_task(_load(fleet.url, 3.0, streams, stream=True)),
        ]
        async with aiohttp.ClientSession(fleet.url) as session:
            body = {"messages": [], "stream": True}
            answer = await session.post("/v1/chat/completions", json=body)
            await answer.content.readline()
            name = answer.headers["x-farthing-replica"]
            victim = next(r for r in fleet.models[0].replicas.replicas if r.name == name)
            os.kill(victim.process.pid, signal.SIGKILL)
            events = [line async for line in answer.content if line.startswith(b"data: ")]
        assert b"replica lost" in events[-1]  # in flight there: its client receives an error
        await asyncio.gather(*load)
        assert set(whole) == {"whole"}  # nothing had been sent to the client, so they were retried elsewhere
        assert set(streams) <= {"whole", "error"}
        assert streams.count("error") < 50
        await until(lambda: len(fleet.models[0].replicas.ready()) == 2)
        assert victim.name not in fleet.models[0].replicas.ready()
        decisions = read_log(tmp_path / "state" / "decisions.jsonl", 10_000)
        assert all(d.target >= 2 for d in decisions)
        stop.set()
        await scaling


async def _healthy(fleet: LocalFleet, count: int) -> None:
    async with aiohttp.ClientSession(fleet.url) as session:
        while True:
            with suppress(aiohttp.ClientError):
                async with session.get("/health") as answer:
                    state: dict[str, Any] = await answer.json()
                    if state["ready"] == count:
                        return
            await asyncio.sleep(0.02)


@pytest.mark.anyio
async def test_gateway_replaced_under_load_loses_no_request(tmp_path: Path) -> None:
    async with local(tmp_path, tokens=20) as fleet:
        assert await fleet.models[0].replicas.wait_ready(2, 30)
        await _healthy(fleet, 2)
        results = list[str]()
        load = asyncio.create_task(_load(fleet.url, 3.0, results, stream=True))
        await asyncio.sleep(0.8)
        assert fleet.gateway is not None
        await fleet.gateway.exchange()
        await load
        assert results == ["whole"] * 150


@pytest.mark.anyio
async def test_killed_gateway_refuses_no_requests_and_recovers(tmp_path: Path) -> None:
    async with local(tmp_path, tokens=5) as fleet:
        assert await fleet.models[0].replicas.wait_ready(2, 30)
        await _healthy(fleet, 2)
        assert fleet.gateway is not None and fleet.gateway.process is not None
        results = list[str]()
        load = asyncio.create_task(_load(fleet.url, 3.0, results, stream=True))
        await asyncio.sleep(0.8)
        os.kill(fleet.gateway.process.pid, signal.SIGKILL)
        await load
        assert fleet.gateway.restarts == 1
        assert set(results) <= {"whole", "broken off"}  # never refused, never truncated silently
        assert results.count("broken off") < 20
        assert results.count("whole") > 120
