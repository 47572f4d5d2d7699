"""The load generator against a small server with known delays, over a real socket."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from farthing.bench.load import (
    Shape,
    Slo,
    Target,
    Timing,
    _event,
    closed_loop,
    complete,
    find_capacity,
    from_trace,
    poisson,
    run_load,
    summarize,
)
from farthing.cli.bench import LoadOptions, SloOptions, app
from farthing.cli.errors import Exit
from farthing.server.config import KeyRing
from tests.server.harness import ScriptedEngine, running

SHAPE = Shape(input_tokens=8, output_tokens=3, shared_prefix=4, vocabulary=1000)


class FakeServer:
    """Streams max_tokens chunks; answers 429 while more than `limit` requests are in flight."""

    def __init__(self, limit: int = 1000) -> None:
        self.limit, self.running, self.peak = limit, 0, 0
        self.prompts: list[list[int]] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = 0
        while (line := (await reader.readline()).strip()) != b"":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        body = json.loads(await reader.readexactly(length))
        self.running += 1
        self.peak = max(self.peak, self.running)
        self.prompts.append(body["prompt"])
        if self.running > self.limit:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            await asyncio.sleep(0.02)
            for i in range(body["max_tokens"]):
                self._chunk(writer, {"choices": [{"text": f"t{i}"}]})
                await asyncio.sleep(0.001)
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            self._chunk(
                writer, {"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 4}}}
            )
            data = b"data: [DONE]\n\n"
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n")
        await writer.drain()
        writer.close()
        self.running -= 1

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, event: object) -> None:
        data = f"data: {json.dumps(event)}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@asynccontextmanager
async def serving(fake: FakeServer) -> AsyncIterator[Target]:
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    try:
        yield Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m", timeout=10)
    finally:
        server.close()


def test_closed_loop_maintains_concurrency() -> None:
    async def scenario() -> tuple[FakeServer, list[Timing]]:
        fake = FakeServer()
        async with serving(fake) as target:
            return fake, await run_load(target, closed_loop(SHAPE, 20), concurrency=4)

    fake, timings = asyncio.run(scenario())
    assert fake.peak == 4
    result = summarize(timings, Slo(ttft=5, tpot=5), usd_per_hour=3600.0)
    assert (result.failed, result.output_tokens, result.prompt_tokens, result.cached_tokens) == (
        0,
        60,
        160,
        80,
    )
    assert timings[0].text == "t0t1t2"
    assert result.ttft_ms["p50"] >= 20
    assert result.goodput == 1.0
    assert result.usd_per_million_tokens == pytest.approx(result.seconds / 60 * 1e6)
    assert len({tuple(p[:4]) for p in fake.prompts}) == 1
    assert len({tuple(p) for p in fake.prompts}) == 20
    assert json.dumps(result.to_json())


def test_inter_token_latency_counts_tokens() -> None:
    lumps = Timing(arrivals=[1.0, 1.3, 1.3, 1.7], counts=[1, 4, 4, 5])
    assert lumps.gaps == pytest.approx([0.1, 0.1, 0.1, 0.4])
    chunks_only = Timing(arrivals=[1.0, 1.3])
    assert chunks_only.gaps == pytest.approx([0.3])


def test_usage_in_every_chunk_is_counted() -> None:
    timing, tokens = Timing(), [1, 3]
    for count in tokens:
        usage = {"prompt_tokens": 8, "completion_tokens": count}
        _event(json.dumps({"choices": [{"text": "x"}], "usage": usage}).encode(), timing)
    _event(
        json.dumps({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 3}}).encode(), timing
    )
    assert timing.counts == tokens and timing.output_tokens == 3 and len(timing.gaps) == 2


def test_open_loop_never_waits_and_counts_failures() -> None:
    async def scenario() -> tuple[FakeServer, list[Timing]]:
        fake = FakeServer(limit=2)
        async with serving(fake) as target:
            return fake, await run_load(target, poisson(SHAPE, 5000.0, 12))

    fake, timings = asyncio.run(scenario())
    result = summarize(timings, Slo(ttft=5, tpot=5))
    assert fake.peak > 2
    assert 0 < result.failed < 12
    assert result.goodput == (12 - result.failed) / 12
    assert "HTTP 429: full" in result.errors[0]


def test_connection_refused_is_recorded_as_an_error() -> None:
    timing = asyncio.run(complete(Target("http://127.0.0.1:9", "m"), [1], 2))
    assert timing.error is not None
    assert summarize([timing], Slo()).goodput == 0.0


OK = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "expected an HTTP status line"),
        (b"gibberish\r\n", "expected an HTTP status line"),
        (OK, "the stream ended after 0 chunks"),
        (OK + b'data: {"choices": [{"text": "a"}]}\n\n', "the stream ended after 1 chunk,"),
        (OK + b"data: 5\n\n", "malformed event"),
        (OK + b'data: {"choices": 5}\n\n', "malformed event"),
        (OK + b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}\n\n', None),
        (OK + b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n', None),
        (OK + b'data: {"error": {"message": "full"}}\n\n', '{"message": "full"}'),
        (OK + b'data: {"error": "full"}\n\ndata: 5\n\n', '"full"'),  # the first one is the cause
    ],
)
def test_answer_that_is_cut_off_or_malformed_is_a_failure(answer: bytes, error: str | None) -> None:
    class Fake(FakeServer):
        async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()

    async def scenario() -> Timing:
        async with serving(Fake()) as target:
            return await complete(target, [1], 2)

    timing = asyncio.run(scenario())
    assert timing.error is None if error is None else error in str(timing.error)
    assert summarize([timing], Slo()).failed == (error is not None)


def test_slo_separates_good_from_slow_requests() -> None:
    fast = Timing(output_tokens=3, start=0, first=0.1, end=0.2)
    slow = Timing(output_tokens=3, start=0, first=0.1, end=2.1)
    result = summarize([fast, slow], Slo(ttft=0.2, tpot=0.5))
    assert result.goodput == 0.5
    assert result.tpot_ms["p50"] == pytest.approx(525.0)


def test_traces(tmp_path: Path) -> None:
    azure = tmp_path / "a.csv.gz"
    rows = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,40,5\n2023-11-16 18:15:50.9951690,9000,7000\n"
    )
    azure.write_bytes(gzip.compress(rows.encode()))
    first, second = from_trace(azure, SHAPE, speed=2.0, max_len=100)
    assert (first.at, len(first.prompt), first.max_tokens) == (0.0, 40, 5)
    assert second.at == pytest.approx(4.314579 / 2, abs=1e-6)
    assert len(second.prompt) + second.max_tokens == 100
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text(
        "".join(
            json.dumps(dict(timestamp=t, input_length=1100, output_length=2, hash_ids=[7, b])) + "\n"
            for t, b in ((0, 1), (1500, 2))
        )
    )
    one, two = from_trace(mooncake, Shape(vocabulary=5000), max_len=4096)
    clipped, other = from_trace(mooncake, Shape(vocabulary=5000), max_len=902)
    assert clipped.prompt[:512] == other.prompt[:512] == one.prompt[:512]
    assert clipped.prompt[512:] != one.prompt[512:900], "a block that is cut is no longer the same"
    assert two.at == 1.5
    assert one.prompt[:512] == two.prompt[:512]
    assert one.prompt[512:1024] != two.prompt[512:1024]
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"first line 'a,b'; expected CSV with TIMESTAMP"):
        from_trace(tmp_path / "x.csv", SHAPE)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Shape(input_tokens=0), "input_tokens: got 0"),
        (lambda: Shape(input_tokens=4, shared_prefix=4), "shared_prefix: got 4"),
        (lambda: LoadOptions(rate=0), "rate: got 0"),
        (lambda: Target("ftp://x", "m"), "url: got 'ftp://x'"),
        (lambda: asyncio.run(run_load(Target("http://x", "m"), [], 0)), "concurrency: got 0"),
    ],
)
def test_bad_input(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.slow
def test_capacity_is_below_the_throughput_ceiling() -> None:
    async def serve(ready: asyncio.Event, stop: asyncio.Event, box: list[Target]) -> None:
        async with serving(FakeServer(limit=40)) as target:
            box.append(target)
            ready.set()
            await stop.wait()

    import threading

    box: list[Target] = []
    loop = asyncio.new_event_loop()
    ready, stop = asyncio.Event(), asyncio.Event()
    started = threading.Event()

    async def main() -> None:
        task = asyncio.create_task(serve(ready, stop, box))
        await ready.wait()
        started.set()
        await task

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    started.wait(5)
    try:
        found = find_capacity(box[0], SHAPE, Slo(ttft=0.5, tpot=0.5), seconds=0.5, precision=0.3)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
    assert found.requests_per_second > 0
    assert found.tokens_per_second == pytest.approx(found.requests_per_second * 11)
    assert all(t.goodput >= 0.99 for t in found.trials if t.rate == found.requests_per_second)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("concurrency", 0), ("requests", 0), ("rate", 0.0), ("rate", math.inf), ("rate", math.nan),
        ("speed", 0.0), ("usd_per_hour", -1.0), ("usd_per_hour", math.nan), ("max_len", 0),
        ("picture", Path("/nowhere/x.png")),
    ],
)  # fmt: skip
def test_load_that_cannot_be_sent_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}: got .*; expected"):
        LoadOptions(**{option: value})


def test_targets_of_latency_are_positive() -> None:
    with pytest.raises(ValueError, match=r"slo_ttft_ms: got -1\.0; expected a number > 0"):
        SloOptions(slo_ttft_ms=-1.0)


def test_a_server_that_does_not_run_is_one_line() -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        result = CliRunner().invoke(app, ["serve", "--url", url])
    assert result.exit_code == Exit.INPUT
    assert result.stderr.strip() == (
        f"error: url: got {url!r} (Connection refused); expected a running OpenAI-compatible server"
    )


@pytest.mark.parametrize("owner", ["own", "another", "unknown"])
def test_key_is_sent_only_to_an_address_that_is_named_or_the_users_own(
    owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(ScriptedEngine(["ok"]), keys=KeyRing(["me:sk-1"])) as server:
        user = {"own": os.getuid(), "another": os.getuid() + 1}.get(owner)
        listens = f"   0: 0100007F:{server.port:04X} 00000000:0000 0A 0:0 0:0 0 {user} 0\n"
        (tmp_path / "tcp").write_text("header\n" + listens * (user is not None))
        monkeypatch.setattr("farthing.cli.conversation._SOCKETS", (tmp_path / "tcp",))
        monkeypatch.setattr("farthing.cli.bench.ADDRESS", server.url)
        monkeypatch.setenv("FARTHING_API_KEY", "sk-1")
        brief = ["serve", "--requests", "2", "--json"]
        named = CliRunner().invoke(app, [*brief, "--url", server.url])
        assert named.exit_code == 0 and json.loads(named.stdout)["requests"] == 2 and not named.stderr.strip()
        default = CliRunner().invoke(app, brief)
        if owner == "own":
            assert default.exit_code == 0 and json.loads(default.stdout)["requests"] == 2
            return
        assert default.exit_code == Exit.INPUT
        told = f"api_key: not sent to {server.url}, where .* name the address: --url {server.url}"
        assert re.match(told, default.stderr)
        assert "expected a running OpenAI-compatible server" in default.stderr
