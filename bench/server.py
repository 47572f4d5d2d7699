"""The cost of HTTP: tokens per second of the engine alone and through `farthing serve`, interleaved.

Both run the same model on the same number of threads, each in its own process; this process is the client.
The limit is the engine alone, with its outputs consumed from an event loop and discarded. Every stream has
one server-sent event per token.

    python bench/server.py [MODEL] [--packed FILE] [--streams 1 16 64] [--tokens 128] [--rounds 5] [--json]
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import harness
from harness import FARTHING, HOST, cpu_seconds, in_turns, log, medians, parser, report


def body(number: int, tokens: int) -> dict[str, Any]:
    """A request that always runs to its full length, with a unique prompt."""
    return {
        "prompt": f"# {number}\ndef function_{number}(value):\n",
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }


def engine_child(model: str, threads: int, packed: str | None) -> None:
    """The engine alone, in a child process: takes "STREAMS TOKENS FIRST" a line and answers seconds."""
    from farthing.config import EngineConfig
    from farthing.engine.build import build_engine
    from farthing.engine.request import SamplingParams

    engine = build_engine(EngineConfig(model=model, threads=threads, packed=packed, max_model_len=2048))

    async def one(number: int, tokens: int) -> int:
        fields = body(number, tokens)
        outputs = engine.submit(fields.pop("prompt"), SamplingParams(**fields))
        return sum([len(output.outputs[0].token_ids) async for output in outputs])

    async def run(streams: int, tokens: int, first: int) -> float:
        started = time.perf_counter()
        counts = await asyncio.gather(*(one(first + i, tokens) for i in range(streams)))
        assert counts == [tokens] * streams
        return time.perf_counter() - started

    gc.freeze()  # as the server does
    print("ready", flush=True)
    for line in sys.stdin:
        print(asyncio.run(run(*map(int, line.split()))), flush=True)


class Stream(asyncio.Protocol):
    """One request, read until [DONE]."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields, self.end = fields, b""
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
            self.done.set_exception(ConnectionError(f"the server closed the connection: {self.end!r}"))


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


def measure(engine: Any, server: Any, port: int, streams: int, tokens: int, rounds: int) -> dict[str, float]:
    """Medians over interleaved rounds after a warm-up round."""
    numbers = itertools.count(1_000_000 * streams, 1_000)

    def alone() -> tuple[float, float]:
        before = cpu_seconds(engine.pid)
        engine.stdin.write(f"{streams} {tokens} {next(numbers)}\n")
        engine.stdin.flush()
        return float(engine.stdout.readline()), cpu_seconds(engine.pid) - before

    def http() -> tuple[float, float]:
        before = cpu_seconds(server.pid)
        seconds = asyncio.run(through_http(port, streams, tokens, next(numbers)))
        return seconds, cpu_seconds(server.pid) - before

    found = in_turns({"engine": alone, "http": http}, rounds)
    seconds = {name: [wall for wall, _ in each] for name, each in found.items()}
    cost = medians({name: [cpu for _, cpu in each] for name, each in found.items()})
    rate, total = medians(seconds), streams * tokens
    ratio = statistics.median(h / e for h, e in zip(seconds["http"], seconds["engine"], strict=True))
    return {
        "streams": streams,
        **{f"{name}_tokens_per_s": total / rate[name] for name in rate},
        "slower_percent": (ratio - 1) * 100,
        **{f"{name}_cpu_us_per_token": cost[name] / total * 1e6 for name in cost},
    }


def main() -> None:
    """Parse, run, print."""
    p = parser(__doc__)
    p.add_argument("model", nargs="?", default="mite")
    p.add_argument("--packed", metavar="FILE", help="the model's packed file")
    p.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--child", action="store_true")
    a = p.parse_args()
    if a.child:
        engine_child(a.model, a.threads, a.packed)
        return
    options = [a.model, "--threads", a.threads, *(["--packed", a.packed] if a.packed else [])]
    port, pipes = harness.free_port(), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = subprocess.Popen([str(w) for w in (sys.executable, __file__, *options, "--child")], **pipes)  # type: ignore[call-overload]
    serve = [*FARTHING, "serve", *options, "--port", port, "--max-model-len", 2048]
    try:
        assert child.stdout.readline() == "ready\n"
        with harness.running(serve, harness.answers(port), stderr=subprocess.DEVNULL) as server:
            rows = [measure(child, server, port, n, a.tokens, a.rounds) for n in a.streams]
            log.print(f"server: {harness.resident(server.pid) / 1e6:.0f} MB resident")
    finally:
        child.kill()
    report({"model": a.model, "rows": rows}, a.json, a.model, list(rows[0]), [list(r.values()) for r in rows])


if __name__ == "__main__":
    main()
