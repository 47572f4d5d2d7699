"""Scale from zero: held requests start replicas, and none is lost."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from farthing_fleet.actuators.base import ReadOnly
from farthing_fleet.actuators.local import LocalConfig
from farthing_fleet.config import FleetConfig, PolicyConfig, SignalsConfig
from farthing_fleet.controller import Controller
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.server import Gateway
from farthing_fleet.metrics import MetricsServer
from farthing_fleet.policy import Held, Policy, wake
from farthing_fleet.types import Decision, Snapshot
from farthing_fleet.up import LocalFleet, UpConfig
from tests.fleet.doubles import replica as double
from tests.fleet.doubles.replica import FakeReplica
from tests.fleet.test_gateway import CHAT, body

POLICY = PolicyConfig(capacity=1000.0, interval_s=0.5, min_replicas=0, max_replicas=3, cold_start_s=2.0)


def asleep(tmp_path: Path, *arguments: str) -> LocalFleet:
    """A local fleet that starts without replicas."""
    command = (sys.executable, str(double.__file__), "--port", "{port}", *arguments)
    fleet = FleetConfig(
        policy=POLICY, signals=SignalsConfig(window_s=2.0), state=tmp_path / "state", metrics="127.0.0.1:0"
    )
    local = LocalConfig(command, tmp_path / "logs")
    return LocalFleet(UpConfig(fleet, {"m": local}, port=0, start_with=0))


@pytest.mark.anyio
async def test_thousand_requests_wake_a_local_fleet_and_none_is_lost(tmp_path: Path) -> None:
    async def ask(session: aiohttp.ClientSession, number: int) -> int:
        async with session.post(CHAT, json=body(f"{number}")) as answer:
            await answer.read()
            return answer.status

    async with asleep(tmp_path, "--ready-after", "1.0") as fleet:
        assert fleet.models[0].replicas.ready() == {}
        stop = asyncio.Event()
        scaling = asyncio.create_task(fleet.run(stop))
        connector = aiohttp.TCPConnector(limit=0)
        began = time.monotonic()
        async with aiohttp.ClientSession(fleet.url, connector=connector) as session:
            answers = await asyncio.gather(*(ask(session, number) for number in range(1000)))
        took = time.monotonic() - began
        assert answers == [200] * 1000
        cold_start = fleet.models[0].replicas.cold_starts.p90
        assert cold_start is not None
        print(f"cold start {cold_start:.2f} s, all answered after {took:.2f} s")
        assert took < cold_start + 20  # generous: a thousand answers take seconds on a busy machine
        stop.set()
        await scaling


@pytest.mark.anyio
async def test_single_request_is_answered_about_when_the_replica_is_ready(tmp_path: Path) -> None:
    async with asleep(tmp_path) as fleet:
        stop = asyncio.Event()
        scaling = asyncio.create_task(fleet.run(stop))
        async with aiohttp.ClientSession(fleet.url) as session:
            while True:  # the gateway's start is not part of the cold start
                async with session.get("/live") as answer:
                    if answer.status == 200:
                        break
            began = time.monotonic()
            async with session.post(CHAT, json=body()) as answer:
                assert answer.status == 200
        took = time.monotonic() - began
        cold_start = fleet.models[0].replicas.cold_starts.p90
        assert cold_start is not None
        print(f"cold start {cold_start:.2f} s, answered after {took:.2f} s")
        assert took < cold_start + 5
        stop.set()
        await scaling


class Silent:
    """Signals of a deployment without replicas: all missing."""

    async def read(self, current: int) -> Snapshot:
        return Snapshot(time=time.time(), current=current, stale=True)

    async def close(self) -> None: ...


@pytest.mark.anyio
async def test_held_request_is_reported_to_keda(tmp_path: Path) -> None:
    """By the gauge in Prometheus."""
    loop = Controller(
        Policy(POLICY),
        Silent(),
        ReadOnly(),
        log_path=tmp_path / "decisions.jsonl",
    )
    stop = asyncio.Event()
    scaling = asyncio.create_task(loop.run(stop))
    server = MetricsServer(loop.metrics, held=loop.held)
    port = await server.start("127.0.0.1", 0)
    config = GatewayConfig(health_interval_s=0.05, wait_s=30)
    gateway = Gateway(config, wake=[f"http://127.0.0.1:{port}/wake"])
    address = await gateway.start()
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{address}") as session,
        FakeReplica(name="woken") as replica,
    ):
        began = time.monotonic()
        waiting = asyncio.ensure_future(session.post(CHAT, json=body()))
        async with asyncio.timeout(10):
            while loop.metrics.last is None or loop.metrics.last.target != 1:
                await asyncio.sleep(0.02)
        shown = await (await session.get(f"http://127.0.0.1:{port}/metrics")).text()
        assert "farthing:fleet_desired_replicas 1.0" in shown
        print(f"active after {time.monotonic() - began:.2f} s")
        assert not waiting.done()
        gateway.set_replicas({"woken": replica.url})  # as the cluster would
        assert (await waiting).status == 200
    stop.set()
    await scaling
    await gateway.stop(0)
    await server.close()


class Slow:
    """Signals whose first reading takes until `answered`."""

    def __init__(self) -> None:
        self.asked, self.answered = asyncio.Event(), asyncio.Event()

    async def read(self, current: int) -> Snapshot:
        self.asked.set()
        await self.answered.wait()
        return Snapshot(time=time.time(), current=current, stale=True)

    async def close(self) -> None: ...


class Zero:
    """An actuator of a fleet without replicas."""

    def __init__(self) -> None:
        self.started = asyncio.Event()

    async def start(self) -> None: ...

    async def current(self) -> int:
        return 0

    async def apply(self, decision: Decision) -> None:
        if decision.target:
            self.started.set()

    async def close(self) -> None: ...


@pytest.mark.anyio
async def test_report_during_a_step_wakes_the_fleet_right_after_it(tmp_path: Path) -> None:
    source, actuator = Slow(), Zero()
    policy = Policy(PolicyConfig(capacity=1.0, min_replicas=0, interval_s=3600.0))
    loop = Controller(policy, source, actuator, log_path=tmp_path / "decisions.jsonl")
    stop = asyncio.Event()
    scaling = asyncio.create_task(loop.run(stop))
    await source.asked.wait()
    loop.held.report("gateway", 1)
    source.answered.set()
    async with asyncio.timeout(60):
        await actuator.started.wait()
    stop.set()
    await scaling


def test_wake_counts_replicas_by_the_backlog_and_only_at_zero() -> None:
    config = PolicyConfig(capacity=1.0, min_replicas=0, max_replicas=8, drain_s=60.0, cold_start_s=10.0)
    for backlog, expected in ((1, 1), (60, 1), (61, 2), (300, 5), (10_000, 8)):
        decision = wake(0.0, 0, Snapshot(0.0, 0, backlog=backlog, stale=True), config)
        assert decision is not None and decision.target == expected
        assert ("1 request waits" if backlog == 1 else f"{backlog:.4g} requests wait") in decision.reason
    assert wake(0.0, 1, Snapshot(0.0, 1, backlog=5.0), config) is None
    assert wake(0.0, 0, Snapshot(0.0, 0, backlog=0.0), config) is None
    assert wake(0.0, 0, None, config) is None


def test_reports_of_silent_gateways_expire() -> None:
    now = [0.0]
    held = Held(clock=lambda: now[0])
    held.report("a", 3)
    now[0] = 4.0
    held.report("b", 2)
    assert held.total() == 5
    now[0] = 6.0
    assert held.total() == 2
    with pytest.raises(ValueError, match="waiting: got -1"):
        held.report("a", -1)


@pytest.mark.anyio
async def test_invalid_wake_urls_and_reports_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wake: got 'nowhere'"):
        Gateway(wake=["nowhere"])
    loop = Controller(Policy(POLICY), Silent(), ReadOnly(), log_path=tmp_path / "d.jsonl")
    server = MetricsServer(loop.metrics, held=loop.held)
    port = await server.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        for report in ("[]", "{}", '{"gateway": "a", "waiting": -1}', '{"gateway": "a", "waiting": "x"}'):
            async with session.post("/wake", data=report) as answer:
                assert answer.status == 400
    assert loop.held.total() == 0
    await server.close()
