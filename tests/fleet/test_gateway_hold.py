"""Requests held until a replica is ready: released in batches, by arrival, each once per look."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from farthing.fleet.gateway.config import GatewayConfig
from farthing.fleet.gateway.hold import Hold
from farthing.fleet.gateway.metrics import GatewayMetrics
from farthing.fleet.gateway.replicas import Balancer


def hold(available: Callable[[], bool]) -> Hold:
    return Hold(1000, GatewayMetrics(Balancer(GatewayConfig())), available)


@pytest.mark.anyio
async def test_requests_are_released_in_batches_by_arrival() -> None:
    released: list[int] = []
    held = hold(lambda: True)

    async def request(number: int) -> None:
        assert await held.until(lambda: "replica", asyncio.get_running_loop().time() + 60) == "replica"
        released.append(number)

    requests = [asyncio.create_task(request(number)) for number in range(100)]
    while held.waiting < 100:
        await asyncio.sleep(0)
    held.notify()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert 0 < len(released) < 100
    await asyncio.gather(*requests)
    assert released == list(range(100))
    assert held.waiting == 0 and not held.occupied.is_set()


@pytest.mark.anyio
async def test_request_that_no_replica_suits_tries_once_per_look() -> None:
    tries = 0
    held = hold(lambda: True)

    def busy() -> str | None:
        nonlocal tries
        tries += 1
        return None

    task = asyncio.create_task(held.until(busy, asyncio.get_running_loop().time() + 60))
    while not held.waiting:
        await asyncio.sleep(0)
    for _ in range(3):
        held.notify()
        for _ in range(10):
            await asyncio.sleep(0)
    assert tries == 3
    held.stopping = True
    held.notify()
    assert await task is None


@pytest.mark.anyio
async def test_client_that_leaves_in_the_turn_of_a_look_does_not_stop_the_others() -> None:
    held = hold(lambda: True)
    end = asyncio.get_running_loop().time() + 60
    leaves, stays = (asyncio.create_task(held.until(lambda: "replica", end)) for _ in range(2))
    while held.waiting < 2:
        await asyncio.sleep(0)
    leaves.cancel()  # its future is cancelled at once; the request notices a turn later
    held.notify()
    assert await stays == "replica"
    with pytest.raises(asyncio.CancelledError):
        await leaves
