"""Many concurrent clients, and clients that disconnect."""

from __future__ import annotations

import asyncio
import socket
import struct

import httpx
import pytest
from openai import AsyncOpenAI

from tests.server.harness import Running, ScriptedEngine, running, tiny_engine, until

STREAMS, TOKENS = 64, 16


def options(number: int) -> dict[str, object]:
    return {
        "model": "tiny",
        "prompt": f"request {number}: ",
        "max_tokens": TOKENS,
        "temperature": 0.0,
        "extra_body": {"ignore_eos": True},
    }


async def stream_all(server: Running) -> list[str]:
    async def one(client: AsyncOpenAI, number: int) -> str:
        text, reason = "", None
        async for chunk in await client.completions.create(**options(number), stream=True):  # type: ignore[call-overload]
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason or reason
        assert reason == "length"
        return text

    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        return await asyncio.gather(*(one(client, number) for number in range(STREAMS)))


def test_64_concurrent_streams_equal_single_streams() -> None:
    with running(tiny_engine(enable_prefix_caching=False)) as server:
        texts = asyncio.run(stream_all(server))
        client = server.client()
        for number in range(0, STREAMS, 9):
            alone = client.completions.create(**options(number))  # type: ignore[call-overload]
            assert texts[number] == alone.choices[0].text
        snapshot = server.service.engine.stats.snapshot()  # type: ignore[union-attr]
        assert snapshot.generation_tokens == (STREAMS + 8) * TOKENS
        assert snapshot.num_requests_running == 0 and not server.service.jobs


def request(body: bytes) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("stream", [b"true", b"false"])
@pytest.mark.parametrize("reset", [True, False])
def test_disconnected_client_frees_its_slot(stream: bytes, reset: bool) -> None:
    with running(tiny_engine()) as server:
        engine = server.service.engine
        assert engine is not None
        connections = []
        for _ in range(8):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(
                request(b'{"prompt": "x", "max_tokens": 1500, "ignore_eos": true, "stream": ' + stream + b"}")
            )
            connections.append(connection)
        until(lambda: engine.stats.snapshot().num_requests_running == 8)
        for connection in connections:
            if reset:  # RST instead of FIN
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        until(lambda: not server.service.jobs and engine.num_live == 0)
        snapshot = engine.stats.snapshot()
        assert snapshot.requests_finished["abort"] == 8
        assert snapshot.kv_cache_usage == 0
        assert snapshot.generation_tokens < 8 * 1500


def test_one_failing_prompt_frees_all_prompts() -> None:
    """The second prompt is rejected; the first must not continue."""
    with running(tiny_engine()) as server:
        body = {"prompt": [[5, 6], [5, 999_999]], "max_tokens": 1000, "ignore_eos": True}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 400
        engine = server.service.engine
        assert engine is not None
        until(lambda: engine.num_live == 0)
        assert not server.service.jobs


def test_immediate_disconnect() -> None:
    engine = ScriptedEngine(["x"], step=0.01, forever=True)
    with running(engine) as server:
        for _ in range(20):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(request(b'{"prompt": "x", "stream": true}'))
            connection.close()
        until(lambda: not server.service.jobs and not engine.running)
