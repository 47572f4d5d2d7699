"""Hostile and broken clients of a gateway, over real sockets."""

from __future__ import annotations

import asyncio
import json
import resource
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest

from farthing_fleet.gateway.config import GatewayConfig
from tests.fleet.raw_client import HOST, KEY, answer_of, connect, keyed, post
from tests.fleet.test_gateway import CHAT, body, fleet
from tests.fleet.test_gateway_replicas import before, raw_replica

# ---- heads ----


@pytest.mark.anyio
async def test_trailers_are_not_headers() -> None:
    payload = json.dumps(body()).encode()
    chunked = b"transfer-encoding: chunked\r\n"
    line = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\n" + HOST
    data = b"\r\n%x\r\n%s\r\n0\r\n" % (len(payload), payload)

    async with keyed() as (_, replica, port):
        reader, writer = await connect(port)
        writer.write(line + chunked + data + KEY + b"\r\n")
        assert (await answer_of(reader))[0] == 401
        writer.close()
        reader, writer = await connect(port)
        writer.write(line + KEY + chunked + data + b"x-smuggled: 1\r\n\r\n")
        assert (await answer_of(reader))[0] == 200
        writer.close()
        assert len(replica.headers) == 1
        assert "x-smuggled" not in {name.lower() for name in replica.headers[0]}


@pytest.mark.anyio
@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip\r\ntransfer-encoding: chunked"])
async def test_codings_other_than_chunked_are_not_implemented(coding: bytes) -> None:
    async with fleet(1) as (_, (replica,), _session, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        head = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"transfer-encoding: " + coding
        writer.write(head + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        assert (await reader.read()).startswith((b"HTTP/1.1 501 ", b"HTTP/1.1 400 "))
        writer.close()
        assert replica.requests == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "fields",
    [
        b"content-length: 5\r\ncontent-length: 6\r\n",
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"content-length: -1\r\n",
        b"content-length: +5\r\n",
        b"bad header: 1\r\ncontent-length: 5\r\n",
    ],
)
async def test_ambiguous_framing_is_rejected(fields: bytes) -> None:
    async with fleet(1) as (_, (replica,), _session, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + fields + b"\r\nhello\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        assert replica.requests == []


async def _slow_heads(port: int, count: int) -> tuple[float, float]:
    """Open heads that never end. Returns seconds until all were closed, and the longest good request."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def trickle() -> None:
        reader, writer = await connect(port)
        with suppress(ConnectionError):
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST)
            while not reader.at_eof():
                writer.write(b"x-slow: 1\r\n")
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await reader.read(1 << 16)
        writer.close()

    heads = [asyncio.create_task(trickle()) for _ in range(count)]
    worst = 0.0
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        while not all(head.done() for head in heads):
            asked = loop.time()
            async with session.post(CHAT, json=body()) as answer:
                assert answer.status == 200
            worst = max(worst, loop.time() - asked)
            await asyncio.sleep(0.1)
    return loop.time() - began, worst


@pytest.mark.anyio
async def test_slow_heads_are_closed() -> None:
    async with fleet(1, GatewayConfig(health_interval_s=0.05, head_timeout_s=1.0)) as (gateway, *_, url):
        took, worst = await _slow_heads(int(url.rsplit(":", 1)[1]), 100)
        assert took < 5 and worst < 5
        assert len(gateway.door.guards) <= 1


@pytest.mark.anyio
@pytest.mark.slow
async def test_a_thousand_slow_heads_are_closed_within_ten_seconds() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))

    async with fleet(1, GatewayConfig()) as (_, _, _, url):
        took, _ = await _slow_heads(int(url.rsplit(":", 1)[1]), 1000)
        assert took < 12  # 8 s for a head, and the time to open a thousand connections


@pytest.mark.anyio
@pytest.mark.parametrize("field", [b"x: " + b"y" * 1000 + b"\r\n", b"y" * 1000], ids=["many", "one"])
async def test_huge_heads_are_rejected_early(field: bytes) -> None:
    async with fleet(1) as (_, (replica,), _session, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        sent = 0
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"a: ")
        with suppress(ConnectionError):
            while sent < 154_000_000 and not reader.at_eof():
                writer.write(field)
                sent += len(field)
                await writer.drain()
                if sent % 100_000 == 0:
                    await asyncio.sleep(0)
        with suppress(ConnectionError):
            said = await reader.read(1 << 16)
            assert not said or said.split()[1] in (b"431", b"400")
        writer.close()
        assert sent < 16_000_000  # the capacity of the kernel's buffers
        assert replica.requests == []


@pytest.mark.anyio
async def test_complete_head_above_the_limit_is_rejected() -> None:
    async with fleet(1) as (_, (replica,), _session, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        fields = [b"x-%d: %s\r\n" % (i, b"y" * 9000) for i in range(8)]
        writer.write(post(b"{}", *fields))
        assert (await reader.read()).startswith(b"HTTP/1.1 431 ")
        writer.close()
        assert replica.requests == []


@pytest.mark.anyio
async def test_connections_are_bounded_in_total_and_per_client() -> None:
    async def test(**limits: int) -> None:
        config = GatewayConfig(health_interval_s=0.05, **limits)
        async with fleet(1, config) as (gateway, _, _, url):
            port = int(url.rsplit(":", 1)[1])
            held = [await connect(port) for _ in range(5)]
            reader, writer = await connect(port)
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
            writer.close()
            assert len(gateway.door.guards) == 5
            for _, other in held:
                other.close()
            while gateway.door.guards:
                await asyncio.sleep(0.01)
            reader, writer = await connect(port)
            writer.write(post(json.dumps(body()).encode()))
            assert (await answer_of(reader))[0] == 200
            writer.close()

    await test(max_connections=5)
    await test(max_client_connections=5)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# ---- methods, upgrades, pipelines ----


@pytest.mark.anyio
async def test_http_2_upgrade_is_ignored() -> None:
    async with fleet(1) as (_, (replica,), _session, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        fields = (
            b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\n"
        )
        for text in ("one", "two"):  # like the first requests of the JDK's client
            writer.write(post(json.dumps(body(text)).encode(), fields))
            assert (await answer_of(reader))[0] == 200
        writer.write(b"GET /v1/models HTTP/1.1\r\n" + HOST + fields + b"\r\n")
        assert (await answer_of(reader))[0] == 200
        writer.close()
        sent = {name.lower() for name in replica.headers[0]}
        assert not sent & {"upgrade", "http2-settings"}


@pytest.mark.anyio
async def test_pipelined_request_is_answered_after_the_stream() -> None:
    async with fleet(1, tokens=10, interval_s=0.02) as (_, _, _, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        stream = json.dumps(body("first", stream=True)).encode()
        writer.write(post(stream))
        await reader.readuntil(b"t0 ")
        writer.write(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n" + post(stream))
        first = await reader.readuntil(b"0\r\n\r\n")
        assert first.count(b"HTTP/1.1") == 0 and b"[DONE]" in first
        assert (await answer_of(reader))[0] == 200
        assert b"[DONE]" in await reader.readuntil(b"0\r\n\r\n")
        writer.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "more",
    [
        b"this is no HTTP\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 20_000,
        b"GET /live HTTP/1.1\r\n" + HOST,
    ],
    ids=["garbage", "long field", "many"],
)
async def test_errors_of_pipelined_requests_are_not_written_into_a_running_stream(more: bytes) -> None:
    async with fleet(1, tokens=10, interval_s=0.02) as (_, _, _, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        writer.write(post(json.dumps(body("first", stream=True)).encode()))
        await reader.readuntil(b"t0 ")
        writer.write((more + b"\r\n") * (50 if more.startswith(b"GET /live") else 1))
        stream = await reader.readuntil(b"0\r\n\r\n")
        assert b"HTTP/1.1" not in stream and b"[DONE]" in stream
        assert (await reader.readline()).split()[1] in (b"400", b"431", b"200")
        writer.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "line",
    [b"CONNECT replica:8001 HTTP/1.1", b"TRACE / HTTP/1.1", b"PROPFIND / HTTP/1.1"],
    ids=["connect", "trace", "propfind"],
)
async def test_unsupported_methods_are_rejected(line: bytes) -> None:
    async def reply(request: bytes, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("the replica was asked")

    async with raw_replica(reply) as port, before(port) as (gateway, _):
        address = gateway.address
        reader, writer = await connect(address[1])
        writer.write(line + b"\r\n" + HOST + b"\r\n")
        said = await reader.read()
        assert said.startswith(b"HTTP/1.1 405 ")
        writer.close()
        assert gateway.balancer.replicas["raw"].served == 0


@pytest.mark.anyio
async def test_target_that_is_not_a_path_is_rejected() -> None:
    async with fleet(1) as (_, (replica,), _session, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        writer.write(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        assert replica.requests == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8000", 200),
        ("[::1]:8000", 200),
        ("demo.localhost", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
async def test_keyless_gateway_on_loopback_requires_a_loopback_host_name(host: str, status: int) -> None:
    async with fleet(1) as (_, _, session, _url):
        assert (await session.post(CHAT, json=body(), headers={"Host": host})).status == status
    async with keyed() as (_, _, port):
        reader, writer = await connect(port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: api.example\r\n" + KEY + b"\r\n")
        assert (await answer_of(reader))[0] == 200
        writer.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "head",
    [
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nHost: localhost\r\n",
        b"GET http://evil.example/v1/models HTTP/1.1\r\nhost: localhost\r\n",
        b"GET /v1/models HTTP/1.1\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost, evil.example\r\n",
    ],
    ids=["two hosts", "twice", "foreign", "none", "list"],
)
async def test_ambiguous_hosts_are_rejected(head: bytes) -> None:
    async with keyed() as (_, _, port):
        reader, writer = await connect(port)
        writer.write(head + KEY + b"\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        reader, writer = await connect(port)
        writer.write(b"GET http://LOCALHOST/v1/models HTTP/1.1\r\n" + HOST + KEY + b"\r\n")
        assert (await answer_of(reader))[0] == 200
        writer.close()


# ---- streams with disconnected clients ----


@pytest.mark.anyio
@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
async def test_disconnected_streams_leak_nothing(count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))

    async def stream(port: int, number: int) -> bool:
        """Whether the stream was complete; every second client resets its connection after two events."""
        reader, writer = await connect(port)
        writer.write(post(json.dumps(body(f"{number}", stream=True)).encode()))
        if number % 2:
            await reader.readuntil(b"t1 ")
            writer.transport.abort()
            return False
        text = await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        return b"[DONE]" in text

    async with fleet(2, tokens=30, interval_s=0.03) as (gateway, replicas, _, url):
        port = int(url.rsplit(":", 1)[1])
        files, tasks = _open_files(), len(asyncio.all_tasks())
        whole = await asyncio.gather(*(stream(port, number) for number in range(count)))
        assert sum(whole) == count // 2
        while any(r.running for r in replicas) or gateway.door.guards:
            await asyncio.sleep(0.02)
        assert sum(r.disconnects for r in replicas) == count // 2
        assert gateway.bodies.total == 0
        assert all(not r.active and r.inflight == 0 for r in gateway.balancer.everyone)
        gateway.upstream.close()  # kept connections
        await asyncio.sleep(0.1)
        assert _open_files() <= files + 4  # allowance for health checks
        assert len(asyncio.all_tasks()) <= tasks + 4


@pytest.mark.anyio
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("size", [b"1", b"001;a=b"])
async def test_tiny_chunks_are_rejected(with_head: bool, size: bytes) -> None:
    payload = json.dumps(body()).encode()
    last = b"%x\r\n%s\r\n0\r\n\r\n" % (len(payload), payload)
    head = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\n" + HOST
    head += b"transfer-encoding: chunked\r\n\r\n"
    async with fleet(1) as (gateway, (replica,), _session, url):
        for count, status in ((500, b"200"), (50_000, b"400")):
            reader, writer = await connect(int(url.rsplit(":", 1)[1]))
            writer.write(head)
            while not (with_head or any(guard.phase == "request" for guard in gateway.door.guards)):
                await asyncio.sleep(0.001)
            writer.write((size + b"\r\n \r\n") * count + last)
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 " + status)
            writer.close()
        assert len(replica.requests) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("version", [b"0.9", b"2.0"])
async def test_unsupported_versions_of_http_are_rejected(version: bytes) -> None:
    async with fleet(1) as (_, (replica,), _session, url):
        reader, writer = await connect(int(url.rsplit(":", 1)[1]))
        writer.write(post(json.dumps(body()).encode()).replace(b"HTTP/1.1", b"HTTP/" + version, 1))
        assert (await reader.read()).startswith(b"HTTP/1.1 505 ")
        writer.close()
        assert replica.requests == []


@pytest.mark.anyio
async def test_redirect_does_not_name_the_replica() -> None:
    async def reply(request: bytes, writer: asyncio.StreamWriter) -> None:
        location = b"location: http://127.0.0.1:%d/dashboard/?a=b\r\n" % port
        writer.write(b"HTTP/1.1 307 Temporary Redirect\r\ncontent-length: 0\r\n" + location + b"\r\n")

    async with raw_replica(reply) as port, before(port) as (_, session):
        answer = await session.post(CHAT, json=body(), allow_redirects=False)
        assert (answer.status, answer.headers["Location"]) == (307, "/dashboard/?a=b")
