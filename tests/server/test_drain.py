"""Graceful shutdown: running requests may finish until the timeout, then get an error."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import openai
import pytest

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
