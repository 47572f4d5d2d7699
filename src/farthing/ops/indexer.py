"""The lightning indexer in torch: which cached tokens a query attends to (DeepSeek-V3.2-Exp, section 2.1).

I[t, s] = sum over h of w[t, h] * ReLU(q[t, h] . k[s] * d^-1/2) * H^-1/2, for every cached s up to t's own
position; attention runs over the top_k largest. Ties are common, because every head's ReLU may be 0; they go
to the earlier position on every backend.

Legend: T tokens of the step; H index heads; d their size, of which the first r are rotated; S cached tokens;
K selected positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.ops.api import CACHE_MAX, IndexCache, Place
from farthing.ops.arrays import dtype_name
from farthing.ops.specs import IndexerSpec
from farthing.ops.torch_util import rotate


@dataclass(frozen=True, slots=True)
class Indexer:
    """A packed indexer: norm and rotation of its keys."""

    spec: IndexerSpec
    norm: Tensor  # [d] float32
    bias: Tensor  # [d] float32
    rope: Tensor  # [2, max_len, r/2] float32


def index(q: Tensor, k: Tensor, w: Tensor, indexer: Indexer, place: Place) -> Tensor | None:
    """`Ops.index` in torch, in float32."""
    s, cache, row, batch = indexer.spec, place.cache.index, place.row, place.batch
    assert cache is not None
    cos, sin = indexer.rope[:, batch.positions.long()].unbind(0)  # [T, r/2]
    write_keys(cache, row, batch.slots, prepared_keys(k, indexer, cos, sin))
    if int(batch.context_lens.max()) <= s.top_k:
        return None
    q = rotated(q.float().unflatten(-1, (s.num_heads, s.head_dim)), cos[:, None], sin[:, None], s)
    w = w.float() * (s.num_heads * s.head_dim) ** -0.5
    out = torch.full((q.shape[0], s.top_k), -1, dtype=torch.int32, device=q.device)
    for b, (start, stop) in enumerate(pairwise(batch.query_start.tolist())):
        keys = read_keys(cache, row, batch.block_table[b], int(batch.context_lens[b]))
        scores = torch.einsum("thd,sd->ths", q[start:stop], keys).relu()
        scores = torch.einsum("th,ths->ts", w[start:stop], scores)
        seen = torch.arange(keys.shape[0], device=q.device) <= batch.positions[start:stop, None]
        chosen = top_positions(scores.masked_fill(~seen, float("-inf")), s.top_k)
        out[start:stop, : chosen.shape[1]] = chosen
    return out


def prepared_keys(k: Tensor, indexer: Indexer, cos: Tensor, sin: Tensor) -> Tensor:
    """k [T, d] in cache format: LayerNorm, then rotation; cos, sin [T, r/2]."""
    s = indexer.spec
    normed = F.layer_norm(k.float(), (s.head_dim,), indexer.norm, indexer.bias, s.norm_eps)
    return rotated(normed, cos, sin, s)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, spec: IndexerSpec) -> Tensor:
    """x [..., d] with its first r elements rotated."""
    turned, rest = x.split((spec.rope_dim, spec.head_dim - spec.rope_dim), -1)
    return torch.cat((rotate(turned, cos, sin, spec.interleaved), rest), -1)


def top_positions(scores: Tensor, k: int) -> Tensor:
    """Positions of each row's k largest, ascending, padded with -1: scores [t, S] -> [t, min(k, S)] int32.

    Minus infinity and NaN are never selected; ties go to the earlier position.
    """
    k = min(k, scores.shape[1])
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    least = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, (scores == least) & (scores > float("-inf"))
    room = k - above.sum(-1, keepdim=True)
    taken = above | (equal & (equal.cumsum(-1) <= room))
    place = torch.where(taken, taken.cumsum(-1) - 1, k)  # unselected entries go to the last column
    positions = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device).expand_as(place)
    out = torch.full((scores.shape[0], k + 1), -1, dtype=torch.int32, device=scores.device)
    return out.scatter_(1, place, positions)[:, :k]


def write_keys(cache: IndexCache, row: int, slots: Tensor, keys: Tensor) -> None:
    """Store keys [T, d], with one scale per token if the cache is 8-bit."""
    data = cache.data[row].flatten(0, 1)
    if cache.scale is None:
        data[slots] = keys.to(data.dtype)
        return
    top = CACHE_MAX[dtype_name(data.dtype)]
    scale = (keys.abs().amax(-1) / top).clamp_min(1e-20)
    values = keys / scale.unsqueeze(-1)
    data[slots] = (values.round() if data.dtype == torch.int8 else values).clamp(-top, top).to(data.dtype)
    cache.scale[row].flatten(0, 1)[slots] = scale


def read_keys(cache: IndexCache, row: int, blocks: Tensor, length: int) -> Tensor:
    """The first `length` cached keys of a sequence, float32 [S, d]."""
    size = cache.data.shape[2]
    used = blocks[: (length + size - 1) // size].long()
    keys = cache.data[row][used].flatten(0, 1)[:length].float()
    if cache.scale is not None:
        keys = keys * cache.scale[row][used].flatten(0, 1)[:length, None]
    return keys
