"""Buckets of decode graphs; padding a step to its bucket changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from farthing.ops import make_batch
from farthing.ops.api import Batch
from farthing.ops.gpu.graphs import MOST_ROWS, DecodeGraphs, bucket, is_decode, width_bucket
from tests.ops.gpu.parts import DEVICE
from tests.ops.gpu.test_attention import moved


@given(st.integers(1, MOST_ROWS))
def test_bucket_fits_its_rows_closely(rows: int) -> None:
    size = bucket(rows)
    assert size is not None and rows <= size <= MOST_ROWS
    assert size < 2 * rows and size - rows < 32
    assert bucket(size) == size


def test_buckets_are_few() -> None:
    assert len({bucket(n) for n in range(1, MOST_ROWS + 1)}) == 4 + 7 + 14
    assert bucket(MOST_ROWS + 1) is None
    assert [width_bucket(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


def test_step_is_padded_with_its_first_row() -> None:
    graphs, seen = DecodeGraphs(), []

    def layers(hidden: torch.Tensor, batch: Batch, live: torch.Tensor) -> torch.Tensor:
        seen.append((hidden.clone(), batch.slots.clone(), int(live) if DEVICE.type == "cpu" else None))
        return hidden * 2

    def step(rows: int) -> torch.Tensor:
        batch = moved(make_batch([1] * rows, [17] * rows, [[i, i + 9] for i in range(rows)], 16))
        assert is_decode(batch)
        x = torch.randn(rows, 4, device=DEVICE)
        y = graphs.run("layers", layers, x, batch)
        assert torch.equal(y, x * 2)
        return y

    first = step(3)
    kept = first.clone()
    step(4)
    assert torch.equal(first, kept)  # a step's result is not overwritten by the next step
    assert len(graphs) == 1
    hidden, slots, live = seen[0]
    assert hidden.shape == (4, 4) and torch.equal(hidden[3], hidden[0])
    assert torch.equal(slots[3], slots[0])
    assert live in (3, None)
    step(5)
    assert len(graphs) == 2
