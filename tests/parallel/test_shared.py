"""Collectives through shared memory between threads: sums, order, sizes beyond a slot, a lost peer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.ops.weights import PeerLost
from farthing.parallel.shared import Arena, SharedGroup, arena_bytes, available

pytestmark = pytest.mark.skipif(not available(), reason="needs /dev/shm on x86-64")
SLOT = 4096


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(arena_bytes([4], SLOT))
    arena.unlink()
    yield arena


def run(arena: Arena, size: int, work: Callable[[SharedGroup], Any], crowded: bool = True) -> list[Any]:
    """Run every rank in a thread."""
    arena.bytes.zero_()
    groups = [SharedGroup(arena, 0, size, i, 30.0, SLOT, crowded=crowded) for i in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, groups))


def parts(size: int, rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(97 * rank + size)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("elements", [1, 1023, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_the_same_bits_everywhere(
    arena: Arena, size: int, elements: int, dtype: torch.dtype
) -> None:
    results = run(
        arena, size, lambda g: [g.all_reduce(parts(i, g.index, (elements,), dtype)) for i in range(6)]
    )
    for i in range(6):
        expected = parts(i, 0, (elements,), dtype)
        for rank in range(1, size):
            expected = expected + parts(i, rank, (elements,), dtype)
        for result in results:
            assert torch.equal(result[i], expected)


def native(group: SharedGroup) -> Any:
    module = pytest.importorskip("farthing._native")
    return module.SharedSum(*astuple(group.shared_sum()))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 301), (9, 300), (1, 1024)])
@pytest.mark.parametrize("crowded", [True, False])
def test_native_sums_follow_the_same_protocol(
    arena: Arena, size: int, rows: int, columns: int, crowded: bool
) -> None:
    """Interleaved with Python's collectives, on strided rows, in several chunks."""

    def work(g: SharedGroup) -> list[torch.Tensor]:
        out = []
        for i in range(6):
            x = torch.full((rows, columns + 5), 7.0)
            x[:, :columns] = parts(i, g.index, (rows, columns))
            native(g).add(x.data_ptr(), columns + 5, rows, columns)
            assert (x[:, columns:] == 7).all()
            out += [x[:, :columns], g.all_reduce(parts(i, g.index, (rows, columns)))]
        return out

    for result in run(arena, size, work, crowded):
        for i in range(6):
            assert torch.equal(result[2 * i], result[2 * i + 1])


def test_native_sum_times_out(arena: Arena) -> None:
    arena.bytes.zero_()
    group, lost = SharedGroup(arena, 0, 2, 0, 30.0, SLOT), pytest.importorskip("farthing._native").PeerLost
    threading.Timer(0.2, arena.abort).start()
    x = torch.ones(1, 3)
    with pytest.raises(lost, match="another rank has failed"):
        native(group).add(x.data_ptr(), 3, 1, 3)
    arena.bytes.zero_()
    with pytest.raises(lost, match=r"rank 1 of a group of 2 did not answer in 0\.2 s"):
        native(SharedGroup(arena, 0, 2, 0, 0.2, SLOT)).add(x.data_ptr(), 3, 1, 3)
    with pytest.raises(ValueError, match="slots that hold a row"):
        native(group).add(x.data_ptr(), 2000, 1, 2000)


def test_gather_and_broadcast_interleaved(arena: Arena) -> None:
    def work(g: SharedGroup) -> list[torch.Tensor]:
        out: list[torch.Tensor] = []
        for i in range(8):  # a slot must not be overwritten before slow readers finish
            out += g.all_gather(parts(i, g.index, (7, 200)))
            x = parts(i, 9, (7, 300)) if g.index == i % g.size else torch.empty(7, 300)
            out.append(g.broadcast(x, i % g.size))
        return out

    for result in run(arena, 3, work):
        for i in range(8):
            gathered, sent = result[4 * i : 4 * i + 3], result[4 * i + 3]
            assert all(torch.equal(x, parts(i, rank, (7, 200))) for rank, x in enumerate(gathered))
            assert torch.equal(sent, parts(i, 9, (7, 300)))


@given(rows=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=3, max_size=3))
@settings(max_examples=15, deadline=None)
def test_all_to_all(rows: list[list[int]]) -> None:
    arena = Arena.create(arena_bytes([3], SLOT))
    arena.unlink()

    def part(source: int, target: int) -> torch.Tensor:
        return parts(source, target, (rows[source][target], 301))

    received = run(arena, 3, lambda g: g.all_to_all([part(g.index, j) for j in range(3)]))
    for target in range(3):
        assert all(torch.equal(received[target][source], part(source, target)) for source in range(3))


def test_lost_peer_wakes_waiting_ranks(arena: Arena) -> None:
    arena.bytes.zero_()
    group = SharedGroup(arena, 0, 2, 0, 30.0, SLOT)
    threading.Timer(0.2, arena.abort).start()
    with pytest.raises(PeerLost, match="another rank has failed"):
        group.all_reduce(torch.ones(3))


def test_silent_peer_times_out(arena: Arena) -> None:
    arena.bytes.zero_()
    group = SharedGroup(arena, 0, 2, 0, 0.2, SLOT)
    with pytest.raises(PeerLost, match=r"rank 1 of a group of 2 did not answer in 0.2 s"):
        group.all_reduce(torch.ones(3))
