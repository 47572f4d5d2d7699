"""Exchanges over kept connections: what is used again, what is sent again, what closes a connection."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from farthing.exchange import Answer, ReplicaLost, Upstream
from tests.fleet.doubles.certificates import issue

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-trailer: 1\r\n\r\n"
Reply = Callable[[int, bytes, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Answers each request with `reply(number of the connection, head, writer)`."""

    def __init__(self, reply: Reply) -> None:
        self.reply, self.heads, self.connections = reply, list[bytes](), 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head)
                await self.reply(number, head, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def upstream(reply: Reply, silence: float = 60.0) -> AsyncIterator[tuple[Server, Upstream]]:
    server = Server(reply)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    client = Upstream(60.0, silence)
    try:
        yield server, client
    finally:
        client.close()
        listener.close()


async def ask(server: Server, client: Upstream, method: str = "GET") -> bytes:
    answer = await client.send(server.url, method, "/", CIMultiDict())
    try:
        return b"".join([part async for part in parts(answer)])
    finally:
        answer.close()


async def parts(answer: Answer) -> AsyncIterator[bytes]:
    while data := await answer.part():
        yield data


def always(data: bytes) -> Reply:
    async def reply(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return reply


@pytest.mark.anyio
@pytest.mark.parametrize("data", [OK, CHUNKED, b"HTTP/1.1 100 Continue\r\n\r\n" + OK])
async def test_connection_carries_the_next_exchange(data: bytes) -> None:
    async with upstream(always(data)) as (server, client):
        assert [await ask(server, client) for _ in range(3)] == [b"ok"] * 3
        assert server.connections == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    "data",
    [
        OK + b"H",
        OK + OK,
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ],
    ids=["one stray byte", "a stray answer", "close", "HTTP/1.0"],
)
async def test_connection_is_closed_after_other_answers(data: bytes) -> None:
    async with upstream(always(data)) as (server, client):
        assert [await ask(server, client) for _ in range(3)] == [b"ok"] * 3
        assert server.connections == 3


@pytest.mark.anyio
async def test_bytes_on_an_idle_connection_close_it() -> None:
    async def reply(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        asyncio.get_running_loop().call_later(0.01, writer.write, OK)

    async with upstream(reply) as (server, client):
        for connections in (1, 2):
            assert await ask(server, client) == b"ok"
            assert server.connections == connections
            await asyncio.sleep(0.05)  # the event loop reads them


@pytest.mark.anyio
async def test_body_without_a_length_ends_with_the_connection() -> None:
    async def reply(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nok")
        writer.close()

    async with upstream(reply) as (server, client):
        assert [await ask(server, client), await ask(server, client)] == [b"ok", b"ok"]


@pytest.mark.anyio
async def test_head_has_no_body_and_is_not_waited_for() -> None:
    async with upstream(always(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")) as (server, client):
        assert await ask(server, client, "HEAD") == b""


@pytest.mark.anyio
async def test_request_is_sent_again_if_an_idle_connection_was_just_closed() -> None:
    async def reply(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        if number == 1 and len(server.heads) == 2:  # the second request meets the end of the first connection
            writer.close()
        else:
            writer.write(OK)

    async with upstream(reply) as (server, client):
        assert [await ask(server, client), await ask(server, client)] == [b"ok", b"ok"]
        assert server.connections == 2


@pytest.mark.anyio
async def test_request_is_not_sent_again_after_a_byte_of_the_answer() -> None:
    async def reply(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(OK if len(server.heads) == 1 else OK[:10])
        if len(server.heads) > 1:
            writer.close()

    async with upstream(reply) as (server, client):
        await ask(server, client)
        with pytest.raises(ReplicaLost) as lost:
            await ask(server, client)
        assert lost.value.reached and len(server.heads) == 2


@pytest.mark.anyio
async def test_server_that_died_of_a_request_on_a_kept_connection_was_reached() -> None:
    async def reply(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        if len(server.heads) == 1:
            writer.write(OK)
        else:
            listener.close()
            writer.transport.abort()

    server = Server(reply)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    client = Upstream(60.0, 60.0)
    await ask(server, client)
    with pytest.raises(ReplicaLost, match="cannot connect") as lost:
        await ask(server, client)
    assert lost.value.reached
    with pytest.raises(ReplicaLost, match="cannot connect") as lost:
        await ask(server, client)
    assert not lost.value.reached


@pytest.mark.anyio
async def test_silent_server_is_lost() -> None:
    async def reply(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        pass

    async with upstream(reply, silence=0.01) as (server, client):
        with pytest.raises(ReplicaLost, match=r"nothing was received for 0\.01 s"):
            await ask(server, client)


@pytest.mark.anyio
async def test_slow_reader_slows_the_server_down() -> None:
    size = 64 << 20

    async def reply(number: int, head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(64):
            writer.write(bytes(1 << 20))
            await writer.drain()
            sent.append(1)

    sent: list[int] = []
    async with upstream(reply) as (server, client):
        answer = await client.send(server.url, "GET", "/", CIMultiDict())
        count = -1
        while len(sent) > count:  # until the server waits
            count = len(sent)
            await asyncio.sleep(0.2)
        assert count < 60
        assert sum([len(part) async for part in parts(answer)]) == size
        answer.close()


@pytest.mark.anyio
async def test_line_break_in_a_header_reaches_no_server() -> None:
    async with upstream(always(OK)) as (server, client):
        for value in ("a\r\nx: b", "a\nx: b", "a\0"):
            with pytest.raises(ValueError, match="line break"):
                await client.send(server.url, "GET", "/", CIMultiDict({"x": value}))
        assert not server.heads


@given(st.sampled_from([OK, CHUNKED, OK + OK, CHUNKED + b"x"]), st.lists(st.integers(1, 12), min_size=1))
def test_answer_is_the_same_however_it_is_cut(data: bytes, sizes: list[int]) -> None:
    class Silent:
        """A connection without a network."""

        transport = None
        answer: object = None

        def close(self) -> None:
            pass

    answer = Answer(Upstream(1.0, 1.0), "", Silent(), bodiless=False)  # type: ignore[arg-type]
    at, turn = 0, 0
    while at < len(data):
        answer.feed(data[at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    assert (answer.status, b"".join(answer._parts), answer._complete) == (200, b"ok", True)
    assert answer._reusable == (data in (OK, CHUNKED))


@pytest.mark.anyio
async def test_get_verifies_a_servers_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = issue(tmp_path, "authority")
    leaf = issue(tmp_path, "leaf", authority, server=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.certificate_file, leaf.key_file)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    upstream = Upstream(60.0, 60.0)
    with pytest.raises(ReplicaLost, match="certificate verify failed"):
        await upstream.get(url, "/", timeout=60.0)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate_file))
    for _ in range(2):
        assert await upstream.get(url, "/", timeout=60.0) == (200, b"ok")
    upstream.close()
    server.close()


@pytest.mark.anyio
async def test_get_ends_after_its_time() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    upstream = Upstream(60.0, 60.0)
    with pytest.raises(ReplicaLost, match=r"no answer within 0\.05 s"):
        await upstream.get(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "/", timeout=0.05)
    server.close()
