"""Replicas that accept requests but send nothing leave the rotation, and their requests are retried."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest

from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.replicas import Active, Silence, make_replica
from farthing_fleet.gateway.server import Gateway
from tests.fleet.doubles import replica as double
from tests.fleet.doubles.services import free_port
from tests.fleet.test_gateway import CHAT, body, fleet


@pytest.mark.anyio
async def test_hung_replica_leaves_the_rotation_and_its_requests_are_retried() -> None:
    """A stopped process: the kernel accepts connections, but nothing answers."""

    async with processes(2, "--interval", "0.3") as started:
        gateway = Gateway(GatewayConfig(wait_s=5.0))
        port = await gateway.start()
        gateway.set_replicas({name: url for name, (_, url) in started.items()})
        while len(gateway.balancer.candidates()) < 2:
            await asyncio.sleep(0.02)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:
            asked = [asyncio.create_task(session.post(CHAT, json=body(f"{i}"))) for i in range(8)]
            while sum(r.inflight for r in gateway.balancer.replicas.values()) < 8:
                await asyncio.sleep(0.01)
            process, _ = started["p0"]
            process.send_signal(signal.SIGSTOP)
            began = asyncio.get_running_loop().time()
            while len(gateway.balancer.candidates()) > 1:
                await asyncio.sleep(0.02)
            took = asyncio.get_running_loop().time() - began
            print(f"out of rotation after {took:.2f} s")
            assert took < 8  # 3 s on an idle machine
            answers = [await task for task in asked]
            assert [answer.status for answer in answers] == [200] * 8
            assert {a.headers["x-farthing-replica"] for a in answers} == {"p1"}
            process.send_signal(signal.SIGCONT)
            while len(gateway.balancer.candidates()) < 2:
                await asyncio.sleep(0.02)
        await gateway.stop(0)


@asynccontextmanager
async def processes(
    count: int, *arguments: str
) -> AsyncIterator[dict[str, tuple[asyncio.subprocess.Process, str]]]:
    """Replicas as processes: {name: (process, url)}."""
    started = {}
    for index in range(count):
        port = free_port()
        command = (sys.executable, double.__file__, "--port", str(port), *arguments)
        process = await asyncio.create_subprocess_exec(*command)
        started[f"p{index}"] = (process, f"http://127.0.0.1:{port}")
    try:
        yield started
    finally:
        for process, _ in started.values():
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@pytest.mark.anyio
async def test_replica_whose_health_answers_but_whose_streams_are_silent_is_hung() -> None:
    config = GatewayConfig(health_interval_s=0.05, hung_margin_s=0.3)
    async with fleet(2, config) as (gateway, replicas, session, _url):
        for number in range(120):  # enough to know the P99
            async with session.post(CHAT, json=body(f"{number}", stream=True)) as answer:
                await answer.read()
        limit = gateway.proxy.silence("m").limit_s
        assert limit is not None and limit < 5
        stuck = replicas[0]
        stuck.stuck = True
        asked = [asyncio.create_task(session.post(CHAT, json=body(f"x{i}", stream=True))) for i in range(6)]
        answers = [await task for task in asked]
        assert {a.headers["x-farthing-replica"] for a in answers} == {"r1"}
        assert gateway.balancer.replicas["r0"].breaker.open
        assert gateway.balancer.replicas["r0"].healthy  # by its health check


def test_silence_of_non_streamed_answers_is_ignored() -> None:
    silence = Silence(3.0)
    replica = make_replica("r", "http://127.0.0.1:1", GatewayConfig())
    replica.active.add(Active(streamed=False, began=0.0))
    assert silence.limit_s is None and not silence.hung(replica, 1e6)
    for _ in range(100):
        silence.observe(0.5)
    assert silence.limit_s == 3.5
    assert not silence.hung(replica, 1e6)
    replica.active.add(Active(streamed=True, began=1.0))
    assert not silence.hung(replica, 4.5) and silence.hung(replica, 4.6)
    replica.heard = 2.0  # it answers other requests
    assert not silence.hung(replica, 4.6) and silence.hung(replica, 5.6)
    for number in range(5000):
        silence.observe(number)
    assert silence.limit_s is not None and silence.limit_s > 4980
