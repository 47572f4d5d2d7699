"""Graceful shutdown: running requests may finish until the timeout, then get an error."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from typing import Any

import httpx
import openai
import pytest

from farthing.process import loop_factory
from farthing.server.config import ServerConfig
from farthing.server.run import listen, make_server
from farthing.server.service import Service
from tests.server.harness import ScriptedEngine, running, until


def test_running_answers_finish_and_new_requests_are_rejected() -> None:
    with running(ScriptedEngine(["a"] * 20, step=0.03), drain_timeout=20) as server:
        stream = server.client().completions.create(model="tiny", prompt="x", stream=True)
        next(iter(stream))
        server.call(server.server.begin_drain)
        until(lambda: server.service.draining)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert sum(len(chunk.choices[0].text) for chunk in chunks) == 19
        server.thread.join(10)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("streamed", [True, False])
def test_remaining_requests_get_an_error_after_the_timeout(streamed: bool) -> None:
    engine = ScriptedEngine(["a"], step=0.01, forever=True)
    with running(engine, drain_timeout=0.2) as server:
        seen: list[Any] = []

        def ask() -> None:
            try:
                answer = server.client().completions.create(model="tiny", prompt="x", stream=streamed)
                seen.extend(answer if streamed else [answer])
            except openai.APIError as error:
                seen.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: engine.running)
        server.call(server.server.begin_drain)
        asking.join(20)
        assert isinstance(seen[-1], openai.APIError) and seen[-1].code == "shutdown"
        assert "shut down before the answer ended" in seen[-1].message
        server.thread.join(10)
        assert not server.thread.is_alive() and engine.cancelled


def test_idle_server_stops_immediately() -> None:
    with running(ScriptedEngine(), drain_timeout=60) as server:
        server.call(server.server.begin_drain)
        server.thread.join(10)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_second_signal_ends_without_a_traceback(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    engine = ScriptedEngine(["a"], step=0.01, forever=True)
    service = Service(ServerConfig(drain_timeout=60), "tiny")
    service.engine = engine  # type: ignore[assignment]
    server = make_server(service)

    async def end() -> None:
        with listen("127.0.0.1", 0) as listener:
            serving = asyncio.ensure_future(server.serve([listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            _, writer = await asyncio.open_connection(*listener.getsockname())
            body = b'{"prompt": "x"}'
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            while not engine.running:
                await asyncio.sleep(0.01)
            for _ in range(2):
                server.handle_exit(signal.SIGTERM, None)
                await asyncio.sleep(0.05)
            await serving
            writer.close()

    with asyncio.Runner(loop_factory=loop_factory() if loop == "uvloop" else None) as runner:
        runner.run(end())
    engine.shutdown()
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
