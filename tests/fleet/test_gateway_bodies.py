"""Request bodies of a gateway: unread without a key, bounded in total, and never waited for without end."""

from __future__ import annotations

import asyncio
import gc
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from farthing_fleet.gateway.config import GatewayConfig
from tests.fleet.raw_client import HOST, KEY, answer_of, connect, keyed, post
from tests.fleet.test_gateway import CHAT, body, fleet


@pytest.mark.anyio
async def test_bodies_without_a_key_are_not_read() -> None:
    async def send(port: int, part: bytes) -> bytes:
        reader, writer = await connect(port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"content-length: %d\r\n\r\n" % (30 << 20)
        )
        said = asyncio.create_task(reader.readline())
        with suppress(ConnectionError):
            for _ in range(30):
                writer.write(part)
                await writer.drain()
        writer.close()
        return await said

    async with keyed() as (gateway, replica, port):
        gc.collect()
        before = _resident()
        part = b"x" * (1 << 20)
        said = await asyncio.gather(*(send(port, part) for _ in range(12)))
        assert all(s.startswith(b"HTTP/1.1 401 ") for s in said)
        assert gateway.bodies.total == 0 and replica.requests == []
        assert _resident() - before < 60 << 20  # 360 MB were offered


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.anyio
async def test_total_size_of_bodies_is_bounded() -> None:
    config = GatewayConfig(health_interval_s=0.05, max_body=1 << 20, max_body_total=3 << 20)
    async with fleet(1, config, tokens=40, interval_s=0.02) as (gateway, _, session, _url):
        big = body("x" * ((1 << 20) - 1000))
        held = [asyncio.create_task(session.post(CHAT, json=big)) for _ in range(3)]
        while gateway.bodies.total < 3_000_000:
            await asyncio.sleep(0.01)
        async with session.post(CHAT, json=big) as answer:
            assert answer.status == 503
            assert "request bodies" in (await answer.json())["error"]["message"]
        assert [(await task).status for task in held] == [200] * 3
        assert gateway.bodies.total == 0


@pytest.mark.anyio
async def test_stalled_body_times_out() -> None:
    config = GatewayConfig(health_interval_s=0.05, body_timeout_s=0.3)
    async with fleet(1, config) as (gateway, (replica,), _, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        writer.write(post(b"{}" * 50)[:-10])
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        assert replica.requests == [] and gateway.bodies.total == 0


@pytest.mark.anyio
async def test_expect_continue_is_answered_when_the_body_is_read() -> None:
    async with keyed() as (_, _, port):
        payload = json.dumps(body()).encode()
        head, _, _ = post(payload, KEY, b"expect: 100-continue\r\n").partition(b"\r\n\r\n")
        reader, writer = await connect(port)
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(payload)
        assert (await answer_of(reader))[0] == 200
        writer.close()
        reader, writer = await connect(port)
        writer.write(head.replace(KEY, b"") + b"\r\n\r\n")
        assert (await answer_of(reader))[0] == 401
        writer.close()


@pytest.mark.anyio
async def test_body_that_arrives_with_its_head_is_none_of_it() -> None:
    """An event loop may read several times from a socket before it starts the handler."""
    async with fleet(1) as (gateway, _, _session, url):
        for empty in (b"", b"\r\n"):
            reader, writer = await connect(int(url.rsplit(":", 1)[1]))
            while not gateway.door.guards:
                await asyncio.sleep(0.01)
            (guard,) = gateway.door.guards
            request = empty + post(json.dumps(body("x" * 300_000)).encode())
            for start in range(0, len(request), 100_000):
                guard.data_received(request[start : start + 100_000])
            assert (await answer_of(reader))[0] == 200
            writer.close()
            while gateway.door.guards:
                await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_empty_lines_are_no_head() -> None:
    async with fleet(1) as (gateway, _, _session, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        while not gateway.door.guards:
            await asyncio.sleep(0.01)
        (guard,) = gateway.door.guards
        for _ in range(3):
            guard.data_received(b"\r\n" * 20_000)
        assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
        writer.close()
