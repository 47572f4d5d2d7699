"""The controller's HTTP server, and what it costs to import a controller."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import aiohttp
import pytest

from farthing_fleet.metrics import FleetMetrics, MetricsServer
from farthing_fleet.policy import Held
from tests.fleet.actuators.decided import decision


@pytest.mark.anyio
async def test_pages_of_a_controller() -> None:
    now = [0.0]
    metrics = FleetMetrics(monotonic=lambda: now[0])
    server = MetricsServer(metrics, max_age_s=10.0)
    port = await server.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:

        async def status(path: str, method: str = "GET") -> int:
            async with session.request(method, path) as answer:
                await answer.read()
                return answer.status

        assert [await status(path) for path in ("/health", "/decision", "/nothing")] == [200, 404, 404]
        assert await status("/wake", "POST") == 404  # this controller wakes no fleet
        metrics.show(decision(3))
        async with session.get("/decision") as answer:
            assert (await answer.json())["target"] == 3
        async with session.get("/metrics?all") as answer:
            assert answer.headers["content-type"].startswith("text/plain")
            assert "farthing:fleet_desired_replicas 3.0" in await answer.text()
        now[0] = 11.0
        async with session.get("/health") as answer:
            assert (answer.status, await answer.json()) == (503, {"status": "no decision for 11 s"})
    second = MetricsServer(metrics)
    with pytest.raises(OSError, match=f"metrics: cannot listen on 127.0.0.1:{port}: Address already in use"):
        await second.start("127.0.0.1", port)
    await server.close()


@pytest.mark.anyio
async def test_odd_reports_of_a_gateway_are_answered(capfd: pytest.CaptureFixture[str]) -> None:
    held = Held()
    server = MetricsServer(FleetMetrics(), held=held)
    port = await server.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        odd = ['{"gateway": "g", "waiting": ' + number + "}" for number in ("1e999", "NaN", "-1")]
        for text in ("", "[" * 60_000, *odd):
            async with session.post("/wake", data=text) as answer:
                assert answer.status == 400
        async with session.post("/wake", json={"gateway": "g", "waiting": 1e300}) as answer:
            assert answer.status == 200
    await server.close()
    assert held.total() == 1_000_000  # not a number that no float holds
    assert "Traceback" not in capfd.readouterr().err


def test_controller_loads_no_http_framework() -> None:
    """They were a quarter of its memory."""
    heavy = "{'aiohttp', 'fastapi', 'uvicorn', 'starlette', 'pydantic', 'torch', 'pandas', 'kubernetes'}"
    code = (
        f"import sys, farthing_fleet.run, farthing_fleet.estimates; print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.anyio
async def test_odd_length_of_a_body_is_answered_at_once_and_ends_the_connection() -> None:
    server = MetricsServer(FleetMetrics())
    port = await server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: one\r\n\r\n")
    async with asyncio.timeout(5):  # a server that waited for a body would wait for 10 s
        answer = await reader.read()  # to the end of the connection
    assert answer.startswith(b"HTTP/1.1 200 ")
    writer.close()
    await server.close()
