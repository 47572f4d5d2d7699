"""An engine that fails: answers while it recovers, and the end of the process where it cannot."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from farthing.engine.core import MOST_FAILURES
from farthing.engine.engine import Engine
from farthing.engine.request import INTERNAL
from farthing.server import run
from farthing.server.config import ServerConfig
from farthing.server.jobs import Job
from farthing.server.run import _serve, listen
from farthing.server.service import Service
from tests.server.harness import running, tiny_engine, until

BODY: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 8, "ignore_eos": True, "temperature": 0}
SECRET = "/secret/path: out of memory"


class Served:
    """A server with everything that `farthing serve` runs, in a thread; its exit status once it ends."""

    def __init__(self, engine: Engine) -> None:
        self.listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.status: int | None = None
        self.thread = threading.Thread(target=self._run, args=(engine,), daemon=True)
        self.thread.start()
        until(lambda: httpx.get(f"{self.url}/ready").status_code == 200)

    def _run(self, engine: Engine) -> None:
        self.status = asyncio.run(_serve(Service(ServerConfig(), "tiny"), lambda _: engine, self.listener))
        self.listener.close()

    def post(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=BODY | fields, timeout=60)


def fail(*_: Any) -> Any:
    raise RuntimeError(SECRET)


def test_process_ends_when_its_engine_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny_engine()
    served = Served(engine)
    assert served.post().status_code == 200
    engine._core.runner.forward = fail  # type: ignore[method-assign]
    for token in range(4, 4 + MOST_FAILURES - 1):
        answer = served.post(prompt=[token])
        assert answer.status_code == 500 and answer.json()["error"]["message"] == INTERNAL
        assert httpx.get(f"{served.url}/ready").status_code == 200
    last = served.post(prompt=[40])
    assert last.status_code == 503 and last.headers["x-error-code"] == "engine_failed"
    assert SECRET not in last.text
    served.thread.join(30)
    assert served.status == 1
    assert "for a supervisor to start another" in caplog.text


def test_process_ends_without_a_step_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, leave = threading.Event(), threading.Event()

    def end(status: int) -> None:
        assert status == 1
        ends.set()
        leave.set()  # here the process would be gone

    monkeypatch.setattr(run, "_PATIENCE", 0.3)
    monkeypatch.setattr(run, "_STOP_SECONDS", 0.3)
    monkeypatch.setattr(run, "_CLOSE_SECONDS", 1)
    monkeypatch.setattr("farthing.server.run.os._exit", end)
    engine = tiny_engine(step_timeout=0.2)
    served = Served(engine)
    forward = engine._core.runner.forward

    def hang(step: Any) -> Any:
        leave.wait(60)
        return forward(step)

    engine._core.runner.forward = hang  # type: ignore[method-assign]
    with ThreadPoolExecutor() as pool:
        pool.submit(served.post)
        assert ends.wait(30)
        served.thread.join(30)
    assert served.status == 1


def test_an_engine_that_recovers_stays() -> None:
    """A step that took too long, as after a suspended machine."""
    engine = tiny_engine(step_timeout=0.2)
    served = Served(engine)
    leave, forward = threading.Event(), engine._core.runner.forward

    def late(step: Any) -> Any:
        leave.wait(60)
        return forward(step)

    engine._core.runner.forward = late  # type: ignore[method-assign]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(served.post)
        until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
        leave.set()
        assert answer.result().status_code == 200
    assert httpx.get(f"{served.url}/ready").status_code == 200 and served.thread.is_alive()
    engine._core.runner.forward = fail  # type: ignore[method-assign]
    for token in range(4, 4 + MOST_FAILURES):
        served.post(prompt=[token])
    served.thread.join(30)
    assert served.status == 1


APIS = pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", BODY),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 4}),
        ("/v1/messages", {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}),
        ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}),
        ("/api/generate", {"model": "tiny", "prompt": "x", "options": {"num_predict": 4}}),
    ],
)


@APIS
@pytest.mark.parametrize("stream", [False, True])
def test_one_failed_step_is_one_500_in_every_api(path: str, body: dict[str, Any], stream: bool) -> None:
    """And the next request is answered."""
    with running(tiny_engine(max_model_len=256)) as server:
        core = server.service.engine._core  # type: ignore[union-attr]
        forward = core.runner.forward
        core.runner.forward = fail  # type: ignore[method-assign]
        answer = httpx.post(server.url + path, json=body | {"stream": stream}, timeout=60)
        assert answer.status_code == 500 and SECRET not in answer.text and INTERNAL in answer.text
        core.runner.forward = forward  # type: ignore[method-assign]
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert httpx.post(server.url + path, json=body | {"stream": stream}, timeout=60).status_code == 200


@APIS
def test_an_exception_within_a_stream_ends_it_with_an_error(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every API, as an event that clients read as an error and that names nothing internal."""
    received, count = Job._received, 0

    def third(job: Job, output: Any) -> None:
        nonlocal count
        count += 1
        fail() if count == 3 else received(job, output)

    monkeypatch.setattr(Job, "_received", third)
    with running(tiny_engine(max_model_len=256)) as server:
        answer = httpx.post(server.url + path, json=body | {"stream": True}, timeout=60)
        assert answer.status_code == 200 and SECRET not in answer.text
        last = [line for line in answer.text.splitlines() if line and line != "data: [DONE]"][-1]
        assert INTERNAL in last and "error" in last
        until(lambda: not server.service.jobs and not server.service.engine.num_live)  # type: ignore[union-attr]
