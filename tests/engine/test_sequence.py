"""Reference counts and reuse order of blocks, against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.engine.sequence import BlockPool, IntegrityError, PrefixCache


@given(
    st.lists(
        st.tuples(st.sampled_from(["allocate", "share", "release", "exchange"]), st.integers(0, 10)),
        max_size=60,
    )
)
@settings(max_examples=150, deadline=None)
def test_reference_counts_are_exact(actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(6)
    owners: list[list[int]] = []
    for action, number in actions:
        if action == "allocate" and number <= pool.num_free:
            owners.append(pool.allocate(number))
        elif action == "share" and owners:
            blocks = owners[number % len(owners)]
            pool.share(blocks)
            owners.append(list(blocks))
        elif action == "release" and owners:
            pool.release(reversed(owners.pop(number % len(owners))))
        elif action == "exchange":  # free or not: its owners now own the new block
            out, into = pool.blocks[number % 6], max(pool.blocks) + 1
            pool.exchange(out, into)
            owners = [[into if b == out else b for b in blocks] for blocks in owners]
        pool.check(owners)
        assert pool.num_free == 6 - len({b for blocks in owners for b in blocks})
    for blocks in owners:
        pool.release(blocks)
    assert pool.num_free == 6 and pool.usage == 0.0


def test_cached_blocks_are_reused_last_and_oldest_first() -> None:
    cached = {0, 1}
    reused: list[int] = []
    pool = BlockPool(4, reused.append, cached.__contains__)
    pool.release(pool.allocate(4))
    assert set(pool.allocate(2)) == {2, 3}
    assert pool.allocate(2) == [0, 1]
    assert reused == [0, 1, 2, 3, *reused[4:6], 0, 1]


def test_reused_blocks_are_neighbours_in_ascending_order() -> None:
    pool = BlockPool(12, is_cached=lambda block: True)
    first = pool.allocate(8)
    pool.release(reversed(first))  # the tail is reused first …
    assert pool.allocate(8) == [4, 5, 6, 7, 8, 9, 10, 11]  # … but not backwards


def test_exchanged_block_is_dropped_and_its_replacement_reused_first() -> None:
    cached, forgotten = {10, 11, 12}, []
    pool = BlockPool(3, forgotten.append, cached.__contains__, blocks=range(10, 13))
    pool.exchange(11, 5)
    assert forgotten == [11] and pool.allocate(1) == [5]
    with pytest.raises(IntegrityError, match=r"its owners hold others: \[11\]"):
        pool.check([[5], [11]])


def test_misuse_is_an_integrity_error() -> None:
    pool = BlockPool(2)
    with pytest.raises(IntegrityError, match="3 blocks asked of 2"):
        pool.allocate(3)
    with pytest.raises(IntegrityError, match="released more often"):
        pool.release([0])
    with pytest.raises(ValueError, match="num_blocks: got 0"):
        BlockPool(0)


@given(
    st.lists(st.integers(0, 2**40), max_size=24),
    st.lists(st.integers(0, 2**40), max_size=24),
    st.integers(1, 5),
)
@settings(deadline=None)
def test_equal_hashes_mean_equal_prefixes(a: list[int], b: list[int], size: int) -> None:
    cache = PrefixCache(size)
    hashes: list[list[bytes]] = [[], []]
    for tokens, into in zip((a, b), hashes, strict=True):
        cache.extend(into, tokens, "", len(tokens) // size)
        assert len(into) == len(tokens) // size
    for i, (x, y) in enumerate(zip(*hashes, strict=False), 1):
        assert (x == y) == (a[: i * size] == b[: i * size])


def test_match_register_forget() -> None:
    cache = PrefixCache(2)
    hashes: list[bytes] = []
    cache.extend(hashes, [1, 2, 3, 4], "salt", 2)
    cache.register(hashes[0], 7)
    cache.register(hashes[1], 8)
    cache.register(hashes[1], 9)  # a second copy stays unregistered
    assert cache.match(hashes) == [7, 8] and not cache.contains_block(9)
    cache.forget(7)
    assert cache.match(hashes) == [] and len(cache) == 1
    cache.check()
    cache._hash_of[3] = b"x"
    with pytest.raises(IntegrityError):
        cache.check()


@pytest.mark.parametrize(
    ("tokens", "found"), [([1, 2, 3, 4], 3), ([1, 2], 2), ([1, 9], None), ([9, 2, 3], None), ([], None)]
)
def test_tail_is_taken_by_the_same_tokens(tokens: list[int], found: int | None) -> None:
    cache = PrefixCache(4)
    cache.keep_tail([], "salt", [1, 2, 3], 7)
    assert cache.take_tail([], "other", tokens) is None
    assert cache.take_tail([], "salt", tokens) == (None if found is None else ([7], found))
    assert cache.contains_block(7) == (found is None)


def test_disabled_cache_stores_nothing() -> None:
    cache = PrefixCache(2, enabled=False)
    cache.register(b"h", 1)
    assert len(cache) == 0
