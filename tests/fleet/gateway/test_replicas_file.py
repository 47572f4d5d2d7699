"""Replicas by DNS: addresses, empty answers and resolver failures."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from farthing_fleet.gateway.replicas_file import addresses, follow


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
async def test_replicas_follow_changes_and_survive_a_resolver_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[str]] = []
    done = asyncio.Event()

    def changed(replicas: dict[str, str]) -> None:
        seen.append(list(replicas))
        if not replicas:
            done.set()

    _resolver(monkeypatch, [["10.0.0.1"], socket.EAI_AGAIN, ["10.0.0.1", "10.0.0.2"], socket.EAI_NONAME])
    following = asyncio.create_task(follow([("replicas.test", 8000)], changed, every_s=0.001))
    async with asyncio.timeout(60):
        await done.wait()
    following.cancel()
    assert seen == [["10.0.0.1"], ["10.0.0.1", "10.0.0.2"], []]


@pytest.mark.anyio
async def test_replicas_of_several_services_are_listed_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    _resolver(monkeypatch, [["10.0.0.1"], ["10.0.0.2"], ["10.0.0.1"], socket.EAI_AGAIN])
    places = [("a.test", 8000), ("b.test", 8001)]
    following = asyncio.create_task(follow(places, written.put_nowait, every_s=0.001))
    async with asyncio.timeout(60):
        assert await written.get() == {"10.0.0.1": "http://10.0.0.1:8000", "10.0.0.2": "http://10.0.0.2:8001"}
    following.cancel()
