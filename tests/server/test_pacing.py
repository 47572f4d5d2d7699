"""A lock that clients acquire in turns."""

from __future__ import annotations

import asyncio

from farthing.server.pacing import FairLock


def test_client_with_one_request_waits_for_one_of_each_other() -> None:
    async def run() -> list[str]:
        lock, order = FairLock(), []

        async def work(client: str) -> None:
            await lock.acquire(client)
            await asyncio.sleep(0)
            order.append(client)
            lock.release()

        await asyncio.gather(*map(work, ["a", "a", "a", "a", "b", "c", "b"]))
        return order

    assert asyncio.run(run()) == ["a", "a", "b", "c", "a", "b", "a"]


def test_cancelled_request_passes_its_turn_on() -> None:
    async def run() -> bool:
        lock = FairLock()
        await lock.acquire("a")
        waiting = [asyncio.ensure_future(lock.acquire("a")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # while it waits
        await asyncio.sleep(0)
        lock.release()
        waiting[1].cancel()  # after it got the lock, before it runs
        await asyncio.wait_for(waiting[2], 1)
        lock.release()
        await asyncio.wait_for(lock.acquire("b"), 1)
        return True

    assert asyncio.run(run())
