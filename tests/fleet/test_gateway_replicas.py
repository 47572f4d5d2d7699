"""Replicas that send unsolicited bytes, die from a request or are cut off: what the client receives."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.server.errors import CODE_HEADER
from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.replicas import Poison, make_replica
from farthing_fleet.gateway.server import Gateway
from tests.fleet.doubles import replica as double
from tests.fleet.doubles.replica import FakeReplica
from tests.fleet.doubles.services import free_port
from tests.fleet.test_gateway import CHAT, body


@asynccontextmanager
async def raw_replica(reply: Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    """A replica that answers health checks; `reply(request, writer)` writes everything else."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith((b"GET /health", b"GET /v1/models")):
                    status = b"200 OK" if head.startswith(b"GET /health") else b"404 Not Found"
                    writer.write(b"HTTP/1.1 %s\r\ncontent-length: 0\r\n\r\n" % status)
                    continue
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reply(await reader.readexactly(length), writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@asynccontextmanager
async def in_front_of(
    urls: dict[str, str], **options: Any
) -> AsyncIterator[tuple[Gateway, aiohttp.ClientSession]]:
    """A gateway with all replicas healthy, and a client of it."""
    gateway = Gateway(GatewayConfig(health_interval_s=0.05, **options))
    port = await gateway.start()
    gateway.set_replicas(urls)
    while len(gateway.balancer.candidates()) < len(urls):
        await asyncio.sleep(0.01)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield gateway, session
    finally:
        await gateway.stop(0)


def before(port: int) -> AbstractAsyncContextManager[tuple[Gateway, aiohttp.ClientSession]]:
    """A gateway in front of one replica, on `port`."""
    return in_front_of({"raw": f"http://127.0.0.1:{port}"}, wait_s=1.0)


@pytest.mark.anyio
@pytest.mark.parametrize("delay", [0.0, 0.05])
async def test_unsolicited_replica_bytes_reach_no_client(delay: float) -> None:
    stray = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nstolen"

    async def reply(request: bytes, writer: asyncio.StreamWriter) -> None:
        text = json.loads(request)["messages"][0]["content"].encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))
        if delay:
            await writer.drain()
            await asyncio.sleep(delay)
        writer.write(stray)

    async with raw_replica(reply) as port, before(port) as (_, session):
        for turn in range(6):
            async with session.post(CHAT, json=body(f"turn {turn}")) as answer:
                assert (answer.status, await answer.text()) == (200, f"turn {turn}")
            await asyncio.sleep(delay * 1.5)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "garbage",
    [
        b"not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    ],
    ids=["text", "two lengths", "huge header", "unasked upgrade"],
)
async def test_client_gets_an_error_if_the_replica_does_not_speak_http(garbage: bytes) -> None:
    async def reply(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(garbage)

    async with raw_replica(reply) as port, before(port) as (_, session):
        answer = await session.post(CHAT, json=body())
        assert answer.status in (502, 503)
        assert "raw" in (await answer.json())["error"]["message"]


@pytest.mark.anyio
async def test_truncated_answer_is_an_error_not_a_shorter_answer() -> None:
    async def reply(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        writer.close()

    async with raw_replica(reply) as port, before(port) as (_, session):
        assert (await session.post(CHAT, json=body())).status == 502


@pytest.mark.anyio
async def test_unframed_stream_that_ends_without_done_ends_with_an_error_event() -> None:
    async def reply(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {"a": 1}\n\ndata: {"b"'
        )
        writer.close()

    async with raw_replica(reply) as port, before(port) as (_, session):
        async with session.post(CHAT, json=body(stream=True)) as answer:
            lines = [line async for line in answer.content if line.startswith(b"data: ")]
        assert "without [DONE]" in json.loads(lines[-1][6:])["error"]["message"]


@asynccontextmanager
async def mortal(count: int, *arguments: str) -> AsyncIterator[tuple[dict[str, str], Callable[[], int]]]:
    """Replica processes that die from "poison": ({name: url}, number of dead ones)."""
    processes, urls = [], {}
    for index in range(count):
        port = free_port()
        command = (double.__file__, "--port", str(port), "--dies-of", "poison", *arguments)
        processes.append(await asyncio.create_subprocess_exec(sys.executable, *command))
        urls[f"p{index}"] = f"http://127.0.0.1:{port}"
    try:
        yield urls, lambda: sum(p.returncode is not None for p in processes)
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()


@pytest.mark.anyio
async def test_request_that_kills_its_replica_kills_two_at_most() -> None:
    async with mortal(3) as (urls, dead), in_front_of(urls) as (_, session):
        async with session.post(CHAT, json=body("poison")) as answer:
            assert answer.status == 502
            assert "sent to 2" in (await answer.json())["error"]["message"]
        for _ in range(3):
            async with session.post(CHAT, json=body("poison")) as answer:
                assert answer.status == 422
        while dead() < 2:
            await asyncio.sleep(0.01)
        async with session.post(CHAT, json=body("harmless")) as answer:
            assert answer.status == 200
        assert dead() == 2


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [1, 12])
async def test_one_death_makes_no_text_unanswerable(count: int, stream: bool) -> None:
    """However many requests of one text it interrupts: most deaths are not theirs."""

    async def ask(session: aiohttp.ClientSession) -> int:
        async with session.post(CHAT, json=body("popular", stream=stream)) as answer:
            await answer.text()
            return answer.status

    fleet = mortal(2, "--tokens", "20", "--interval", "0.05")
    async with fleet as (urls, dead), in_front_of(urls) as (gateway, session):
        crowd = [asyncio.create_task(ask(session)) for _ in range(count)]
        replicas = gateway.balancer.replicas
        while sum(r.inflight for r in replicas.values()) < count:
            await asyncio.sleep(0.01)
        busy = max(replicas.values(), key=lambda r: r.inflight)
        await ask_to_die(busy.url)
        assert set(await asyncio.gather(*crowd)) == {200}
        assert [await ask(session) for _ in range(3)] == [200] * 3
        assert dead() == 1


@pytest.mark.anyio
async def test_a_text_that_is_answered_is_not_what_two_replicas_died_of() -> None:
    """However close together they die: a host that fails takes several replicas with it."""

    async def ask(session: aiohttp.ClientSession) -> int:
        async with session.post(CHAT, json=body("popular")) as answer:
            await answer.text()
            return answer.status

    async with (
        mortal(3, "--tokens", "20", "--interval", "0.05") as (urls, dead),
        in_front_of(urls) as (gateway, session),
    ):
        crowd = [asyncio.create_task(ask(session)) for _ in range(12)]
        replicas = list(gateway.balancer.replicas.values())
        while sum(r.inflight for r in replicas) < len(crowd):
            await asyncio.sleep(0.01)
        assert all(r.inflight for r in replicas)
        await asyncio.gather(*(ask_to_die(r.url) for r in replicas[:2]))
        assert 200 in await asyncio.gather(*crowd)
        assert [await ask(session) for _ in range(3)] == [200] * 3
        assert dead() == 2


@pytest.mark.anyio
async def test_a_text_that_fails_the_engines_of_one_healthy_replica_is_refused() -> None:
    """A server of several models starts another engine and stays healthy."""
    async with FakeReplica() as replica, in_front_of({"r": replica.url}, wait_s=1.0) as (_, session):
        replica.status, replica.extra = 503, {CODE_HEADER: "engine_failed"}
        statuses = []
        for _ in range(3):
            async with session.post(CHAT, json=body("poison")) as answer:
                statuses.append(answer.status)
        assert statuses[-1] == 422
        assert len(replica.requests) == 2


@pytest.mark.anyio
async def test_one_failure_of_an_engine_makes_no_text_unanswerable() -> None:
    """Requests that arrive until its process ends meet the same failure."""

    async def ask(session: aiohttp.ClientSession) -> int:
        async with session.post(CHAT, json=body("popular")) as answer:
            return answer.status

    async with FakeReplica() as replica, in_front_of({"r": replica.url}, wait_s=2.0) as (_, session):
        replica.status, replica.extra = 503, {CODE_HEADER: "engine_failed"}
        replica.ready_at = math.inf  # its health says so too
        asked = []
        for _ in range(5):
            asked.append(asyncio.create_task(ask(session)))
            await asyncio.sleep(0.02)
        replica.status, replica.ready_at = 200, 0.0
        await asyncio.gather(*asked)
        assert await ask(session) == 200


async def ask_to_die(url: str) -> None:
    """Kill a replica by a request that the gateway does not see."""
    async with aiohttp.ClientSession(url) as direct:
        with suppress(aiohttp.ClientError):
            await direct.post(CHAT, json=body("poison"))


@pytest.mark.anyio
async def test_poison_in_the_middle_of_streams_kills_two_replicas_at_most() -> None:
    late = mortal(3, "--dies-late")
    async with late as (urls, dead), in_front_of(urls) as (gateway, session):
        for count in (1, 2):
            async with session.post(CHAT, json=body("poison", stream=True)) as answer:
                assert "replica lost" in await answer.text()
            while dead() < count or len(gateway.balancer.candidates()) > 3 - count:
                await asyncio.sleep(0.01)
        async with session.post(CHAT, json=body("poison", stream=True)) as answer:
            assert answer.status == 422
        async with session.post(CHAT, json=body("harmless", stream=True)) as answer:
            assert "[DONE]" in await answer.text()
        assert dead() == 2


@pytest.mark.anyio
async def test_poison_among_others_kills_two_replicas_at_most() -> None:
    async def ask(session: aiohttp.ClientSession, text: str) -> int:
        async with session.post(CHAT, json=body(text)) as answer:
            return answer.status

    slow = mortal(3, "--tokens", "10", "--interval", "0.05")
    async with slow as (urls, dead), in_front_of(urls) as (_, session):
        crowd = [asyncio.create_task(ask(session, f"good {i}")) for i in range(12)]
        await asyncio.sleep(0.05)
        poison = [await ask(session, "poison") for _ in range(3)]
        assert poison[-1] == 422
        assert dead() <= 2
        assert set(await asyncio.gather(*crowd)) <= {200, 502}
        assert [await ask(session, f"better {i}") for i in range(3)] == [200] * 3


def test_poison_entries_are_bounded_and_expire() -> None:
    now = [0.0]
    poison = Poison(10.0, clock=lambda: now[0])
    poison.strike(("POST", "/a", b"x"), life=1)
    poison.strike(("POST", "/a", b"x"), life=2)
    assert poison.refuses(("POST", "/a", b"x")) and not poison.refuses(("POST", "/b", b"x"))
    now[0] = 10.0
    assert not poison.refuses(("POST", "/a", b"x"))
    for number in range(10_000):
        poison.strike(("POST", f"/{number}", b""), life=3)
    assert len(poison) <= 4096


def test_the_request_whose_last_death_is_longest_ago_is_forgotten_first() -> None:
    poison = Poison(10.0, clock=lambda: 0.0)
    requests = [("POST", f"/{number}", b"") for number in range(4097)]
    for request in requests[:-1]:
        poison.strike(request, life=1)
    for request, life in ((requests[0], 2), (requests[-1], 1), (requests[1], 2), (requests[-1], 2)):
        poison.strike(request, life)
    assert [poison.refuses(requests[at]) for at in (0, 1, -1)] == [True, False, True]


@given(st.lists(st.tuples(st.none() | st.integers(0, 3), st.integers(0, 2)), max_size=40))
def test_a_text_is_refused_after_two_deaths_and_not_before(events: list[tuple[int | None, int]]) -> None:
    """events: (life, text) of every request that a death interrupts, or (None, text) that is answered."""
    poison = Poison(10.0, clock=lambda: 0.0)
    deaths: list[set[int]] = [set(), set(), set()]
    for life, text in events:
        if life is None:
            poison.acquit(("POST", "/", bytes([text])))
            deaths[text].clear()
        else:
            poison.strike(("POST", "/", bytes([text])), life)
            deaths[text].add(life)
    for text, lives in enumerate(deaths):
        assert poison.refuses(("POST", "/", bytes([text]))) == (len(lives) >= 2)


def test_each_death_ends_a_life() -> None:
    replica = make_replica("a", "http://127.0.0.1:1", GatewayConfig())
    lives = {replica.life}
    for _ in range(3):
        replica.checked(True, 2)
        lives.add(replica.life)
        replica.checked(True, 2)
        replica.checked(False, 2)
        assert replica.life in lives
        replica.checked(False, 2)
    assert len(lives) == 4
