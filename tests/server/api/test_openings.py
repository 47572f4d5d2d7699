"""Streams open before the first output, and stay alive while the model computes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from farthing.engine.request import QueueFull, RequestStream
from farthing.server.errors import OPENING_HEADER
from tests.server.harness import ScriptedEngine, running

USER = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/messages": {"messages": USER, "max_tokens": 9, "stream": True},
    "/v1/responses": {"input": "hi", "stream": True},
    "/v1/chat/completions": {"messages": USER, "stream": True},
    "/v1/completions": {"prompt": "hi", "stream": True},
}
OPENINGS = {
    "/v1/messages": ["message_start", "ping"],
    "/v1/responses": ["response.created", "response.in_progress"],
}
NEVER = 1000.0  # seconds before the first output


def lines(url: str, path: str) -> Iterator[str]:
    """The lines of a stream that are not empty."""
    with httpx.stream("POST", url + path, json=BODIES[path], timeout=30) as answer:
        assert answer.status_code == 200
        yield from filter(None, answer.iter_lines())


@pytest.mark.parametrize("path", OPENINGS)
def test_a_stream_opens_before_the_first_output(path: str) -> None:
    engine = ScriptedEngine(step=NEVER)
    with running(engine, keep_alive=0.01) as server:
        seen = []
        stream = lines(server.url, path)
        for line in stream:
            if line.startswith("event: "):
                seen.append(line.removeprefix("event: "))
            if seen[:2] == OPENINGS[path]:
                break
        stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_stays_alive(path: str) -> None:
    with running(ScriptedEngine(step=NEVER), keep_alive=0.01) as server:
        alive = "event: ping" if path == "/v1/messages" else ": keep-alive"
        stream = lines(server.url, path)
        count = 0
        while count < 4:
            count += next(stream) == alive
        stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_after_the_opening_is_complete(path: str) -> None:
    with running(ScriptedEngine(["a", "b"], step=0.2), keep_alive=0.02) as server:
        seen = list(lines(server.url, path))
        data = [line.removeprefix("data: ") for line in seen if line.startswith("data: ")]
        kinds = [json.loads(document).get("type") for document in data if document != "[DONE]"]
        for kind in OPENINGS.get(path, [])[:1]:
            assert kinds[0] == kind and kinds.count(kind) == 1
        if path == "/v1/responses":
            numbers = [json.loads(document)["sequence_number"] for document in data]
            assert numbers == list(range(len(data)))
        assert any("ping" in line or line == ": keep-alive" for line in seen)
        assert '"a"' in "".join(seen) and '"b"' in "".join(seen)


def test_usage_after_an_early_opening_is_right() -> None:
    with running(ScriptedEngine(["a", "b"], step=0.2), keep_alive=0.02) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        options: Any = {"model": "tiny", "max_tokens": 9, "messages": USER}
        counted = client.messages.count_tokens(model="tiny", messages=USER).input_tokens  # type: ignore[arg-type]
        with client.messages.stream(**options) as stream:
            started = next(event for event in stream if event.type == "message_start")
            assert started.message.usage.input_tokens == counted
            final = stream.get_final_message()
        assert final.content[0].text == "ab" and final.usage.input_tokens == counted  # type: ignore[union-attr]


@pytest.mark.parametrize("path", BODIES)
def test_errors_before_admission_are_statuses(path: str) -> None:
    engine = ScriptedEngine(step=NEVER)
    engine.error = QueueFull("8 requests wait")
    with running(engine, keep_alive=0.01) as server:
        assert httpx.post(server.url + path, json=BODIES[path]).status_code == 429


class Failing(ScriptedEngine):
    """Fails before the first output."""

    def _play(self, stream: RequestStream, pieces: list[str], stop: threading.Event) -> None:
        stop.wait(0.3)
        self._say(stream, "", [], "error")


@pytest.mark.parametrize("path", OPENINGS)
def test_a_gateway_holds_the_opening_so_that_it_can_retry(path: str) -> None:
    with running(Failing(), keep_alive=0.01) as server:
        answer = httpx.post(server.url + path, json=BODIES[path])
        assert answer.status_code == 200 and "engine ended the request" in answer.text
        answer = httpx.post(server.url + path, json=BODIES[path], headers={OPENING_HEADER: "15"})
        assert answer.status_code == 503
