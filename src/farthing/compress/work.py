"""A layer on its way from the source to the result.

Legend: T calibration tokens; D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from farthing.checkpoint.compressed_tensors import GroupKey
from farthing.compress.calibrate import Recorder
from farthing.compress.evaluate import page_of, paged_batch
from farthing.compress.layer import Layer, Stream, TracedOps, bfloat16_products, build
from farthing.memory import return_freed_memory
from farthing.ops.weights import Weight

CHUNK = 4096  # calibration tokens per forward pass
Advance = Callable[[float], None]  # called with the share of a part that is done


@dataclass(slots=True)
class Done:
    """One compressed module."""

    weight: Weight
    key: GroupKey | None
    input_scale: float | None
    report: dict[str, Any]


@dataclass(slots=True)
class LayerResult:
    """Result of `compress_layer` for the writer; the layer itself then has the compressed values."""

    modules: dict[str, Done] = field(default_factory=dict)
    coverage: dict[str, Any] | None = None


@dataclass(slots=True)
class LayerWork:
    """A layer on its way from the source to the result, as a recipe's `prepare` and `finish` change it."""

    layer: Layer
    recorder_of: Callable[[], Recorder]
    stream: Stream | None  # None: without calibration text
    embedding: Tensor
    final_norm: Tensor
    advance: Advance = lambda share: None
    recorder: Recorder | None = None  # of the inputs of the layer as it is now
    out: Tensor | None = None  # [T, D] of the layer when its inputs were recorded
    masks: dict[str, Tensor] = field(default_factory=dict)  # of pruned modules
    changes: dict[str, int] = field(default_factory=dict)  # of config.json
    healed: dict[str, Any] | None = None  # errors before and after healing, for the report
    originals: dict[str, Tensor] | None = None  # the reference for errors; None: the layer before rounding

    def record(self) -> None:
        """Record the layer's inputs."""
        self.recorder = self.recorder_of()
        with bfloat16_products():
            self.out = self.forward(self.recorder)
        return_freed_memory()  # the matrices in 16 bits, before the factors of second moments

    def forget(self) -> None:
        """Free the statistics, before the matrices of the second pass are held."""
        self.recorder = None
        return_freed_memory()

    def forward(self, ops: TracedOps, hidden: Tensor | None = None) -> Tensor:
        """The layer's output for every calibration token, or for other hidden states, [T, D]."""
        assert self.stream is not None
        stream = self.stream if hidden is None else replace(self.stream, hidden=hidden)
        return forward(self.layer, ops, stream, self.embedding, self.final_norm, self.advance)


def forward(
    layer: Layer,
    ops: TracedOps,
    stream: Stream,
    embedding: Tensor,
    final_norm: Tensor,
    advance: Advance = lambda share: None,
) -> Tensor:
    """The layer's output for every calibration token, [T, D]."""
    page = page_of(layer.config)
    block = build(layer, ops, embedding, final_norm, page)
    out = torch.empty_like(stream.hidden)
    for rows, lengths in stream.chunks(CHUNK):
        batch, blocks = paged_batch(lengths, page)
        batch = replace(batch, ids=stream.ids[rows])
        out[rows] = block(stream.hidden[rows], stream.next_ids[rows], batch, blocks)
        advance(rows.stop / len(out))
    return out
