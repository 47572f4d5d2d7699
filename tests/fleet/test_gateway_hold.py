"""Requests held until a replica is ready: released in batches, by arrival, each once per look."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing_fleet.gateway.config import GatewayConfig
from farthing_fleet.gateway.errors import Refused
from farthing_fleet.gateway.hold import Hold
from farthing_fleet.gateway.metrics import GatewayMetrics
from farthing_fleet.gateway.replicas import Balancer


def hold(available: Callable[[], bool], limit: int = 1000) -> Hold:
    gauge = GatewayMetrics(Balancer(GatewayConfig())).waiting.labels("")
    return Hold(limit, gauge, available)


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
    assert held.waiting == 0


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


@pytest.mark.anyio
async def test_keys_take_turns() -> None:
    """One key's hundred requests came first; each look starts with the key that was woken longest ago."""
    released: list[str] = []
    held = hold(lambda: True)

    async def request(key: str) -> None:
        await held.until(lambda: "replica", asyncio.get_running_loop().time() + 60, key)
        released.append(key)

    tasks = [asyncio.create_task(request(key)) for key in ["a"] * 100 + ["b"] * 3 + ["c"]]
    while held.waiting < len(tasks):
        await asyncio.sleep(0)
    held.notify()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert released[:6] == ["a", "b", "c", "a", "b", "a"] and released.count("b") == 3
    await asyncio.gather(*tasks)
    assert len(released) == len(tasks)


@pytest.mark.anyio
async def test_next_look_begins_with_the_key_that_was_woken_longest_ago() -> None:
    released: list[str] = []
    ready = True
    held = hold(lambda: ready)

    async def request(key: str) -> None:
        await held.until(lambda: "replica", asyncio.get_running_loop().time() + 60, key)
        released.append(key)

    tasks = [asyncio.create_task(request(key)) for key in "a" * 20 + "b" * 20 + "c" * 20]
    while held.waiting < len(tasks):
        await asyncio.sleep(0)
    held.notify()
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(released) == 32 and released[-3:] == ["c", "a", "b"]
    ready = False
    held.notify()
    ready = True
    held.notify()
    await asyncio.gather(*tasks)
    assert released[32:35] == ["c", "a", "b"]


@pytest.mark.anyio
async def test_client_that_leaves_is_not_refused_in_place_of_another() -> None:
    held = hold(lambda: False, limit=2)
    end = asyncio.get_running_loop().time() + 60
    older, newer = (asyncio.create_task(held.until(lambda: None, end, "a")) for _ in range(2))
    while held.waiting < 2:
        await asyncio.sleep(0)
    other = asyncio.create_task(held.until(lambda: "replica", end, "b"))
    newer.cancel()  # which its task notices after the other one has come
    with pytest.raises(Refused):
        await older
    with pytest.raises(asyncio.CancelledError):
        await newer
    held.stopping = True
    held.notify()
    assert await other == "replica"


@pytest.mark.anyio
async def test_request_that_no_replica_suited_keeps_its_place() -> None:
    """The first 32 of 33 tried once more; the 33rd is still the newest."""
    available = True
    held = hold(lambda: available, limit=33)
    end = asyncio.get_running_loop().time() + 60
    tasks = [asyncio.create_task(held.until(lambda: None, end, "a")) for _ in range(33)]
    while held.waiting < 33:
        await asyncio.sleep(0)
    held.notify()
    available = False
    for _ in range(5):
        await asyncio.sleep(0)
    tasks.append(asyncio.create_task(held.until(lambda: None, end, "b")))
    for _ in range(5):
        await asyncio.sleep(0)
    assert [task.done() for task in tasks] == [False] * 32 + [True, False]
    held.stopping = True
    held.notify()
    await asyncio.gather(*tasks, return_exceptions=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 8))
def test_room_is_shared_between_keys(arrivals: list[str], limit: int) -> None:
    """Of what waits, no key has more than one above another that was refused; the newest are refused."""

    async def run() -> None:
        held = hold(lambda: False, limit)
        end = asyncio.get_running_loop().time() + 60
        tasks: list[tuple[str, asyncio.Task[str | None]]] = []
        for key in arrivals:
            tasks.append((key, asyncio.create_task(held.until(lambda: None, end, key))))
            for _ in range(4):
                await asyncio.sleep(0)
            waiting = Counter(key for key, task in tasks if not task.done())
            refused = {key for key, task in tasks if task.done()}
            assert held.waiting == waiting.total() == min(len(tasks), limit)
            for key in refused:
                assert all(count <= waiting[key] + 1 for count in waiting.values())
                states = [task.done() for other, task in tasks if other == key]
                assert states == sorted(states)  # those that wait are its oldest
        for _, task in tasks:
            if task.done():
                assert isinstance(task.exception(), Refused)
        held.stopping = True
        held.notify()
        await asyncio.gather(*(task for _, task in tasks), return_exceptions=True)
        assert held.waiting == 0

    asyncio.run(run())


@pytest.mark.anyio
async def test_requests_that_come_at_once_take_no_more_than_their_keys_part() -> None:
    """Those that gave way count no longer, even before their tasks run."""
    held = hold(lambda: False, limit=10)
    end = asyncio.get_running_loop().time() + 60
    tasks = [asyncio.create_task(held.until(lambda: None, end, "a")) for _ in range(10)]
    while held.waiting < 10:
        await asyncio.sleep(0)
    tasks += [asyncio.create_task(held.until(lambda: None, end, "b")) for _ in range(8)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert [task.done() for task in tasks] == [False] * 5 + [True] * 5 + [False] * 5 + [True] * 3
    held.stopping = True
    held.notify()
    await asyncio.gather(*tasks, return_exceptions=True)
