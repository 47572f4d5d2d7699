"""`farthing fleet up` end to end: keys, a request, Ctrl-C, and the error if replicas cannot start."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.fleet.doubles import replica as double
from tests.fleet.doubles.services import free_port


async def start(tmp_path: Path, port: int, *more: str, replica: str = "") -> asyncio.subprocess.Process:
    command = f"{sys.executable} {double.__file__} --port {{port}} {replica}"
    options = (
        "--command",
        command,
        "--health-path",
        "/health",
        "--port",
        str(port),
        "--metrics",
        "127.0.0.1:0",
    )
    words = ("-m", "farthing.cli.app", "fleet", "up", *options, "--state", str(tmp_path / "state"), *more)
    return await asyncio.create_subprocess_exec(sys.executable, *words, stderr=asyncio.subprocess.PIPE)


def children(state: Path) -> list[Path]:
    """/proc entries of processes started for this state directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(state).encode() in (entry / "cmdline").read_bytes():
                found.append(entry)
        except OSError:
            continue
    return found


@pytest.mark.anyio
async def test_up_serves_with_keys_and_exits_cleanly(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("# who may ask\nalice:secret\n")
    port = free_port()
    process = await start(tmp_path, port, "--api-key-file", str(tmp_path / "keys.txt"))
    assert process.stderr is not None
    said = []
    while b"ready\n" not in said:
        line = await process.stderr.readline()
        assert line, said
        said.append(line)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    async with aiohttp.ClientSession() as session:
        async with session.post(url, json={"messages": []}) as answer:
            assert answer.status == 401
        headers = {"authorization": "Bearer secret"}
        async with session.post(url, json={"messages": []}, headers=headers) as answer:
            assert answer.status == 200
    process.terminate()
    rest = await process.stderr.read()
    assert await process.wait() == 0, rest
    assert children(tmp_path / "state") == []


@pytest.mark.anyio
async def test_up_reports_why_no_replica_started(tmp_path: Path) -> None:
    process = await start(tmp_path, free_port(), replica="--die-at-start")
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"no replica became ready" in said
    assert b"told to die at start" in said
    assert children(tmp_path / "state") == []


@pytest.mark.anyio
async def test_up_rejects_a_port_in_use(tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    process = await start(tmp_path, port)
    _, said = await process.communicate()
    server.close()
    assert process.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}".encode() in said
