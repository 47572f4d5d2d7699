"""The gateway's own errors have the shape of the API that was called."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from farthing.server.errors import CODE_HEADER
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.server import Gateway
from tests.fleet.doubles.replica import FakeReplica
from tests.fleet.test_gateway import CHAT, body, fleet

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"


@pytest.mark.anyio
async def test_shape_follows_the_path() -> None:
    gateway = Gateway(GatewayConfig(wait_s=0.05))
    port = await gateway.start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        async with session.post(MESSAGES, json=body()) as answer:
            document = await answer.json()
            assert (answer.status, document["type"]) == (503, "error")
            assert document["error"]["type"] == "overloaded_error"
        for path in (CHAT, RESPONSES):
            async with session.post(path, json=body()) as answer:
                error = (await answer.json())["error"]
                assert (answer.status, error["type"]) == (503, "service_unavailable_error")
                assert set(error) == {"message", "type", "param", "code"}
    await gateway.stop(0)


@pytest.mark.anyio
async def test_anthropics_key_header_is_accepted() -> None:
    class OneKey:
        def check(self, header_value: str | None) -> str | None:
            return "alice" if header_value == "Bearer secret" else None

    gateway = Gateway(GatewayConfig(wait_s=0.05), keys=OneKey())
    port = await gateway.start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        for key, kind in (("secret", "overloaded_error"), ("wrong", "authentication_error")):
            async with session.post(MESSAGES, json=body(), headers={"X-Api-Key": key}) as answer:
                assert (await answer.json())["error"]["type"] == kind
    await gateway.stop(0)


@pytest.mark.anyio
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_interrupted_stream_ends_with_the_apis_error_event(path: str) -> None:
    async with fleet(1, tokens=5, interval_s=0.01) as (_, (replica,), session, _url):
        replica.fail_after = 2
        async with session.post(path, json=body(stream=True)) as answer:
            *_, last = (await answer.text()).strip().split("\n\n")
        event, _, data = last.rpartition("data: ")
        document = json.loads(data)
        assert event == ("" if path == CHAT else "event: error\n")
        assert "replica lost" in document["error"]["message"]
        assert document.get("type") == (None if path == CHAT else "error")
        assert document["error"]["type"] == ("api_error" if path == MESSAGES else "server_error")


@pytest.mark.anyio
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_failed_engine_is_recognized_in_every_shape(path: str) -> None:
    async with FakeReplica(name="r") as replica:
        replica.status, replica.extra = 503, {CODE_HEADER: "engine_failed"}
        gateway = Gateway(GatewayConfig(health_interval_s=0.05, wait_s=0.2))
        port = await gateway.start()
        gateway.set_replicas({"r": replica.url})
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
            session.post(path, json=body()) as answer,
        ):
            assert "its engine failed" in (await answer.json())["error"]["message"]
        await gateway.stop(0)


@pytest.mark.anyio
async def test_malformed_requests_write_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    gateway = Gateway(GatewayConfig(wait_s=0.05))
    port = await gateway.start()
    for data in (b"\x16\x03\x01\x00\xa5\x01\x00", b"GET / HTTP/3.7.1\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data + b"\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
    await gateway.stop(0)
    assert "request failed" not in caplog.text and "Traceback" not in caplog.text
