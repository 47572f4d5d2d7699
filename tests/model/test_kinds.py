"""What models keep per token and per sequence, and how a cache is sized for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from farthing.model.kinds import CacheKind, Sizing, StateShape

FULL = CacheKind((1, 3), rows=2, width=128)
WINDOW = CacheKind((0, 2), rows=2, width=128, window=128)
RECURRENT = (0, 1, 2)
STATE = CacheKind(RECURRENT, state=tuple(StateShape(RECURRENT, s) for s in ((4, 8, 8), (3, 64))))


def test_bytes_per_token_and_sequence() -> None:
    assert FULL.token_bytes("bfloat16") == 2 * 2 * 128 * 2
    assert FULL.token_bytes("int8") == 2 * 2 * (128 + 8)
    assert CacheKind((), index_rows=3, index_width=16).token_bytes("fp8") == 3 * (16 + 4)
    assert STATE.token_bytes("bfloat16") == 0
    assert STATE.state_bytes == 3 * 4 * (4 * 8 * 8 + 3 * 64)
    assert [kind.name for kind in (FULL, WINDOW, STATE)] == ["full", "window of 128", "state"]


@given(
    kinds=st.sampled_from([(FULL,), (FULL, WINDOW), (FULL, STATE), (CacheKind(()), WINDOW)]),
    sequences=st.integers(1, 40),
    blocks=st.integers(1, 4000),
)
def test_checkpoints_take_at_most_as_much_as_blocks_or_sequences(
    kinds: tuple[CacheKind, ...], sequences: int, blocks: int
) -> None:
    sizing = Sizing(kinds, "bfloat16", 16, 256)
    count = sizing.checkpoints(sequences, blocks)
    fixed = sizing.used(0, sizing.sizes(sequences, 0))
    kept = sizing.used(0, sizing.sizes(sequences, count)) - fixed
    assert (count == 0) == (len(kinds) == 1)
    assert kept <= max(blocks * 16 * kinds[0].token_bytes("bfloat16"), fixed)


@given(kinds=st.sampled_from([(FULL,), (FULL, STATE)]), tokens=st.integers(0, 1 << 20))
def test_another_token_takes_what_is_planned(kinds: tuple[CacheKind, ...], tokens: int) -> None:
    sizing = Sizing(kinds, "bfloat16", 16, 256)

    def total(blocks: int) -> int:
        return sizing.used(blocks, sizing.sizes(8, sizing.checkpoints(8, blocks)))

    blocks = tokens // 16
    assert total(blocks) <= total(0) + blocks * 16 * sizing.token_bytes
