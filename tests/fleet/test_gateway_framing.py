"""Requests of which only a part arrived, after others on the same connection, and malformed ones."""

from __future__ import annotations

import asyncio
import json

import pytest

from farthing_fleet.gateway.config import GatewayConfig
from tests.fleet.raw_client import HOST, answer_of, connect, post
from tests.fleet.test_gateway import body, fleet


@pytest.mark.anyio
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
async def test_partial_head_after_a_running_request_is_closed(chunked: bool, at_once: bool) -> None:
    payload = json.dumps(body(stream=True)).encode()
    request = post(payload)
    if chunked:
        head, _, _ = request.partition(b"content-length")
        request = head + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(payload), payload)
    partial = b"GET /live HTTP/1.1\r\na"
    config = GatewayConfig(health_interval_s=0.05, head_timeout_s=0.5, keepalive_s=1000)
    async with fleet(1, config, tokens=10, interval_s=0.02) as (_, _, _, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        writer.write(request + partial if at_once else request)
        await reader.readuntil(b"t0 ")
        if not at_once:
            writer.write(partial)
        assert b"[DONE]" in await reader.readuntil(b"0\r\n\r\n")
        async with asyncio.timeout(30):
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        writer.close()


@pytest.mark.anyio
async def test_connection_stays_open_after_whole_requests() -> None:
    config = GatewayConfig(health_interval_s=0.05, head_timeout_s=0.2, keepalive_s=1000)
    get = b"GET /live HTTP/1.1\r\n" + HOST + b"\r\n"
    chunked = get.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n")
    async with fleet(1, config) as (_, _, _, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        for requests in ((get,), (post(json.dumps(body()).encode()),), (chunked,), (get, get)):
            writer.write(b"".join(requests))
            for _ in requests:
                assert (await answer_of(reader))[0] == 200
            await asyncio.sleep(0.4)
        assert not reader.at_eof()
        writer.close()


@pytest.mark.anyio
async def test_errors_of_the_parser_do_not_end_in_a_colon() -> None:
    chunked = b"transfer-encoding: chunked\r\n\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\n" + HOST + chunked
    async with fleet(1) as (_, (replica,), _session, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        writer.write(head + b"0x1\r\nx\r\n0\r\n\r\n")
        status, text = await answer_of(reader)
        message = json.loads(text)["error"]["message"]
        assert (status, message) == (400, "request is malformed: Invalid character in chunk size")
        writer.close()
        assert replica.requests == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "bad",
    [b"zz\r\nx\r\n0\r\n\r\n", b"2\r\nabc\r\n0\r\n\r\n", b"0\r\nX: " + b"y" * 20_000 + b"\r\n\r\n"],
)
@pytest.mark.parametrize("pause_s", [0.0, 0.1])
async def test_malformed_chunk_in_a_later_packet_is_400_at_once(
    bad: bytes, pause_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Not after `body_timeout_s`: the parser has given up, so nothing more can arrive."""
    chunked = b"transfer-encoding: chunked\r\n\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\n" + HOST + chunked
    config = GatewayConfig(health_interval_s=0.05, body_timeout_s=1000)
    async with fleet(1, config) as (_, (replica,), _session, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        writer.write(head + b"1\r\n{\r\n")
        await asyncio.sleep(pause_s)
        writer.write(bad)
        async with asyncio.timeout(30):
            status, text = await answer_of(reader)
            assert status == 400 or (status == 431 and len(bad) > 10_000)  # 431: received with the head
            message = json.loads(text)["error"]["message"]
            assert (status == 431 or "malformed: " in message) and "yyy" not in message
            assert await reader.read() == b""
        writer.close()
        assert replica.requests == []
    assert not [record for record in caplog.records if record.exc_info]
