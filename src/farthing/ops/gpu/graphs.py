"""CUDA graphs of decode steps: one launch for all kernels of a step's layers.

A step of B sequences with one token each runs in the graph of the next larger bucket. Its inputs are copied
into the graph's own tensors. Rows beyond B repeat the first row, so that they write the same values to the
cache, and select no expert. A graph is captured on the first use of its bucket.

Without CUDA nothing is captured: the same buckets and copies are used, then the layers run directly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farthing.ops.api import Batch

# (hidden [T, D], batch, live [1] int32: how many of its rows are real) -> hidden [T, D]
Layers = Callable[[Tensor, Batch, Tensor], Tensor]
MOST_ROWS = 512
_WARM_UP = 2  # runs before capture, to compile kernels and create cuBLAS handles


def bucket(rows: int) -> int | None:
    """Rows of the graph for a batch: 1, 2, 4, 8, steps of 8 to 64, steps of 32 to 512; None above."""
    if rows > MOST_ROWS:
        return None
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


def width_bucket(blocks: int) -> int:
    """Columns of the graph's block table: a power of two."""
    return 1 << max(0, blocks - 1).bit_length()


def is_decode(batch: Batch) -> bool:
    """Whether every sequence has one token."""
    return batch.positions.shape[0] == batch.context_lens.shape[0]


@dataclass(slots=True)
class _Inputs:
    """Input tensors of a graph; each step is copied into them."""

    hidden: Tensor
    batch: Batch
    live: Tensor

    @classmethod
    def of(cls, rows: int, width: int, hidden: Tensor) -> _Inputs:
        device = hidden.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        batch = Batch(
            positions=zeros(rows),
            slots=zeros(rows).long(),
            query_start=torch.arange(rows + 1, dtype=torch.int32, device=device),
            context_lens=zeros(rows) + 1,
            block_table=zeros(rows, width),
        )
        return cls(hidden.new_zeros(rows, hidden.shape[1]), batch, zeros(1))

    def fill(self, hidden: Tensor, batch: Batch) -> None:
        rows, width = batch.block_table.shape
        own = self.batch
        pairs = (
            (self.hidden, hidden),
            (own.positions, batch.positions),
            (own.slots, batch.slots),
            (own.context_lens, batch.context_lens),
            (own.block_table[:, :width], batch.block_table),
        )
        for to, source in pairs:
            to[:rows].copy_(source)
            if rows < len(to):
                to[rows:].copy_(source[:1].expand_as(to[rows:]))
        self.live.fill_(rows)


@dataclass(slots=True)
class _Captured:
    inputs: _Inputs
    graph: torch.cuda.CUDAGraph | None
    output: Tensor | None


class DecodeGraphs:
    """One graph per bucket, block table width, and set of layers."""

    def __init__(self) -> None:
        self._captured: dict[tuple[int, int, Hashable], _Captured] = {}
        self._pool: Any = None  # memory shared by all graphs, as only one runs at a time

    def run(self, key: Hashable, layers: Layers, hidden: Tensor, batch: Batch) -> Tensor:
        """Run `layers` on a decode step. key identifies their other inputs: cache, counts, layers."""
        rows, width = batch.block_table.shape
        size = bucket(rows)
        if size is None:
            return layers(hidden, batch, torch.full((1,), rows, dtype=torch.int32, device=hidden.device))
        at = size, width_bucket(width), key
        found = self._captured.get(at)
        if found is None:
            found = self._captured[at] = _Captured(_Inputs.of(size, at[1], hidden), None, None)
            found.inputs.fill(hidden, batch)
            if hidden.is_cuda:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                _capture(found, layers, self._pool)
        else:
            found.inputs.fill(hidden, batch)
        if found.graph is None:
            out = layers(found.inputs.hidden, found.inputs.batch, found.inputs.live)
        else:
            found.graph.replay()
            assert found.output is not None
            out = found.output
        return out[:rows].clone()

    def __len__(self) -> int:
        return len(self._captured)


def _capture(captured: _Captured, layers: Layers, pool: Any) -> None:
    """Warm-up runs read and write the step's own cache rows, as the step itself does afterwards."""
    inputs = captured.inputs
    live = inputs.live.clone()
    inputs.live.zero_()  # no token selects an expert, so warm-up adds no counts
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            layers(inputs.hidden, inputs.batch, inputs.live)
    torch.cuda.current_stream().wait_stream(stream)
    captured.graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured.graph, pool=pool):
        captured.output = layers(inputs.hidden, inputs.batch, inputs.live)
    inputs.live.copy_(live)
