"""The gateway's cost: time added to a request, small requests per second, and 500 concurrent streams,
directly and through the gateway, interleaved.

Replica, gateway and relays are separate processes on loopback; this process is the client. The gateway is
compared with nginx (the peer, if installed), with a Python relay that forwards bytes without parsing them
(the limit for one more process in the same language), and with a proxy of a few lines on aiohttp, the
gateway's HTTP library: `kept` reuses its connections to the replica, as the gateway does, and `fresh` opens
one per request.

    python bench/gateway.py [--requests 2000] [--streams 500] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from farthing.process import loop_factory
from farthing_lab.demo.levers import free_port

TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"tok"}}]}\n\n'
HOST = "127.0.0.1"


# ---- the processes under test ----


class Replica(asyncio.Protocol):
    """A server with almost no overhead; the request's `x-tokens: N` and `x-interval: S` select its answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            length = _field(head, b"content-length", 0)
            if len(rest) < length:
                return
            self.buffer = rest[int(length) :]
            tokens = int(_field(head, b"x-tokens", 0))
            if tokens:
                self.task = asyncio.ensure_future(self.stream(tokens, _field(head, b"x-interval", 0)))
            else:
                self.transport.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n"
                    + b'{"status":"ok"}'
                )

    async def stream(self, tokens: int, interval: float) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for _ in range(tokens):
            self.transport.write(b"%x\r\n%s\r\n" % (len(TOKEN), TOKEN))
            if interval:
                await asyncio.sleep(interval)
        self.transport.write(b"0\r\n\r\n")


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
        self.early.clear()

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()


async def _serve(port: int, target: int | None) -> None:
    loop = asyncio.get_running_loop()
    make = (lambda: Relay(target)) if target is not None else Replica
    server = await loop.create_server(make, HOST, port, backlog=2048)
    await server.serve_forever()


async def _forward(port: int, target: int, fresh: bool) -> None:
    """Proxy requests with aiohttp and nothing else. fresh: a connection to the replica per request."""
    connector = aiohttp.TCPConnector(limit=0, force_close=fresh)
    async with aiohttp.ClientSession(f"http://{HOST}:{target}", connector=connector) as session:

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            headers = {
                k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")
            }
            body = await request.read()
            async with session.request(request.method, request.path_qs, headers=headers, data=body) as answer:
                length = answer.content_length
                if length is not None:
                    return web.Response(status=answer.status, body=await answer.read())
                response = web.StreamResponse(status=answer.status)
                await response.prepare(request)
                async for data in answer.content.iter_any():
                    await response.write(data)
                await response.write_eof()
                return response

        server = await asyncio.get_running_loop().create_server(web.Server(handle), HOST, port, backlog=2048)
        await server.serve_forever()


NGINX = """
worker_processes 1; daemon off; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {dir}/a; proxy_temp_path {dir}/b; fastcgi_temp_path {dir}/c; uwsgi_temp_path {dir}/d;
  scgi_temp_path {dir}/e;
  upstream replica {{ server {host}:{target}; keepalive 600; }}
  server {{ listen {host}:{port} backlog=2048; keepalive_requests 1000000;
    location / {{ proxy_pass http://replica; proxy_http_version 1.1; proxy_set_header Connection "";
    proxy_buffering off; }} }} }}
"""


@contextmanager
def process(command: list[str], port: int, folder: Path) -> Iterator[int]:
    """A server process, ready once its port accepts connections; stopped at the end of the block."""
    with (folder / f"{port}.log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection((HOST, port), 1).close()
                break
            except OSError:
                if child.poll() is not None:
                    raise RuntimeError(f"{command} ended: {(folder / f'{port}.log').read_text()}") from None
                time.sleep(0.05)
        yield port
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def ways(folder: Path) -> Iterator[dict[str, int]]:
    """{path: port} for direct, gateway, relay, and nginx if installed."""
    with ExitStack() as stack:
        ports = {name: free_port() for name in ("direct", "gateway", "fresh", "kept", "relay", "nginx")}
        me = [sys.executable, __file__]
        stack.enter_context(process([*me, "--serve", str(ports["direct"])], ports["direct"], folder))
        url = f"http://{HOST}:{ports['direct']}"
        gateway = [sys.executable, "-m", "farthing.cli.app", "fleet", "gateway", "--replica", url, "--port"]
        stack.enter_context(process([*gateway, str(ports["gateway"])], ports["gateway"], folder))
        relay = [*me, "--serve", str(ports["relay"]), "--target", str(ports["direct"])]
        stack.enter_context(process(relay, ports["relay"], folder))
        for name in ("fresh", "kept"):
            proxy = [*me, "--serve", str(ports[name]), "--target", str(ports["direct"]), "--proxy", name]
            stack.enter_context(process(proxy, ports[name], folder))
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        if os.access(nginx, os.X_OK):
            config = NGINX.format(dir=folder, host=HOST, port=ports["nginx"], target=ports["direct"])
            (folder / "nginx.conf").write_text(config)
            command = [nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)]
            stack.enter_context(process(command, ports["nginx"], folder))
        else:
            del ports["nginx"]
        time.sleep(1.0)  # the gateway's first health check
        yield ports


# ---- the client ----


def request(tokens: int = 0, interval: float = 0.0) -> bytes:
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "x" * 1000}], "stream": bool(tokens)}
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"x-tokens: {tokens}\r\nx-interval: {interval}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body.encode()


class Connection:
    """A blocking client connection, for the least noise."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection((HOST, port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def timed(self, data: bytes, until: bytes) -> tuple[float, float]:
        """(seconds to the first byte, seconds to the last)."""
        began = time.perf_counter()
        self.sock.sendall(data)
        got = self.sock.recv(1 << 16)
        first = time.perf_counter() - began
        while not got.endswith(until):
            more = self.sock.recv(1 << 16)
            if not more:
                raise ConnectionError(f"the connection ended after {got[:200]!r}")
            got += more
        return first, time.perf_counter() - began


def latency(ports: dict[str, int], requests: int) -> dict[str, dict[str, float]]:
    """Median and P99 per path of a complete answer and of a stream's first byte, in ms, interleaved."""
    connections = {name: Connection(port) for name, port in ports.items()}
    whole: dict[str, list[float]] = {name: [] for name in ports}
    first: dict[str, list[float]] = {name: [] for name in ports}
    plain, stream = request(), request(tokens=3)
    for turn in range(requests + 50):
        for name, connection in connections.items():
            taken = connection.timed(plain, b'{"status":"ok"}')[1]
            began = connection.timed(stream, b"0\r\n\r\n")[0]
            if turn >= 50:  # after the warm-up
                whole[name].append(taken * 1e3)
                first[name].append(began * 1e3)
    return {
        name: {
            "whole_p50_ms": statistics.median(whole[name]),
            "whole_p99_ms": statistics.quantiles(whole[name], n=100)[98],
            "first_byte_p50_ms": statistics.median(first[name]),
            "first_byte_p99_ms": statistics.quantiles(first[name], n=100)[98],
        }
        for name in ports
    }


async def one_stream(port: int, data: bytes, gaps: list[float], firsts: list[float]) -> int:
    """Number of tokens received; appends the time to the first and the gaps between reads."""
    reader, writer = await asyncio.open_connection(HOST, port)
    began = last = time.perf_counter()
    writer.write(data)
    tokens, tail = 0, b""
    while not tail.endswith(b"0\r\n\r\n"):
        got = await reader.read(1 << 16)
        if not got:
            raise ConnectionError("the stream ended early")
        now = time.perf_counter()
        arrived = got.count(b"data: ")
        if arrived:
            (gaps if tokens else firsts).append(now - last)
            last = now
        tokens += arrived
        tail = (tail + got)[-16:]
    writer.close()
    return tokens if began else 0


async def streams(port: int, count: int, tokens: int, interval: float) -> dict[str, float]:
    """`count` concurrent streams of `tokens` tokens, one per `interval`."""
    gaps: list[float] = []
    firsts: list[float] = []
    began = time.perf_counter()
    data = request(tokens, interval)
    results = await asyncio.gather(
        *(one_stream(port, data, gaps, firsts) for _ in range(count)), return_exceptions=True
    )
    taken = time.perf_counter() - began
    whole = sum(result == tokens for result in results)
    return {
        "whole": whole,
        "seconds": taken,
        "tokens_per_s": sum(r for r in results if isinstance(r, int)) / taken,
        "first_token_p50_ms": statistics.median(firsts) * 1e3 if firsts else float("nan"),
        "gap_p50_ms": statistics.median(gaps) * 1e3 if gaps else float("nan"),
        "gap_p99_ms": statistics.quantiles(gaps, n=100)[98] * 1e3 if len(gaps) > 2 else float("nan"),
    }


class Endless(asyncio.Protocol):
    """Sends the next request as soon as the answer to the last one is complete."""

    def __init__(self, data: bytes) -> None:
        self.data, self.answered, self.tail = data, 0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(self.data)

    def data_received(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-15:]
        if self.tail == b'{"status":"ok"}':
            self.answered, self.tail = self.answered + 1, b""
            self.transport.write(self.data)


async def rate(port: int, connections: int, seconds: float) -> float:
    """Small requests per second over `connections` connections, each with one request in flight."""
    loop = asyncio.get_running_loop()
    clients = [Endless(request()) for _ in range(connections)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, HOST, port)  # type: ignore[misc]
    await asyncio.sleep(0.5)
    before, began = sum(client.answered for client in clients), time.perf_counter()
    await asyncio.sleep(seconds)
    answered, taken = sum(client.answered for client in clients) - before, time.perf_counter() - began
    for client in clients:
        client.transport.close()
    return answered / taken


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, ways(Path(folder)) as ports:
        result: dict[str, Any] = {"latency": latency(ports, arguments.requests)}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
        for _ in range(arguments.rounds):
            for name, port in ports.items():
                with asyncio.Runner(loop_factory=loop_factory()) as runner:
                    result.setdefault("rates", {}).setdefault(name, []).append(
                        runner.run(rate(port, arguments.connections, arguments.seconds))
                    )
                runs[name].append(
                    asyncio.run(streams(port, arguments.streams, arguments.tokens, arguments.interval))
                )
        result["streams"] = {
            name: {key: statistics.median(run[key] for run in many) for key in many[0]}
            for name, many in runs.items()
        }
    direct, gateway = (result["latency"][name] for name in ("direct", "gateway"))
    result["added_ms"] = {key: gateway[key] - direct[key] for key in direct}
    return result


def show(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    print(f"one connection, {arguments.requests} requests per path, interleaved (ms)")
    print(f"{'':10}{'whole p50':>11}{'p99':>8}{'first byte p50':>17}{'p99':>8}{'added p50':>12}")
    base = result["latency"]["direct"]["whole_p50_ms"]
    for name, row in result["latency"].items():
        print(
            f"{name:10}{row['whole_p50_ms']:11.3f}{row['whole_p99_ms']:8.3f}{row['first_byte_p50_ms']:17.3f}"
            f"{row['first_byte_p99_ms']:8.3f}{row['whole_p50_ms'] - base:12.3f}"
        )
    print(f"\nsmall requests/s over {arguments.connections} connections, every round")
    for name, rates in result["rates"].items():
        print(f"{name:10}" + "".join(f"{each:9,.0f}" for each in rates))
    offered = arguments.streams / arguments.interval if arguments.interval else float("inf")
    print(
        f"\n{arguments.streams} streams of {arguments.tokens} tokens, {offered:,.0f} tokens/s offered, median"
    )
    print(f"{'':10}{'whole':>7}{'tokens/s':>10}{'first token p50':>17}{'gap p50':>10}{'gap p99':>10}  (ms)")
    for name, row in result["streams"].items():
        print(
            f"{name:10}{row['whole']:7.0f}{row['tokens_per_s']:10,.0f}{row['first_token_p50_ms']:17.1f}"
            f"{row['gap_p50_ms']:10.1f}{row['gap_p99_ms']:10.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between tokens of one stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16, help="of the small requests")
    parser.add_argument("--seconds", type=float, default=3.0, help="of small requests, per path and round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--proxy", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.proxy:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_forward(arguments.serve, arguments.target, arguments.proxy == "fresh"))
    if arguments.serve:
        asyncio.run(_serve(arguments.serve, arguments.target))
        return
    result = measure(arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, arguments)


if __name__ == "__main__":
    main()
