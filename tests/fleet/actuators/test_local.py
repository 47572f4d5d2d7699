"""Local replicas as real processes: start, drain, replace, give up; no process leaks."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from farthing_fleet.actuators.local import LocalConfig, LocalReplicas
from tests.fleet.doubles import replica as double

FAKE = (sys.executable, str(double.__file__), "--port", "{port}")


def local(tmp_path: Path, *extra: str, command: tuple[str, ...] = FAKE, **options: float) -> LocalReplicas:
    announced: list[dict[str, str]] = []
    config = LocalConfig((*command, *extra), tmp_path, **options)  # type: ignore[arg-type]
    actuator = LocalReplicas(config, on_change=announced.append)
    actuator.announced = announced  # type: ignore[attr-defined]
    return actuator


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.02)


async def one_ready(replicas: LocalReplicas) -> str:
    """Start one replica and return its URL."""
    await replicas.start()
    await replicas.scale(1)
    assert await replicas.wait_ready(1, 20)
    (url,) = replicas.ready().values()
    return url


@pytest.mark.anyio
async def test_scales_up_and_down_and_leaves_no_process(tmp_path: Path) -> None:
    replicas = local(tmp_path)
    await replicas.start()
    await replicas.scale(2)
    assert await replicas.current() == 2
    assert await replicas.wait_ready(2, 20)
    pids = [r.process.pid for r in replicas.replicas]
    assert replicas.cold_starts.p90 is not None and replicas.cold_starts.p90 > 0.05
    await replicas.scale(1)
    assert len(replicas.ready()) == 1  # removed from the set immediately; the process ends later
    await until(lambda: len(replicas.replicas) == 1)
    await replicas.close()
    assert not any(alive(pid) for pid in pids)
    assert replicas.announced[-1] == {}  # type: ignore[attr-defined]


@pytest.mark.anyio
async def test_replicas_are_bound_to_memory_nodes_in_turn(tmp_path: Path) -> None:
    """A replica that replaces another takes its node; simulated: nodes of one CPU each."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    replicas = local(tmp_path, nodes=tuple((cpu,) for cpu in cpus))  # type: ignore[arg-type]
    await replicas.start()
    await replicas.scale(len(cpus))
    assert await replicas.wait_ready(len(cpus), 20)

    def bound() -> list[set[int]]:
        alive = [r for r in replicas.replicas if r.state == "ready"]
        return sorted((os.sched_getaffinity(r.process.pid) for r in alive), key=min)

    assert bound() == [{cpu} for cpu in cpus]
    first = replicas.replicas[0]
    os.kill(first.process.pid, signal.SIGKILL)
    await until(lambda: len(replicas.ready()) == len(cpus) and first not in replicas.replicas)
    assert bound() == [{cpu} for cpu in cpus]
    await replicas.close()


@pytest.mark.anyio
async def test_replica_finishes_its_requests_before_it_exits(tmp_path: Path) -> None:
    replicas = local(tmp_path, "--tokens", "20", "--interval", "0.05")
    url = await one_ready(replicas)
    async with aiohttp.ClientSession() as session:
        answer = await session.post(url + "/v1/chat/completions", json={"messages": [], "stream": True})
        await answer.content.readline()
        await replicas.scale(0)
        lines = [line async for line in answer.content if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]\n"
    await until(lambda: not replicas.replicas)
    await replicas.close()


@pytest.mark.anyio
async def test_replica_that_does_not_drain_is_killed(tmp_path: Path) -> None:
    replicas = local(tmp_path, "--tokens", "10000", "--interval", "0.05", drain_timeout_s=0.5)
    url = await one_ready(replicas)
    async with aiohttp.ClientSession() as session:
        answer = await session.post(url + "/v1/chat/completions", json={"messages": [], "stream": True})
        await answer.content.readline()
        await replicas.scale(0)
        await until(lambda: not replicas.replicas, 5)
        answer.close()
    await replicas.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("sent", "reason", "options"),
    [
        pytest.param(signal.SIGKILL, "died with -9", {}, id="dead"),
        pytest.param(signal.SIGSTOP, "no answer for 0.5 s", {"liveness_s": 0.5}, id="hanging"),
    ],
)
async def test_failed_replica_is_replaced(
    tmp_path: Path, sent: int, reason: str, options: dict[str, float]
) -> None:
    replicas = local(tmp_path, **options)
    await replicas.start()
    await replicas.scale(1)
    assert await replicas.wait_ready(1, 20)
    (first,) = replicas.replicas
    os.kill(first.process.pid, sent)
    await until(lambda: bool(replicas.ready()) and first not in replicas.replicas)
    assert first.reason == reason
    await replicas.close()


@pytest.mark.anyio
async def test_launches_of_replicas_that_never_become_ready_pause_with_a_reason_and_resume(
    tmp_path: Path,
) -> None:
    replicas = local(tmp_path, "--ready-after", "3600", ready_timeout_s=0.8, failures=2, retry_s=0.3)
    await replicas.start()
    await replicas.scale(1)
    assert not await replicas.wait_ready(1, 120)
    assert "not ready after 0.8 s" in replicas.given_up
    launches = replicas._count  # private: the number of launches
    assert launches == 2
    await until(lambda: replicas._count > launches)  # after the pause, one more try
    await replicas.close()


@pytest.mark.anyio
async def test_launches_of_a_failing_command_pause_with_its_last_lines(tmp_path: Path) -> None:
    replicas = local(tmp_path, "--die-at-start", failures=2)
    await replicas.start()
    await replicas.scale(3)
    assert not await replicas.wait_ready(3, 20)
    assert "ended with 3 before it was ready" in replicas.given_up
    assert "told to die at start" in replicas.given_up
    await replicas.close()
    missing = local(tmp_path, command=("/nonexistent/server", "{port}"), failures=1)
    await missing.start()
    await missing.scale(1)
    assert "could not be started" in missing.given_up
    await missing.close()


@pytest.mark.anyio
async def test_spare_process_becomes_the_next_replica_and_is_replaced(tmp_path: Path) -> None:
    waits = (
        "import json, os, sys; os.execv(sys.executable, [sys.executable, *json.loads(sys.stdin.readline())])"
    )

    config = LocalConfig(FAKE, tmp_path, standby=(sys.executable, "-c", waits), standby_skips=1)
    replicas = LocalReplicas(config)
    await replicas.start()
    await replicas.scale(1)
    assert await replicas.wait_ready(1, 20)
    await until(lambda: replicas._spare is not None)
    assert replicas._spare is not None
    first = replicas._spare.process.pid
    await replicas.scale(2)
    assert await replicas.wait_ready(2, 20)
    assert first in [r.process.pid for r in replicas.replicas]
    await until(lambda: replicas._spare is not None and replicas._spare.process.pid != first)
    os.kill(replicas._spare.process.pid, signal.SIGKILL)
    await until(lambda: replicas._spare is None or replicas._spare.process.returncode is not None)
    await replicas.scale(3)  # a dead spare is skipped
    assert await replicas.wait_ready(3, 20)
    await until(lambda: replicas._spare is not None)
    pids = [replicas._spare.process.pid, *(r.process.pid for r in replicas.replicas)]
    await replicas.close()
    assert not any(alive(pid) for pid in pids)


def test_replicas_exit_with_their_parent(tmp_path: Path) -> None:
    script = f"""
import asyncio, os, sys
from pathlib import Path
from farthing_fleet.actuators.local import LocalConfig, LocalReplicas
async def main():
    replicas = LocalReplicas(LocalConfig({FAKE!r}, Path({str(tmp_path)!r})))
    await replicas.start()
    await replicas.scale(1)
    assert await replicas.wait_ready(1, 20)
    print(replicas.replicas[0].process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break  # exited; no parent reaps it in this container
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.anyio
async def test_configuration_errors_name_accepted_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'farthing serve'.*\{port\}"):
        LocalConfig(("farthing", "serve"), tmp_path)
    with pytest.raises(ValueError, match="ready_timeout_s: got 0"):
        LocalConfig(FAKE, tmp_path, ready_timeout_s=0)

    with pytest.raises(ValueError, match="replicas: got -1"):
        await local(tmp_path).scale(-1)
