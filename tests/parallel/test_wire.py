"""Batches on their way to ranks and in parts keep the blocks of windows and the slots of states."""

from __future__ import annotations

import torch

from farthing.ops.api import Batch, Blocks
from farthing.parallel.plan import own_sequences, rows_of
from farthing.parallel.worker import from_wire, to_wire


def batch_of_three() -> Batch:
    """Sequences of 2, 1 and 3 new tokens."""

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    table = torch.arange(6, dtype=torch.int32).view(3, 2)
    return Batch(
        positions=ints(0, 1, 4, 0, 1, 2),
        slots=torch.arange(6),
        query_start=ints(0, 2, 3, 6),
        context_lens=ints(2, 5, 3),
        block_table=table,
        state_slots=ints(7, 8, 9),
        state_sources=ints(7, 2, 9),
        windows={4: Blocks(torch.arange(6) + 50, table + 10)},
    )


def same(a: Batch, b: Batch) -> bool:
    assert a.state_slots is not None and b.state_slots is not None
    assert a.state_sources is not None and b.state_sources is not None
    pairs = [(a.positions, b.positions), (a.state_slots, b.state_slots), (a.block_table, b.block_table)]
    pairs.append((a.state_sources, b.state_sources))
    for window, own in a.windows.items():
        other = b.windows[window]
        pairs += [(own.slots, other.slots), (own.block_table, other.block_table)]
    return all(torch.equal(x, y) for x, y in pairs) and a.windows.keys() == b.windows.keys()


def test_a_batch_survives_the_wire() -> None:
    batch = batch_of_three()
    assert same(from_wire(to_wire(batch), torch.device("cpu")), batch)


def test_rows_of_a_batch_keep_their_windows_and_slots() -> None:
    part = rows_of(batch_of_three(), 2, 5)
    assert part.state_slots is not None and part.state_slots.tolist() == [8, 9]
    assert part.state_sources is not None and part.state_sources.tolist() == [2, 9]
    assert part.windows[4].slots.tolist() == [52, 53, 54]
    assert part.windows[4].block_table.tolist() == [[12, 13], [14, 15]]
    assert part.of(4).slots.tolist() == [52, 53, 54] and part.of(None) is part


def test_sequences_of_one_copy_keep_their_windows_and_slots() -> None:
    rows, own = own_sequences(batch_of_three(), copies=4, copy=2)
    assert rows.tolist() == [2]
    assert own.state_slots is not None and own.state_slots.tolist() == [8]
    assert own.state_sources is not None and own.state_sources.tolist() == [2]
    assert own.windows[4].slots.tolist() == [52]
