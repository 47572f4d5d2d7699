"""A layer of Gated DeltaNet: a recurrent state per sequence instead of cached keys (Qwen3-Next, Qwen3.5).

Legend: T tokens; D hidden size; Hk key heads; Hv value heads; dk, dv their sizes; C channels of the
convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from farthing.lazy import np
from farthing.model.forms import DeltaHeads
from farthing.model.source import LayerSource, WeightSource
from farthing.ops.api import Handle, LayerHandles, Norm, Place
from farthing.ops.arrays import as_float32, contiguous, host, like
from farthing.ops.cut import Cut, cut_weight
from farthing.ops.specs import DeltaParts
from farthing.ops.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor


class GatedDelta:
    """One layer's recurrence with its input norm and residual."""

    def __init__(self, at: LayerSource, heads: DeltaHeads, norm: Norm) -> None:
        ops, weights = at.ops, at.weights
        p, d = at.prefix + "linear_attn.", at.config.hidden_size
        self.ops, self.norm = ops, norm
        self.qkvz = ops.pack_linear(p + "qkvz", lambda: _qkvz(weights, p, heads, d))
        self.gates = ops.pack_linear(p + "ba", lambda: _gates(weights, p, heads, d))
        self.delta = ops.pack_delta(p + "delta", heads.spec, lambda: _parts(weights, p, heads))
        o_shape = (d, heads.spec.values)
        self.o = ops.pack_linear(
            p + "out_proj", lambda: [weights.weight(p + "out_proj", o_shape)], heads.spec.value_heads
        )

    def __call__(self, h: Tensor, place: Place, select: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """h [T, D] -> h + recurrence(norm(h)) [T, D]; also returns `select` as it is."""
        ops = self.ops
        x = ops.linear(h, self.qkvz, self.norm)  # [T, C + Hv dv]
        gates = ops.linear(h, self.gates, self.norm)  # [T, 2 Hv]
        out = ops.delta(x, gates, self.delta, place)  # [T, Hv dv]
        return ops.linear(out, self.o, residual=h), select

    def handles(self, feed_norm: Norm, feed: Handle) -> LayerHandles:
        """Of the layer, for `Ops.stack`."""
        return LayerHandles(
            self.norm, self.qkvz, 0, None, None, self.delta, self.o, feed_norm, feed, rows=0, gates=self.gates
        )


def _qkvz(weights: WeightSource, p: str, heads: DeltaHeads, d: int) -> list[Weight]:
    """The rows of all queries, keys, values and output gates, in this order."""
    s = heads.spec
    if not heads.fused:
        rows = {"qkv": s.channels, "z": s.values}
        return [weights.weight(f"{p}in_proj_{name}", (n, d)) for name, n in rows.items()]
    whole = weights.weight(p + "in_proj_qkvz", (s.channels + s.values, d))
    values = s.value_heads // s.key_heads * s.value_dim
    return _by_part(whole, s.key_heads, (s.key_dim, s.key_dim, values, values))


def _gates(weights: WeightSource, p: str, heads: DeltaHeads, d: int) -> list[Weight]:
    """The rows of b and a."""
    s = heads.spec
    if not heads.fused:
        return [weights.weight(f"{p}in_proj_{name}", (s.value_heads, d)) for name in "ba"]
    whole = weights.weight(p + "in_proj_ba", (2 * s.value_heads, d))
    return _by_part(whole, s.key_heads, (s.value_heads // s.key_heads,) * 2)


def _by_part(weight: Weight, heads: int, widths: Sequence[int]) -> list[Weight]:
    """Rows that are stored head by head, each with parts of these widths, as the same part of all heads."""
    ends = np.cumsum([0, *widths]).tolist()
    return [
        cut_weight(weight, Cut(0, head * ends[-1] + start, head * ends[-1] + stop))
        for start, stop in pairwise(ends)
        for head in range(heads)
    ]


def _parts(weights: WeightSource, p: str, heads: DeltaHeads) -> DeltaParts:
    s = heads.spec

    def vector(name: str, *shape: int) -> Tensor:
        return as_float32(weights.tensor(p + name, shape))

    conv = vector("conv1d.weight", s.channels, 1, s.width)[:, 0].T
    rate = vector("A_log", s.value_heads)
    return DeltaParts(
        contiguous(conv),
        like(-np.exp(host(rate)), rate),
        vector("dt_bias", s.value_heads),
        vector("norm.weight", s.value_dim),
    )
