"""The gateway's cost: time added to a request, small requests per second, and concurrent streams, directly
and through the gateway, interleaved.

Replica, gateway and relays are separate processes on loopback; this process is the client. The gateway is
compared with a Python relay that forwards bytes without parsing them (the limit for one more process in the
same language), and with a proxy of a few lines on aiohttp, the gateway's HTTP library: `kept` reuses its
connections to the replica, as the gateway does, and `fresh` opens one per request.

    python bench/gateway.py [--requests 2000] [--streams 500] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import aiohttp
from aiohttp import web

from farthing.process import loop_factory
from harness import FARTHING, HOST, accepts, free_port, in_turns, parser, percentile, report, running

TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"tok"}}]}\n\n'
WHOLE, LAST = b'{"status":"ok"}', b"0\r\n\r\n"  # the ends of both kinds of answer
WARM = 50  # requests of each path that do not count


class Replica(asyncio.Protocol):
    """A server with almost no overhead; the request's `x-tokens: N` and `x-interval: S` select its answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            length = int(_field(head, b"content-length", 0))
            if len(rest) < length:
                return
            self.buffer = rest[length:]
            if tokens := int(_field(head, b"x-tokens", 0)):
                self.task = asyncio.ensure_future(self.stream(tokens, _field(head, b"x-interval", 0)))
            else:
                head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n"
                self.transport.write(head + WHOLE)

    async def stream(self, tokens: int, interval: float) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        self.transport.write(head)
        for _ in range(tokens):
            self.transport.write(b"%x\r\n%s\r\n" % (len(TOKEN), TOKEN))
            if interval:
                await asyncio.sleep(interval)
        self.transport.write(LAST)


def _field(head: bytes, name: bytes, default: float) -> float:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(name + b":"):
            return float(line.partition(b":")[2])
    return default


class Relay(asyncio.Protocol):
    """Relay bytes between two connections without parsing them."""

    def __init__(self, target: int, other: Relay | None = None) -> None:
        self.target, self.other = target, other
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        if self.other is None:
            self.task = asyncio.ensure_future(self.join())

    async def join(self) -> None:
        loop = asyncio.get_running_loop()
        _, self.other = await loop.create_connection(lambda: Relay(0, self), HOST, self.target)
        for data in self.early:
            self.other.transport.write(data)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()


async def serve(kind: str, port: int, target: int) -> None:
    """One of the processes under test."""
    connector = aiohttp.TCPConnector(limit=0, force_close=kind == "fresh")
    async with aiohttp.ClientSession(f"http://{HOST}:{target}", connector=connector) as session:

        async def forward(request: web.BaseRequest) -> web.StreamResponse:
            skipped = ("host", "content-length")
            headers = {k: v for k, v in request.headers.items() if k.lower() not in skipped}
            body = await request.read()
            async with session.request(request.method, request.path_qs, headers=headers, data=body) as answer:
                if answer.content_length is not None:
                    return web.Response(status=answer.status, body=await answer.read())
                response = web.StreamResponse(status=answer.status)
                await response.prepare(request)
                async for data in answer.content.iter_any():
                    await response.write(data)
                await response.write_eof()
                return response

        kinds: dict[str, Any] = {"direct": Replica, "relay": lambda: Relay(target)}
        make = kinds.get(kind) or web.Server(forward)
        server = await asyncio.get_running_loop().create_server(make, HOST, port, backlog=2048)
        await server.serve_forever()


@contextmanager
def ways() -> Iterator[dict[str, int]]:
    """{path: port} of direct, gateway, both proxies and the relay."""
    ports = {name: free_port() for name in ("direct", "gateway", "fresh", "kept", "relay")}
    with ExitStack() as stack:
        for name, port in ports.items():
            url = f"http://{HOST}:{ports['direct']}"
            command = [sys.executable, __file__, "--serve", name, "--port", port, "--target", ports["direct"]]
            if name == "gateway":
                command = [*FARTHING, "fleet", "gateway", "--replica", url, "--port", port]
            stack.enter_context(running(command, accepts(port)))
        time.sleep(1.0)  # the gateway's first health check
        yield ports


def request(tokens: int = 0, interval: float = 0.0) -> bytes:
    """A chat of 1,000 characters."""
    messages = [{"role": "user", "content": "x" * 1000}]
    body = json.dumps({"model": "m", "messages": messages, "stream": bool(tokens)})
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"x-tokens: {tokens}\r\nx-interval: {interval}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body.encode()


def latency(ports: dict[str, int], requests: int) -> dict[str, dict[str, float]]:
    """Of each path, in ms, interleaved on blocking connections, for the least noise."""

    def timed(name: str) -> tuple[float, float]:
        found = []
        for data, end in ((request(), WHOLE), (request(tokens=3), LAST)):
            began, got, first = time.perf_counter(), b"", 0.0
            sockets[name].sendall(data)
            while not got.endswith(end):
                more = sockets[name].recv(1 << 16)
                first = first or time.perf_counter() - began
                if not more:
                    raise ConnectionError(f"the connection ended after {got[:200]!r}")
                got += more
            found.append((first, time.perf_counter() - began))
        return found[0][1] * 1e3, found[1][0] * 1e3

    sockets = {name: socket.create_connection((HOST, port)) for name, port in ports.items()}
    for each in sockets.values():
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    found = in_turns({name: lambda name=name: timed(name) for name in ports}, requests, WARM)
    return {
        name: {
            f"{kind}_{share}_ms": percentile(values, at)
            for kind, values in zip(("whole", "first_byte"), zip(*each, strict=True), strict=True)
            for share, at in (("p50", 0.5), ("p99", 0.99))
        }
        for name, each in found.items()
    }


async def one_stream(port: int, data: bytes, gaps: list[float]) -> int:
    """Number of tokens received; appends the gaps between reads."""
    reader, writer = await asyncio.open_connection(HOST, port)
    last = time.perf_counter()
    writer.write(data)
    tokens, tail = 0, b""
    while not tail.endswith(LAST):
        got = await reader.read(1 << 16)
        if not got:
            raise ConnectionError("the stream ended early")
        now = time.perf_counter()
        if arrived := got.count(b"data: "):
            if tokens:
                gaps.append(now - last)
            last = now
        tokens += arrived
        tail = (tail + got)[-16:]
    writer.close()
    return tokens


async def streams(port: int, count: int, tokens: int, interval: float) -> dict[str, float]:
    """`count` concurrent streams of `tokens` tokens, one per `interval`."""
    gaps: list[float] = []
    began, data = time.perf_counter(), request(tokens, interval)
    results = await asyncio.gather(
        *(one_stream(port, data, gaps) for _ in range(count)), return_exceptions=True
    )
    taken = time.perf_counter() - began
    return {
        "whole": sum(result == tokens for result in results),
        "tokens_per_s": sum(r for r in results if isinstance(r, int)) / taken,
        "gap_p50_ms": percentile(gaps, 0.5) * 1e3,
        "gap_p99_ms": percentile(gaps, 0.99) * 1e3,
    }


class Endless(asyncio.Protocol):
    """Sends the next request as soon as the answer to the last one is complete."""

    def __init__(self) -> None:
        self.data, self.answered, self.tail = request(), 0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(self.data)

    def data_received(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-len(WHOLE) :]
        if self.tail == WHOLE:
            self.answered, self.tail = self.answered + 1, b""
            self.transport.write(self.data)


async def rate(port: int, connections: int, seconds: float) -> float:
    """Small requests per second over `connections` connections, each with one request in flight."""
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Endless, HOST, port))[1] for _ in range(connections)]
    await asyncio.sleep(0.5)
    before, began = sum(client.answered for client in clients), time.perf_counter()
    await asyncio.sleep(seconds)
    answered, taken = sum(client.answered for client in clients) - before, time.perf_counter() - began
    for client in clients:
        client.transport.close()
    return answered / taken


def measure(a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of each path."""

    def round_of(port: int) -> dict[str, float]:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            small = runner.run(rate(port, a.connections, a.seconds))
        return {"requests_per_s": small} | asyncio.run(streams(port, a.streams, a.tokens, a.interval))

    with ways() as ports:
        found = latency(ports, a.requests)
        rounds = in_turns({name: lambda p=port: round_of(p) for name, port in ports.items()}, a.rounds, 0)
    base = found["direct"]["whole_p50_ms"]
    return {
        name: {"added_p50_ms": found[name]["whole_p50_ms"] - base}
        | found[name]
        | {key: statistics.median(one[key] for one in each) for key in each[0]}
        for name, each in rounds.items()
    }


def main() -> None:
    """Parse, run, print."""
    p = parser(__doc__)
    p.add_argument("--requests", type=int, default=2000)
    p.add_argument("--streams", type=int, default=500)
    p.add_argument("--tokens", type=int, default=60)
    p.add_argument("--interval", type=float, default=0.05, help="seconds between tokens of one stream")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--connections", type=int, default=16, help="of the small requests")
    p.add_argument("--seconds", type=float, default=3.0, help="of small requests, per path and round")
    for hidden in ("--serve", "--port", "--target"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.serve:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve(a.serve, int(a.port), int(a.target)))
    found = measure(a)
    report(
        found, a.json, "medians", ["", *found["direct"]], [(name, *r.values()) for name, r in found.items()]
    )


if __name__ == "__main__":
    main()
