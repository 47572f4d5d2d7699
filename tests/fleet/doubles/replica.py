"""A fake inference server: OpenAI's API, health, and metrics with vLLM's, SGLang's or Farthing's names.

In a test: `async with FakeReplica() as replica:`. As a process: `python replica.py --port P
[--ready-after S] …`. All reported metrics are real, except those set by `PUT /_signals`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

_NAMES = {
    "vllm": {
        "running": "vllm:num_requests_running",
        "waiting": "vllm:num_requests_waiting",
        "kv": "vllm:kv_cache_usage_perc",
        "prompt": "vllm:prompt_tokens_total",
        "output": "vllm:generation_tokens_total",
        "queue": "vllm:request_queue_time_seconds",
        "ttft": "vllm:time_to_first_token_seconds",
        "tpot": "vllm:inter_token_latency_seconds",
        "e2e": "vllm:e2e_request_latency_seconds",
    },
    "sglang": {
        "running": "sglang:num_running_reqs",
        "waiting": "sglang:num_queue_reqs",
        "kv": "sglang:token_usage",
        "prompt": "sglang:prompt_tokens_total",
        "output": "sglang:generation_tokens_total",
        "ttft": "sglang:time_to_first_token_seconds",
        "e2e": "sglang:e2e_request_latency_seconds",
    },
}
_NAMES["farthing"] = {key: name.replace("vllm:", "farthing:") for key, name in _NAMES["vllm"].items()}


BOUND_S = 2.0  # of the only finite bucket of the times to the first and between tokens


class FakeReplica:
    """The server. `tokens` are sent `interval_s` apart; `fail_after` tokens it cuts the connection."""

    def __init__(
        self,
        port: int = 0,
        *,
        dialect: str = "vllm",
        tokens: int = 3,
        interval_s: float = 0.0,
        ready_after_s: float = 0.0,
        name: str = "fake",
        models: Sequence[str] = ("m",),
    ) -> None:
        self.port, self.dialect, self.tokens, self.interval_s = port, dialect, tokens, interval_s
        self.slots: asyncio.Semaphore | None = None  # requests that run at once; others wait. None: all run
        self.ready_at = time.monotonic() + ready_after_s
        self.name, self.models = name, list(models)
        self.key = ""  # without which /v1/models is a 401
        self.dies_of = ""  # text in a request that kills the process; empty: none
        self.dies_late = False  # after the first byte of a stream
        self.digest: Any = None  # the response of /cache/digest; None: 404
        self.stuck = False  # only health checks are answered
        self.fail_after: int | None = None  # tokens
        self.status = 200  # status of completions
        self.extra: dict[str, str] = {}  # headers of completions with another status
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.disconnects = 0
        self.running = 0
        self.signals: dict[str, float] = {"waiting": 0.0, "kv": 0.0}
        self.totals = {"prompt": 0.0, "output": 0.0}
        self.sums = {key: [0.0, 0.0] for key in ("queue", "ttft", "tpot", "e2e")}  # [sum, count]
        self.late = 0.0  # of the first tokens in `sums`, those after BOUND_S
        self.late_tokens = 0.0  # of the others
        self._runner: web.AppRunner | None = None

    # ---- lifecycle ------------------------------------------------------------------------------------
    async def __aenter__(self) -> FakeReplica:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/cache/digest", self._digest)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/messages", self._complete)
        app.router.add_post("/v1/responses", self._complete)
        app.router.add_put("/_signals", self._set_signals)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # ---- handlers --------------------------------------------------------------------------------
    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({}, status=200 if time.monotonic() >= self.ready_at else 503)

    async def _models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        entries = [{"id": name, "object": "model", "owned_by": self.name} for name in self.models]
        return web.json_response({"object": "list", "data": entries})

    async def _digest(self, request: web.Request) -> web.Response:
        if self.digest is None:
            return web.Response(status=404)
        return web.json_response(self.digest)

    async def _set_signals(self, request: web.Request) -> web.Response:
        """Set gauges ("waiting", "kv") or add to sums and totals ("queue": [seconds, requests],
        "prompt": tokens).
        """
        for key, value in (await request.json()).items():
            if key in self.sums:
                self.sums[key][0] += value[0]
                self.sums[key][1] += value[1]
            elif key in self.totals:
                self.totals[key] += value
            else:
                self.signals[key] = value
        return web.Response(status=204)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not self.dies_late:
            await self._maybe_die(body)
        while self.stuck:
            await asyncio.sleep(0.05)
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        if self.status != 200:
            document = {"error": {"message": "set by the test"}}
            return web.json_response(document, status=self.status, headers=self.extra)
        arrived = time.monotonic()
        async with self._slot():
            return await self._run(request, body, arrived)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        if self.slots is None:
            yield
            return
        self.signals["waiting"] += 1
        try:
            await self.slots.acquire()
        finally:
            self.signals["waiting"] -= 1
        try:
            yield
        finally:
            self.slots.release()

    async def _run(self, request: web.Request, body: dict[str, Any], arrived: float) -> web.StreamResponse:
        self.running += 1
        start = time.monotonic()
        try:
            response = await (
                self._stream(request, body) if body.get("stream") else self._whole(request, body)
            )
            self._account(start, body, start - arrived)
            return response
        except (asyncio.CancelledError, ConnectionResetError):
            self.disconnects += 1
            raise
        finally:
            self.running -= 1

    async def _maybe_die(self, body: dict[str, Any]) -> None:
        if self.dies_of and self.dies_of in json.dumps(body):
            await asyncio.sleep(0.2)  # so that others are in flight
            os.kill(os.getpid(), signal.SIGKILL)

    def _account(self, start: float, body: dict[str, Any], queued: float) -> None:
        self.totals["prompt"] += len(json.dumps(body)) // 4
        self.totals["output"] += self.tokens
        took = time.monotonic() - start
        for key, seconds in (
            ("queue", queued),
            ("ttft", queued + self.interval_s),
            ("tpot", self.interval_s),
            ("e2e", took),
        ):
            self.sums[key][0] += seconds
            self.sums[key][1] += 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for index in range(self.tokens):
            await self._pace(request, index)
            event = {"choices": [{"index": 0, "delta": {"content": f"t{index} "}}], "model": self.name}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await self._maybe_die(body)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _whole(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        for index in range(self.tokens):
            await self._pace(request, index)
        text = "".join(f"t{index} " for index in range(self.tokens))
        return web.json_response(
            {"model": self.name, "choices": [{"message": {"role": "assistant", "content": text}}]}
        )

    async def _pace(self, request: web.Request, index: int) -> None:
        if self.fail_after is not None and index >= self.fail_after:
            assert request.transport is not None
            request.transport.abort()  # type: ignore[attr-defined]
            await asyncio.sleep(0)
            raise ConnectionResetError
        if self.interval_s:
            await asyncio.sleep(self.interval_s)

    async def _metrics(self, request: web.Request) -> web.Response:
        names = _NAMES[self.dialect]
        lines: list[str] = []

        def put(key: str, kind: str, *samples: tuple[str, float]) -> None:
            if key in names:
                base = names[key].removesuffix("_total") if kind == "counter" else names[key]
                lines.append(f"# TYPE {base} {kind}")
                lines.extend(
                    f'{names[key]}{suffix}{{model_name="{self.name}"}} {value}' for suffix, value in samples
                )

        put("running", "gauge", ("", float(self.running)))
        put("waiting", "gauge", ("", self.signals["waiting"]))
        put("kv", "gauge", ("", self.signals["kv"]))
        put("prompt", "counter", ("", self.totals["prompt"]))
        put("output", "counter", ("", self.totals["output"]))
        for key, (total, count) in self.sums.items():
            put(key, "histogram", ("_sum", total), ("_count", count))
        for key, late in (("ttft", self.late), ("tpot", self.late_tokens)):
            if name := names.get(key):
                total, labels = self.sums[key][1], f'model_name="{self.name}"'
                for bound, count in ((str(BOUND_S), total - late), ("+Inf", total)):
                    lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {count}')
        return web.Response(
            text="\n".join(lines) + "\n", headers={"content-type": "text/plain; version=0.0.4"}
        )


async def _main(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    if arguments.die_at_start:
        print("fake replica: told to die at start", file=sys.stderr)
        sys.exit(3)
    replica = FakeReplica(
        arguments.port,
        dialect=arguments.dialect,
        tokens=arguments.tokens,
        interval_s=arguments.interval,
        ready_after_s=arguments.ready_after,
        name=arguments.name or f"pid-{os.getpid()}",
        models=(arguments.model,),
    )
    replica.slots = asyncio.Semaphore(arguments.slots) if arguments.slots else None
    replica.dies_of, replica.dies_late = arguments.dies_of, arguments.dies_late
    await replica.start()
    await stop.wait()
    while replica.running:  # drain
        await asyncio.sleep(0.02)
    await replica.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dialect", default="vllm")
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--ready-after", type=float, default=0.0)
    parser.add_argument("--name", default="")
    parser.add_argument("--model", default="m")
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--dies-of", default="")
    parser.add_argument("--dies-late", action="store_true")
    parser.add_argument("--die-at-start", action="store_true")
    asyncio.run(_main(parser.parse_args()))
