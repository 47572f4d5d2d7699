"""The gateway over real sockets: pass-through, streams, retries only before the first byte, health, breaker,
affinity.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from farthing.prompts import read_prompt
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.replicas import Breaker
from farthing_fleet.gateway.replicas_file import read_replicas, write_replicas
from farthing_fleet.gateway.server import Gateway
from tests.fleet.doubles.replica import FakeReplica

CHAT = "/v1/chat/completions"


def body(text: str = "hello", **extra: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **extra}


@asynccontextmanager
async def fleet(count: int = 2, config: GatewayConfig | None = None, **options: Any) -> AsyncIterator[Any]:
    """A gateway with `count` fake replicas, all healthy, and a client session: (gateway, replicas,
    session, url).
    """
    replicas = [FakeReplica(name=f"r{i}", **options) for i in range(count)]
    gateway = Gateway(config or GatewayConfig(health_interval_s=0.05, wait_s=1.0))
    for replica in replicas:
        await replica.start()
    port = await gateway.start()
    gateway.set_replicas({r.name: r.url for r in replicas})
    while len(gateway.balancer.candidates()) < count:
        await asyncio.sleep(0.01)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield gateway, replicas, session, f"http://127.0.0.1:{port}"
    finally:
        await gateway.stop(0)
        for replica in replicas:
            await replica.stop()


@pytest.mark.anyio
async def test_whole_answer_passes_through_unchanged() -> None:
    async with fleet(1) as (_, (replica,), session, _url):
        sent = body("é" * 100, temperature=0.5)
        async with session.post(CHAT, json=sent, headers={"x-request-id": "q1"}) as answer:
            assert answer.status == 200
            assert answer.headers["x-farthing-replica"] == "r0"
            assert (await answer.json())["choices"][0]["message"]["content"] == "t0 t1 t2 "
        assert replica.requests == [sent]
        headers = {key.lower(): value for key, value in replica.headers[0].items()}
        assert headers["x-request-id"] == "q1"
        assert headers["x-forwarded-for"] == "127.0.0.1"


@pytest.mark.anyio
async def test_stream_arrives_token_by_token() -> None:
    async with fleet(1, tokens=5, interval_s=0.03) as (_, _, session, _url):
        loop, times, events = asyncio.get_running_loop(), [], []
        async with session.post(CHAT, json=body(stream=True)) as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            async for line in answer.content:
                if line.startswith(b"data: "):
                    events.append(line)
                    times.append(loop.time())
        assert events[-1] == b"data: [DONE]\n"
        assert len(events) == 6
        assert len({round(t, 3) for t in times[:5]}) == 5  # not merged into one piece


@pytest.mark.anyio
async def test_http_1_0_client_gets_a_body_that_ends_with_the_connection() -> None:
    async with fleet(1) as (gateway, _, _session, url):
        port = int(url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        payload = json.dumps(body(stream=True)).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.0\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(payload), payload)
        )
        answer = await reader.read()
        writer.close()
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert gateway.stopping is False


@pytest.mark.anyio
async def test_pipelined_requests_are_answered_in_order() -> None:
    async with fleet(1) as (_, (replica,), _session, url):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        for text in ("one", "two"):
            payload = json.dumps(body(text)).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            writer.write(head + b"content-length: %d\r\n\r\n%s" % (len(payload), payload))
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        writer.close()
        assert [r["messages"][0]["content"] for r in replica.requests] == ["one", "two"]


@pytest.mark.anyio
async def test_retries_another_replica_before_the_first_byte() -> None:
    async with fleet(2) as (gateway, replicas, session, _url):
        for _ in range(4):  # the first choice dies without sending a byte
            for replica in replicas:
                replica.fail_after = None
            chosen = gateway.balancer.choose(read_prompt(json.dumps(body()).encode(), 256))
            next(r for r in replicas if r.name == chosen.name).fail_after = 0
            async with session.post(CHAT, json=body()) as answer:
                assert answer.status == 200
                assert answer.headers["x-farthing-replica"] != chosen.name
            chosen.breaker.succeeded()
        assert gateway.metrics.retries._value.get() == 4


@pytest.mark.anyio
async def test_busy_replica_is_skipped_and_the_last_answer_is_passed_on() -> None:
    async with fleet(2) as (_, replicas, session, _url):
        replicas[0].status = 503
        for _ in range(3):
            async with session.post(CHAT, json=body()) as answer:
                assert (answer.status, answer.headers["x-farthing-replica"]) == (200, "r1")
        replicas[1].status = 503
        async with session.post(CHAT, json=body()) as answer:
            assert answer.status == 503
            assert "set by the test" in await answer.text()


@pytest.mark.anyio
async def test_client_errors_are_not_retried() -> None:
    async with fleet(2) as (_, replicas, session, _url):
        for replica in replicas:
            replica.status = 422
        async with session.post(CHAT, json=body()) as answer:
            assert answer.status == 422
        assert sum(len(r.requests) for r in replicas) == 1


@pytest.mark.anyio
async def test_replica_lost_within_a_stream_ends_it_with_an_error_event() -> None:
    async with fleet(2, tokens=5, interval_s=0.01) as (_, replicas, session, _url):
        for replica in replicas:
            replica.fail_after = 2
        async with session.post(CHAT, json=body(stream=True)) as answer:
            lines = [line async for line in answer.content if line.startswith(b"data: ")]
        assert [b"choices" in line for line in lines] == [True, True, False]
        assert "replica lost" in json.loads(lines[-1][6:])["error"]["message"]
        assert sum(len(r.requests) for r in replicas) == 1  # never repeated after the first byte


@pytest.mark.anyio
async def test_request_waits_for_a_replica_and_then_gets_an_error() -> None:
    async with FakeReplica(name="late") as replica:
        gateway = Gateway(GatewayConfig(wait_s=0.5, health_interval_s=0.05))
        port = await gateway.start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/health") as answer:
                assert answer.status == 503
            async with session.post(CHAT, json=body()) as answer:
                assert answer.status == 503
                assert "none is ready" in (await answer.json())["error"]["message"]
                assert answer.headers["retry-after"] == "1"
            waiting = asyncio.ensure_future(session.post(CHAT, json=body()))
            await asyncio.sleep(0.1)
            assert gateway.state()["waiting"] == 1
            gateway.set_replicas({"late": replica.url})
            assert (await waiting).status == 200
        await gateway.stop(0)


@pytest.mark.anyio
async def test_disconnected_client_frees_the_replica() -> None:
    async with fleet(1, tokens=1000, interval_s=0.01) as (gateway, (replica,), session, _url):
        answer = await session.post(CHAT, json=body(stream=True))
        await answer.content.readline()
        answer.close()
        while replica.running or gateway.balancer.replicas["r0"].inflight:
            await asyncio.sleep(0.01)
        assert replica.disconnects == 1
        assert gateway.balancer.replicas["r0"].failed == 0  # caused by the client, not the replica


@pytest.mark.anyio
async def test_slow_client_slows_the_replica_down() -> None:
    async with fleet(1, tokens=200_000) as (gateway, (replica,), _session, url):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]), limit=1024)
        payload = json.dumps(body(stream=True)).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(head + b"content-length: %d\r\n\r\n%s" % (len(payload), payload))
        await reader.readline()
        await asyncio.sleep(0.5)
        (client,) = [guard for guard in gateway.door.guards if guard.phase == "request"]
        assert client.write_buffer < 1 << 20  # ~18 MB were offered
        assert replica.running == 1
        writer.close()


@pytest.mark.anyio
async def test_conversation_stays_on_its_replica_until_load_outweighs_affinity() -> None:
    async with fleet(3, GatewayConfig(health_interval_s=0.05, request_weight=8192)) as (
        gateway,
        _,
        session,
        _url,
    ):
        seen = set()
        for turn in range(1, 6):
            async with session.post(CHAT, json=body("x" * 700 * turn)) as answer:
                seen.add(answer.headers["x-farthing-replica"])
        assert len(seen) == 1
        owner = gateway.balancer.replicas[seen.pop()]
        owner.inflight = 3
        async with session.post(CHAT, json=body("x" * 5000)) as answer:
            assert answer.headers["x-farthing-replica"] != owner.name
        owner.inflight = 0


@pytest.mark.anyio
async def test_least_loaded_spreads_unrelated_requests() -> None:
    async with fleet(3, tokens=1, interval_s=0.1) as (_, replicas, session, _url):
        posts = [session.post(CHAT, json=body(f"{i}" * 600)) for i in range(9)]
        for answer in await asyncio.gather(*posts):
            assert answer.status == 200
            answer.release()
        assert [len(r.requests) for r in replicas] == [3, 3, 3]


@pytest.mark.anyio
async def test_unhealthy_replica_gets_no_requests_until_it_recovers() -> None:
    async with fleet(2) as (gateway, replicas, session, _url):
        port = replicas[0].port
        await replicas[0].stop()
        while gateway.balancer.replicas["r0"].healthy:
            await asyncio.sleep(0.02)
        for _ in range(4):
            async with session.post(CHAT, json=body()) as answer:
                assert answer.headers["x-farthing-replica"] == "r1"
        replicas[0].port = port
        await replicas[0].start()
        while not gateway.balancer.replicas["r0"].healthy:
            await asyncio.sleep(0.02)


def test_breaker_opens_tries_one_request_and_doubles_its_pause() -> None:
    now = [0.0]
    breaker = Breaker(failures_to_open=2, open_s=1.0, max_s=3.0, clock=lambda: now[0])
    breaker.failed()
    assert breaker.allows()
    breaker.failed()
    assert breaker.open and not breaker.allows()
    now[0] = 1.0
    assert breaker.allows()
    breaker.sent()
    assert not breaker.allows()  # one trial at a time
    breaker.failed()
    now[0] = 2.9
    assert not breaker.allows()  # 2 s this time
    now[0] = 3.0
    breaker.sent()
    breaker.abandoned()
    assert breaker.allows()
    breaker.succeeded()
    assert not breaker.open


@pytest.mark.anyio
async def test_everything_except_health_and_metrics_requires_a_key() -> None:
    class OneKey:
        def check(self, header_value: str | None) -> str | None:
            return "alice" if header_value == "Bearer secret" else None

    async with FakeReplica(name="r") as replica:
        gateway = Gateway(GatewayConfig(health_interval_s=0.05), keys=OneKey())
        port = await gateway.start()
        gateway.set_replicas({"r": replica.url})
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            for path, status in (
                ("/v1/models", 401),
                ("/fleet/replicas", 401),
                ("/metrics", 200),
                ("/live", 200),
            ):
                async with session.get(path) as answer:
                    assert answer.status == status, path
            async with session.get("/v1/models", headers={"authorization": "Bearer secret"}) as answer:
                assert (await answer.json())["data"][0]["owned_by"] == "r"
        await gateway.stop(0)


@pytest.mark.anyio
async def test_drain_lets_requests_finish_and_sends_errors_to_the_rest() -> None:
    async with fleet(1, tokens=20, interval_s=0.02) as (gateway, _, session, _url):
        answer = await session.post(CHAT, json=body(stream=True))
        await answer.content.readline()
        stopping = asyncio.ensure_future(gateway.stop(5))
        lines = [line async for line in answer.content if line.startswith(b"data: ")]
        assert lines[-1] == b"data: [DONE]\n"
        assert await stopping == 0
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get("/health")

    async with fleet(1, tokens=2000, interval_s=0.02) as (gateway, _, session, _url):
        answer = await session.post(CHAT, json=body(stream=True))
        await answer.content.readline()
        stopping = asyncio.ensure_future(gateway.stop(0.1))
        lines = [line async for line in answer.content if line.startswith(b"data: ")]
        assert "the gateway is shutting down" in lines[-1].decode()
        assert await stopping == 1


@pytest.mark.anyio
async def test_bad_requests_get_an_error_and_the_gateway_continues() -> None:
    config = GatewayConfig(health_interval_s=0.05, max_body=1000)
    async with fleet(1, config) as (_, _, session, url):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        with suppress(aiohttp.ClientOSError):
            async with session.post(CHAT, json=body("x" * 2000)) as answer:
                assert answer.status == 413
        async with session.post(CHAT, json=body()) as answer:
            assert answer.status == 200


@pytest.mark.anyio
async def test_replicas_file_is_watched_and_an_invalid_one_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "replicas.json"
    async with FakeReplica(name="a") as first, FakeReplica(name="b") as second:
        write_replicas(path, {"a": first.url})
        gateway = Gateway(GatewayConfig(health_interval_s=0.05), replicas_file=path)
        await gateway.start()
        assert set(gateway.balancer.replicas) == {"a"}
        write_replicas(path, {"a": first.url, "b": second.url})
        while set(gateway.balancer.replicas) != {"a", "b"}:
            await asyncio.sleep(0.01)
        path.write_text('{"replicas": [')
        await asyncio.sleep(0.2)
        path.unlink()
        await asyncio.sleep(0.2)
        assert set(gateway.balancer.replicas) == {"a", "b"}
        write_replicas(path, {"b": second.url})
        while set(gateway.balancer.replicas) != {"b"}:
            await asyncio.sleep(0.01)
        await gateway.stop(0)


@pytest.mark.anyio
async def test_errors_name_the_problem(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gateway.health_path: got 'x'"):
        GatewayConfig(health_path="x")
    path = tmp_path / "r.json"
    path.write_text('{"replica": []}')
    with pytest.raises(ValueError, match="replicas"):
        read_replicas(path)

    with pytest.raises(ValueError, match=r"https://x.*http://HOST:PORT"):
        Gateway().set_replicas({"r": "https://x"})
