"""A lock and a gate that clients pass in turns."""

from __future__ import annotations

import asyncio

from farthing.server.pacing import FairLock, Gate


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


def test_a_burst_begins_a_few_at_a_time_and_does_not_pass_other_clients() -> None:
    began: list[tuple[str, int]] = []
    turn = 0

    async def run() -> None:
        nonlocal turn
        gate = Gate(per_turn=4)

        async def request(client: str) -> None:
            await gate.enter(client)
            began.append((client, turn))

        burst = [asyncio.ensure_future(request("bad")) for _ in range(100)]
        await asyncio.sleep(0)
        burst.append(asyncio.ensure_future(request("good")))
        while not all(task.done() for task in burst):
            turn += 1
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        assert gate._left == 4
        await asyncio.wait_for(gate.enter("late"), 1)

    asyncio.run(run())
    turns = [turn for _, turn in began]
    assert max(turns.count(each) for each in set(turns)) <= 4 and len(began) == 101
    assert [client for client, _ in began].index("good") < 12
