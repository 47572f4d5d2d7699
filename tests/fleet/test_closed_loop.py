"""Four minutes of `farthing fleet up`: a burst, a killed replica, silence, and a request that wakes it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from farthing_fleet.decision_log import read_log
from farthing_fleet.gateway.replicas_file import read_replicas
from farthing_fleet.types import Decision
from tests.fleet.doubles import replica as double
from tests.fleet.doubles.services import free_port

SLOTS, SECONDS = 3, 1.0  # a replica runs three requests at once, of a second each
CAPACITY = SLOTS / SECONDS
BURST_S, KILL_S, SILENCE_S = 75.0, 45.0, 140.0
TEXTS = 4  # different ones, so that many equal requests are in flight when a replica dies


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.anyio
async def test_burst_kill_silence_and_wake(tmp_path: Path) -> None:
    state, port, metrics = tmp_path / "state", free_port(), free_port()
    process = await start(tmp_path, port, metrics)
    answers, delays = Counter[int](), list[float]()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            watch = asyncio.create_task(health(metrics, delays))
            began = time.time()
            load = asyncio.create_task(burst(session, answers))
            await asyncio.sleep(KILL_S)
            os.kill(victim(state), signal.SIGKILL)
            await load
            await asyncio.sleep(SILENCE_S)
            quiet = time.time()
            answers[await ask(session, 0)] += 1
            watch.cancel()
    finally:
        process.terminate()
        await process.communicate()
    assert process.returncode == 0
    made = read_log(state / "decisions.jsonl", 10_000)
    assert made[0].time - began < 3.0 and max(delays) < 1.0
    assert 422 not in answers and answers[200] >= 0.97 * answers.total()
    during = [d for d in made if d.time < began + BURST_S]
    assert 2 <= max(d.target for d in during) <= 4
    assert all(
        CAPACITY / 2.5 <= d.inputs["capacity"] <= 2.5 * CAPACITY for d in made if "capacity" in d.inputs
    )
    before = [d for d in made if d.time < quiet]
    assert before[-1].target == 0, reasons(before)
    assert any(d.action == "up" for d in made if d.time >= quiet)


def reasons(made: list[Decision]) -> str:
    return "\n".join(f"{d.time:.0f} {d.current} -> {d.target}: {d.reason}" for d in made[-5:])


async def start(tmp_path: Path, port: int, metrics: int) -> asyncio.subprocess.Process:
    policy = {
        "interval_s": 1.0,
        "cold_start_s": 3.0,
        "stale_after_s": 10.0,
        "drain_s": 5.0,
        "cooldown_s": 10.0,
    }
    policy |= {"min_replicas": 0, "max_replicas": 4, "capacity": CAPACITY}
    config = tmp_path / "fleet.yaml"
    config.write_text(json.dumps({"policy": policy, "signals": {"window_s": 5.0, "timeout_s": 2.0}}))
    command = f"{sys.executable} {double.__file__} --port {{port}} --name {{name}} --slots {SLOTS}"
    command += f" --tokens 20 --interval {SECONDS / 20} --ready-after 1"
    options = ("--command", command, "--health-path", "/health", "--config", str(config), "--port", str(port))
    options += ("--metrics", f"127.0.0.1:{metrics}", "--state", str(tmp_path / "state"))
    words = ("-m", "farthing.cli.app", "fleet", "up", *options)
    process = await asyncio.create_subprocess_exec(sys.executable, *words, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    while (line := await process.stderr.readline()) != b"ready\n":
        assert line
    return process


async def burst(session: aiohttp.ClientSession, answers: Counter[int]) -> None:
    """Two and a half replicas' worth of requests."""
    open_requests, began, sent = set[asyncio.Task[int]](), time.monotonic(), 0
    while (passed := time.monotonic() - began) < BURST_S:
        while sent < passed * 2.5 * CAPACITY:
            open_requests.add(asyncio.create_task(ask(session, sent % TEXTS)))
            sent += 1
        await asyncio.sleep(0.05)
    answers.update(await asyncio.gather(*open_requests))


async def ask(session: aiohttp.ClientSession, text: int) -> int:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": f"popular {text}"}]}
    async with session.post("/v1/chat/completions", json=body) as answer:
        await answer.read()
        return answer.status


async def health(port: int, delays: list[float]) -> None:
    """Ask the controller's /health all the time."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        while True:
            began = time.monotonic()
            async with session.get("/health") as answer:
                await answer.read()
            delays.append(time.monotonic() - began)
            await asyncio.sleep(0.1)


def victim(state: Path) -> int:
    """The process of a ready replica."""
    ports = [url.rpartition(":")[2] for url in read_replicas(state / "replicas.json")[0].values()]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if double.__file__.encode() in words and ports[0].encode() in words:
            return int(entry.name)
    raise AssertionError(f"no replica on port {ports[0]}")
