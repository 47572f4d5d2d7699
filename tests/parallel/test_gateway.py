"""Replicas of two ranks behind the gateway: if a rank dies, the other replica takes over."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.server import Gateway
from tests.e2e.test_serve_command import launched
from tests.parallel.test_serving import tiny

COMPLETIONS = "/v1/completions"


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of a server's ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


async def until(true: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def ready(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        async with session.get(f"{url}/ready") as answer:
            if answer.status == 200:
                return
        await asyncio.sleep(0.1)


async def ask(session: aiohttp.ClientSession, first: int, stream: bool = False) -> tuple[int, str, str]:
    """(status, name of the replica, answer)."""
    body = dict(
        model="m",
        prompt=[first, 2, 3],
        max_tokens=20,
        temperature=0,
        ignore_eos=True,
        stream=stream,
        logprobs=1,
    )
    async with session.post(COMPLETIONS, json=body) as answer:
        return answer.status, answer.headers.get("x-farthing-replica", ""), await answer.text()


async def story(processes: dict[str, tuple[subprocess.Popen[str], str]]) -> None:
    urls = {name: url for name, (_, url) in processes.items()}
    gateway = Gateway(GatewayConfig(health_interval_s=0.2, wait_s=60.0))
    port = await gateway.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            for url in urls.values():
                await ready(session, url)
            while not (ranks := ranks_of(processes["two-ranks"][0])):  # proc(5): a look may miss a child
                await asyncio.sleep(0.05)
            (rank,) = ranks
            os.kill(rank, signal.SIGSTOP)  # requests from now on cannot be answered
            gateway.set_replicas({"two-ranks": urls["two-ranks"]})
            await until(lambda: len(gateway.balancer.candidates()) == 1)
            waiting = [asyncio.create_task(ask(session, i, stream=i == 3)) for i in range(4)]
            dying = gateway.balancer.candidates()[0]
            await until(lambda: dying.inflight == 4)
            gateway.set_replicas(urls)
            await until(lambda: len(gateway.balancer.candidates()) == 2)
            os.kill(rank, signal.SIGKILL)
            began = time.monotonic()
            answers = await asyncio.gather(*waiting)
            assert time.monotonic() - began < 60  # immediate on an idle machine
            assert [(status, who) for status, who, _ in answers] == [(200, "one-rank")] * 4
            assert all(json.loads(text)["usage"]["completion_tokens"] == 20 for *_, text in answers[:3])
            assert answers[3][2].endswith("data: [DONE]\n\n") and '"error"' not in answers[3][2]
            # From here on the dead replica is skipped; it says why and ends, for a supervisor to restart it.
            await until(lambda: len(gateway.balancer.candidates()) == 1)
            assert (await ask(session, 9))[:2] == (200, "one-rank")
            dead = processes["two-ranks"][0]
            await until(lambda: dead.poll() is not None)
            assert dead.returncode == 1 and dead.stderr is not None
            assert "rank 1 of 2 exited with code -9" in dead.stderr.read()
    finally:
        await gateway.stop(0)


def test_requests_of_a_replica_with_a_dead_rank_are_answered_by_another(tmp_path: Path) -> None:
    pytest.importorskip("httptools")
    options = [str(tiny(tmp_path)), "--skip-tokenizer-init", "--served-model-name", "m", "--num-blocks", "32"]
    with ExitStack() as stack:
        processes = {
            "two-ranks": stack.enter_context(launched(*options, "--tp", "2", "--max-num-seqs", "2")),
            "one-rank": stack.enter_context(launched(*options)),
        }
        asyncio.run(asyncio.wait_for(story(processes), 200))
