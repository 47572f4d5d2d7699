"""Sockets that send nothing, too much or too slowly, before authentication."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from farthing.server.config import KeyRing, ServerConfig
from farthing.server.errors import ClientTooSlow
from farthing.server.run import connection_limit, listen
from tests.server.harness import Running, ScriptedEngine, running, until

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@contextlib.contextmanager
def sockets(server: Running, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            for _ in range(count)
        ]


def answer(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


def until_body(connection: socket.socket) -> bytes:
    """A response of /health."""
    received = b""
    while b"}" not in received:
        received += connection.recv(65536)
    return received


def healthy(server: Running) -> bool:
    return httpx.get(f"{server.url}/health").status_code == 200


def test_small_parts_of_an_answer_are_sent_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("pieces", [1, 200])
def test_head_of_megabytes_is_rejected_early(pieces: int) -> None:
    with running(ScriptedEngine()) as server, sockets(server, 1) as (connection,):
        sent = 0
        with contextlib.suppress(ConnectionError):
            connection.sendall(HEAD + b"x: ")
            for _ in range(pieces):
                connection.sendall(b"y" * (20_000_000 // pieces))
                sent += 20_000_000 // pieces
            connection.sendall(b"\r\n\r\n")
        received = answer(connection)
        assert not received or received.split()[1] in (b"431", b"400")
        assert healthy(server)


@pytest.mark.parametrize(
    "head", [b"x: " + b"y" * 40_000 + b"\r\n\r\n", b"x: y\r\n" * 9_000 + b"\r\n"], ids=["long", "many"]
)
def test_head_in_one_packet_is_measured_too(head: bytes) -> None:
    with running(ScriptedEngine()) as server, sockets(server, 1) as (connection,):
        connection.sendall(HEAD + head)
        connection.shutdown(socket.SHUT_WR)
        assert b" 431 " in answer(connection)


def test_pipeline_is_bounded_and_what_was_accepted_is_answered() -> None:
    with running(ScriptedEngine()) as server, sockets(server, 1) as (connection,):
        connection.sendall((HEAD + b"\r\n") * 2_000)
        answers = answer(connection).count(b"HTTP/1.1 200 ")
        assert answers == 33
        assert healthy(server)


STREAM = b'{"prompt": "x", "stream": true}'
STREAMED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(STREAM), STREAM)
)


def test_error_of_a_pipelined_request_is_not_written_into_a_running_stream() -> None:
    with (
        running(ScriptedEngine(["a"], step=0.01, forever=True)) as server,
        sockets(server, 1) as (connection,),
    ):
        connection.sendall(STREAMED)
        received = b""
        while b"data: " not in received:
            received += connection.recv(65536)
        connection.sendall(b"this is no HTTP\r\n\r\n")
        assert (received + answer(connection)).count(b"HTTP/1.1 ") == 1
        until(lambda: not server.service.jobs)


@pytest.mark.parametrize("at_once", [True, False])
def test_head_that_begins_during_a_request_must_end_too(at_once: bool) -> None:
    """It had the time of an idle connection, as if nothing of it had arrived."""
    partial = b"GET /health HTTP/1.1\r\na"
    engine = ScriptedEngine(["a"] * 10, step=0.01)
    with (
        running(engine, header_timeout=0.3, idle_timeout=1000) as server,
        sockets(server, 1) as (connection,),
    ):
        connection.sendall(STREAMED + partial if at_once else STREAMED)
        received = b""
        while b"data: " not in received:
            received += connection.recv(65536)
        if not at_once:
            connection.sendall(partial)
        received += answer(connection)
        assert b"[DONE]" in received and b"HTTP/1.1 408 " in received


CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
BODY = b'{"prompt": "x", "max_tokens": 1}'


@pytest.mark.parametrize("extension", [b"", b";a=b"])
def test_tiny_chunks_are_rejected(extension: bytes) -> None:
    with running(ScriptedEngine()) as server, sockets(server, 2) as (many, few):
        with contextlib.suppress(ConnectionError):
            many.sendall(CHUNKED + b"1%s\r\n \r\n" % extension * 50_000)
        received = answer(many)
        assert not received or (b"400 Bad Request" in received and b"at least 64 bytes" in received)
        few.sendall(CHUNKED + b"1%s\r\n \r\n" % extension * 500)
        few.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))
        assert few.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_trailers_are_ignored_and_bounded() -> None:
    """They were appended to the headers, without a limit on their number."""
    body = CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    with running(ScriptedEngine(), keys=KeyRing(["me:secret"])) as server, sockets(server, 2) as (many, few):
        with contextlib.suppress(ConnectionError):
            many.sendall(body + b"x: y\r\n" * 500_000)
        received = answer(many)
        assert not received or received.split()[1] in (b"400", b"401")
        few.sendall(body + b"authorization: Bearer secret\r\n\r\n")
        assert few.recv(65536).startswith(b"HTTP/1.1 401 ")
        assert healthy(server)


@pytest.mark.parametrize(("version", "status"), [("1.0", b"200"), ("0.9", b"400"), ("2.0", b"400")])
def test_versions_of_http(version: str, status: bytes) -> None:
    with running(ScriptedEngine()) as server, sockets(server, 1) as (connection,):
        connection.sendall(HEAD.replace(b"1.1", version.encode()) + b"Connection: close\r\n\r\n")
        received = answer(connection)
        assert received.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("sent", [b"", b"GET", HEAD, HEAD + b"x: y"])
def test_head_that_never_ends(sent: bytes) -> None:
    with running(ScriptedEngine(), header_timeout=0.3) as server, sockets(server, 1) as (connection,):
        connection.sendall(sent)
        began = time.monotonic()
        received = answer(connection)
        assert time.monotonic() - began < 5
        assert (b" 408 " in received) == bool(sent)


def test_slow_drip_does_not_extend_the_timeout() -> None:
    with running(ScriptedEngine(), header_timeout=0.5) as server, sockets(server, 1) as (connection,):
        began = time.monotonic()
        with pytest.raises(OSError):
            for _ in range(200):
                connection.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - began < 8


def test_second_request_has_its_own_timeout() -> None:
    with running(ScriptedEngine(["x"] * 10, step=0.1), header_timeout=0.8, idle_timeout=2) as server:
        with httpx.Client(base_url=server.url) as client:  # one connection
            for _ in range(3):  # a one-second answer is not cut by the head timeout
                assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        with sockets(server, 1) as (connection,):
            connection.sendall(HEAD + b"\r\n")
            assert b" 200 " in until_body(connection)
            time.sleep(0.5)
            connection.sendall(HEAD)
            time.sleep(0.5)  # longer than the head timeout after the answer, but not after the first byte
            connection.sendall(b"\r\n")
            assert b" 200 " in until_body(connection)
            assert b" 408 " not in answer(connection)


def test_body_after_its_rejection_does_not_keep_the_connection() -> None:
    with running(ScriptedEngine(), max_body_bytes=10, header_timeout=0.5) as server:
        with sockets(server, 1) as (connection,):
            connection.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n"
            )
            assert b" 413 " in connection.recv(65536)
            began = time.monotonic()
            with pytest.raises(OSError):
                for _ in range(200):
                    connection.sendall(b"x" * 1000)
                    time.sleep(0.05)
            assert time.monotonic() - began < 8
        until(lambda: not server.guard)


def test_idle_sockets_are_closed_first() -> None:
    with running(ScriptedEngine(), max_connections=20) as server, sockets(server, 100) as idle:
        until(lambda: server.guard.evicted >= 80)
        until(lambda: len(server.guard) <= 20)
        assert healthy(server)
        assert answer(idle[0]) == b""
    until(lambda: not server.guard)


def test_busy_connections_are_not_closed() -> None:
    engine = ScriptedEngine(["x"], step=0.02, forever=True)
    with running(engine, max_connections=4) as server:  # three for one address
        streams = [
            server.client().completions.create(model="tiny", prompt="x", stream=True) for _ in range(3)
        ]
        with sockets(server, 1) as (connection,):
            assert b" 503 " in answer(connection)
        for stream in streams:
            assert next(iter(stream))
            stream.close()
        until(lambda: not engine.running)
        assert healthy(server)


def test_connection_limit_fits_the_open_file_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert connection_limit(ServerConfig()) == 512 - 128
    assert raised == [(512, 512)]


def status_of(server: Running, request: bytes) -> bytes:
    """The status of the answer to a request, after which the client sends no more."""
    with sockets(server, 1) as (connection,):
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return answer(connection).partition(b"\r\n")[0].split()[1]


@pytest.mark.parametrize("field", [b"Authorization", b"X-Api-Key"])
@pytest.mark.parametrize("second", [b"Bearer sk-1", b"Bearer other", b""])
def test_two_headers_with_a_key_are_rejected(field: bytes, second: bytes) -> None:
    """A proxy may have checked the one that the server does not read."""
    with running(ScriptedEngine(), keys=KeyRing(["me:sk-1"])) as server:
        head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n%s: Bearer sk-1\r\n" % field
        assert status_of(server, head + b"%s: %s\r\n\r\n" % (field.lower(), second)) == b"400"
        assert healthy(server)


async def unread(scope: Scope, receive: Receive, send: Send) -> None:
    """An application whose answers are left unread."""
    while scope["type"] == "lifespan":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    raise ClientTooSlow


def test_client_that_does_not_read_is_disconnected_without_an_error_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("farthing.server.run.create_app", lambda service: unread)
    with running(ScriptedEngine()) as server, sockets(server, 1) as (client,):
        client.sendall(HEAD + b"\r\n")
        answer(client)  # until the server has closed
        until(lambda: not len(server.guard))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("first", [b"localhost", b"evil.example"])
def test_two_host_headers_are_rejected(first: bytes) -> None:
    with running(ScriptedEngine()) as server:
        hosts = b"Host: " + first + b"\r\nX: y\r\nhost: localhost\r\n\r\n"
        assert status_of(server, b"GET /health HTTP/1.1\r\n" + hosts) == b"400"
        assert healthy(server)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://evil.example/health", b"400"),
        (b"http://localhost@evil.example/health", b"400"),
        (b"http://evil.example?x=/health", b"400"),
        (b"http://localhost:8000/health", b"400"),
        (b"http://LOCALHOST/health", b"200"),
        (b"/health?from=http://evil.example/", b"200"),
    ],
)
def test_absolute_target_must_name_the_host(target: bytes, status: bytes) -> None:
    with running(ScriptedEngine()) as server:
        request = b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert status_of(server, request) == status


def test_idle_time_is_an_option() -> None:
    with (
        running(ScriptedEngine(), idle_timeout=0.2, header_timeout=60) as server,
        sockets(server, 1) as opened,
    ):
        (connection,) = opened
        connection.sendall(HEAD + b"\r\n")
        until_body(connection)
        assert answer(connection) == b""  # closed, long before a head would be late
    with (
        running(ScriptedEngine(), idle_timeout=60, header_timeout=0.2) as server,
        sockets(server, 1) as opened,
    ):
        (connection,) = opened
        connection.sendall(HEAD + b"\r\n")
        until_body(connection)
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        connection.sendall(HEAD)  # a head has begun: its own time runs
        assert b" 408 " in answer(connection)


def test_garbage_behind_a_stream_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    body = b'{"prompt": "x", "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    engine = ScriptedEngine(["a"], step=0.001, forever=True)
    with running(engine) as server, sockets(server, 1) as (connection,):
        connection.sendall(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        connection.recv(100)
        connection.sendall(b"nonsense\r\n\r\n")
        answer(connection)
        until(lambda: not (engine.running or server.service.jobs))
    assert not [record for record in caplog.records if record.exc_info]


def test_lost_connection_ends_every_pipelined_request(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(["a"], step=0.01, forever=True)
    with running(engine) as server, sockets(server, 1) as (connection,):
        connection.sendall(STREAMED * 3)
        connection.recv(100)
        assert engine.running == 1
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        until(lambda: not engine.running)
        until(lambda: not server.service.jobs)
        assert len(engine.prompts) == 1 and len(server.guard) == 0
    assert not [record for record in caplog.records if record.exc_info]
