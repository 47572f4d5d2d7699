"""The cost of HTTP: tokens per second of the engine alone and through `farthing serve`, interleaved.

Both run the same model on the same number of threads, each in its own process; this process is the client.
The limit is the engine alone, with its outputs consumed from an event loop and discarded. Every stream has
one server-sent event per token.

    python bench/server.py [MODEL] [--packed FILE] [--streams 1 16 64] [--tokens 128] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from typing import Any

HOST = "127.0.0.1"


def body(number: int, tokens: int) -> dict[str, Any]:
    """A request that always runs to its full length, with a unique prompt."""
    return {
        "prompt": f"# {number}\ndef function_{number}(value):\n",
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }


# ---- the engine alone: a child that takes "STREAMS TOKENS FIRST" a line and answers seconds ----


def engine_child(model: str, threads: int, packed: str | None) -> None:
    """Main function of the child process."""
    from farthing.config import EngineConfig
    from farthing.engine.build import build_engine
    from farthing.engine.request import SamplingParams

    engine = build_engine(EngineConfig(model=model, threads=threads, packed=packed, max_model_len=2048))

    async def one(number: int, tokens: int) -> int:
        fields = body(number, tokens)
        prompt = fields.pop("prompt")
        return sum(
            [len(o.outputs[0].token_ids) async for o in engine.submit(prompt, SamplingParams(**fields))]
        )

    async def run(streams: int, tokens: int, first: int) -> float:
        started = time.perf_counter()
        counts = await asyncio.gather(*(one(first + i, tokens) for i in range(streams)))
        assert counts == [tokens] * streams
        return time.perf_counter() - started

    gc.freeze()  # as the server does
    print("ready", flush=True)
    for line in sys.stdin:
        print(asyncio.run(run(*map(int, line.split()))), flush=True)


# ---- through HTTP ----


class Stream(asyncio.Protocol):
    """One request, read until [DONE]."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.end = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        payload = json.dumps(self.fields | {"stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)

    def data_received(self, data: bytes) -> None:
        self.end = self.end[-1000:] + data  # the marker may be split
        if b"data: [DONE]" in self.end and not self.done.done():
            self.done.set_result(None)
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(
                ConnectionError(f"the server closed the connection: {self.end.decode(errors='replace')}")
            )


async def through_http(port: int, streams: int, tokens: int, first: int) -> float:
    """Seconds for all streams."""
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    made = [
        await loop.create_connection(lambda i=i: Stream(body(first + i, tokens)), HOST, port)  # type: ignore[misc]
        for i in range(streams)
    ]
    await asyncio.gather(*(protocol.done for _, protocol in made))
    return time.perf_counter() - started


def start(
    model: str, threads: int, packed: str | None
) -> tuple[subprocess.Popen[str], subprocess.Popen[str], int]:
    """(the engine's process, the server's process, its port), both ready."""
    options = ["--threads", str(threads), *(["--packed", packed] if packed else [])]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = [sys.executable, __file__, model, *options, "--child"]
    engine = subprocess.Popen(child, stderr=subprocess.DEVNULL, **pipes)
    assert engine.stdout is not None and engine.stdout.readline() == "ready\n"
    command = [sys.executable, "-m", "farthing.cli.app", "serve", model, "--port", "0", *options]
    command += ["--max-model-len", "2048"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    port = 0
    for line in server.stderr:
        if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
        if "ready after" in line:
            return engine, server, port
    raise RuntimeError("the server exited before it was ready")


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    """User and system time of a process (Linux)."""
    with open(f"/proc/{process.pid}/stat") as file:  # noqa: PTH123
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def peak_memory(process: subprocess.Popen[str]) -> int:
    """Peak resident bytes, including mapped files (Linux)."""
    with open(f"/proc/{process.pid}/status") as file:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def measure(
    engine: subprocess.Popen[str],
    server: subprocess.Popen[str],
    port: int,
    streams: int,
    tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Medians over interleaved rounds after a warm-up round."""
    assert engine.stdin is not None and engine.stdout is not None
    seconds: dict[str, list[float]] = {"engine": [], "http": []}
    cpu: dict[str, list[float]] = {"engine": [], "http": []}
    for number in range(rounds + 1):
        first = 1_000_000 * streams + 1_000 * number
        before = cpu_seconds(engine)
        engine.stdin.write(f"{streams} {tokens} {first}\n")
        engine.stdin.flush()
        alone = float(engine.stdout.readline())
        alone_cpu = cpu_seconds(engine) - before
        before = cpu_seconds(server)
        http = asyncio.run(through_http(port, streams, tokens, first))
        http_cpu = cpu_seconds(server) - before
        if number:
            seconds["engine"].append(alone)
            seconds["http"].append(http)
            cpu["engine"].append(alone_cpu)
            cpu["http"].append(http_cpu)
    total = streams * tokens
    rate = {name: total / statistics.median(values) for name, values in seconds.items()}
    cost = {name: statistics.median(values) / total * 1e6 for name, values in cpu.items()}
    ratio = statistics.median(h / e for h, e in zip(seconds["http"], seconds["engine"], strict=True))
    return {
        "streams": streams,
        "engine_tokens_per_s": round(rate["engine"], 1),
        "http_tokens_per_s": round(rate["http"], 1),
        "slower_percent": round((ratio - 1) * 100, 2),
        "engine_cpu_us_per_token": round(cost["engine"], 1),
        "http_cpu_us_per_token": round(cost["http"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="mite")
    parser.add_argument("--packed", metavar="FILE", help="the model's packed file")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        engine_child(options.model, options.threads, options.packed)
        return
    engine, server, port = start(options.model, options.threads, options.packed)
    try:
        rows = [measure(engine, server, port, n, options.tokens, options.rounds) for n in options.streams]
        print(f"server: at most {peak_memory(server) / 1e6:.0f} MB resident", file=sys.stderr)
    finally:
        for process in (engine, server):
            process.terminate()
            process.wait(60)
    if options.json:
        print(json.dumps({"model": options.model, "threads": options.threads, "rows": rows}))
        return
    titles = ("streams", "engine tok/s", "HTTP tok/s", "slower %", "engine CPU us/tok", "HTTP CPU us/tok")
    print("".join(f"{title:>19}" for title in titles))
    for row in rows:
        print("".join(f"{value:>19}" for value in row.values()))


if __name__ == "__main__":
    main()
