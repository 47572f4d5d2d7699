"""Replicas by DNS: addresses, empty answers and resolver failures."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from farthing_fleet.gateway.replicas_file import read_replicas, write_replicas
from farthing_fleet.run import addresses, follow


def _resolver(monkeypatch: pytest.MonkeyPatch, answers: list[list[str] | int]) -> None:
    """Each look-up returns the next answer: addresses, or an error number. The last one repeats."""

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, int):
            raise socket.gaierror(answer, "resolver")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, port)) for name in answer]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def _ask(monkeypatch: pytest.MonkeyPatch, answer: list[str] | int) -> dict[str, str] | None:
    async def ask() -> dict[str, str] | None:
        _resolver(monkeypatch, [answer])
        return await addresses("replicas.test", 8000)

    return asyncio.run(ask())


def test_every_address_is_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _ask(monkeypatch, ["10.0.0.2", "10.0.0.1", "10.0.0.1", "fd00::7"]) == {
        "10.0.0.1": "http://10.0.0.1:8000",
        "10.0.0.2": "http://10.0.0.2:8000",
        "fd00::7": "http://[fd00::7]:8000",
    }


def test_service_without_ready_pods_is_empty_unlike_a_resolver_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _ask(monkeypatch, socket.EAI_NONAME) == {}
    assert _ask(monkeypatch, socket.EAI_AGAIN) is None


@pytest.mark.anyio
async def test_file_follows_changes_and_survives_a_resolver_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "replicas.json"
    seen: list[list[str]] = []
    done = asyncio.Event()

    def write(path: Path, replicas: dict[str, str]) -> None:
        write_replicas(path, replicas)
        seen.append(list(read_replicas(path)[0]))
        if not replicas:
            done.set()

    monkeypatch.setattr("farthing_fleet.run.write_replicas", write)
    _resolver(monkeypatch, [["10.0.0.1"], socket.EAI_AGAIN, ["10.0.0.1", "10.0.0.2"], socket.EAI_NONAME])
    following = asyncio.create_task(follow([("replicas.test", 8000)], path, every_s=0.001))
    async with asyncio.timeout(60):
        await done.wait()
    following.cancel()
    assert seen == [["10.0.0.1"], ["10.0.0.1", "10.0.0.2"], []]


@pytest.mark.anyio
async def test_replicas_of_several_services_are_listed_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    monkeypatch.setattr("farthing_fleet.run.write_replicas", lambda _, replicas: written.put_nowait(replicas))
    _resolver(monkeypatch, [["10.0.0.1"], ["10.0.0.2"], ["10.0.0.1"], socket.EAI_AGAIN])
    places = [("a.test", 8000), ("b.test", 8001)]
    following = asyncio.create_task(follow(places, tmp_path / "replicas.json", every_s=0.001))
    async with asyncio.timeout(60):
        assert await written.get() == {"10.0.0.1": "http://10.0.0.1:8000", "10.0.0.2": "http://10.0.0.2:8001"}
    following.cancel()
