"""What backends on torch share: index tensors, cache rows, rotary embedding, copies of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from farthing.lazy import np, torch
from farthing.ops.api import CACHE_MAX, Batch, LatentCache
from farthing.ops.arrays import dtype_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DeviceCopies:
    """Copies on one device, each made once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the host tensor, which is kept alive

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor itself if it is on the device, else its copy there."""
        if tensor.device.type == self._device.type:
            return tensor
        kept = self._copies.get(id(tensor))
        if kept is None:
            kept = self._copies[id(tensor)] = (tensor, tensor.to(self._device))
        return kept[1]


def make_batch(
    num_new: Sequence[int],
    num_cached: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    state_slots: Sequence[int] | None = None,
) -> Batch:
    """The batch that appends num_new[b] >= 1 tokens to sequence b with num_cached[b] cached tokens.

    block_tables[b] lists the blocks of sequence b in order and must reach its last new token. Without
    state_slots a sequence's slot has the number of its first block.
    """
    new = np.asarray(num_new, np.int64)
    cached = np.asarray(num_cached, np.int64)
    start = np.zeros(len(new) + 1, np.int64)
    np.cumsum(new, out=start[1:])
    width = max(len(table) for table in block_tables)
    table = np.zeros((len(new), width), np.int64)
    for b, blocks in enumerate(block_tables):
        table[b, : len(blocks)] = blocks
    sequence = np.repeat(np.arange(len(new)), new)
    positions = np.arange(start[-1]) - start[sequence] + cached[sequence]
    slots = table[sequence, positions // block_size] * block_size + positions % block_size
    return Batch(
        positions=torch.from_numpy(positions.astype(np.int32)),
        slots=torch.from_numpy(slots),
        query_start=torch.from_numpy(start.astype(np.int32)),
        context_lens=torch.from_numpy((new + cached).astype(np.int32)),
        block_table=torch.from_numpy(table.astype(np.int32)),
        state_slots=torch.from_numpy(
            table[:, 0].astype(np.int32) if state_slots is None else np.asarray(state_slots, np.int32)
        ),
    )


# Rows of the paged latent cache in torch. Legend: see `farthing.ops.api`.


def cache_max(dtype: Any) -> float | None:
    """The largest number of an 8-bit cache, by the dtype of its tensor; None for others."""
    return CACHE_MAX.get(dtype_name(dtype))


def write_cache(cache: LatentCache, layer: int, slots: Tensor, latent: Tensor, k_pe: Tensor) -> None:
    """Store latent [T, c] and k_pe [T, r], quantized per token and part if the cache is 8-bit."""
    data = cache.data[layer].flatten(0, 1)
    data[slots], scale = quantized(latent, k_pe, data.dtype)
    if cache.scale is not None and scale is not None:
        cache.scale[layer].flatten(0, 1)[slots] = scale


def quantized(
    latent: Tensor, k_pe: Tensor, dtype: torch.dtype, fixed: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Rows [..., c + r] in a cache's dtype, with the scales [..., 2] of their parts if it is 8-bit: `fixed`
    ones in FP8, if there are such."""
    top = cache_max(dtype)
    if top is None:
        return torch.cat((latent, k_pe), -1).to(dtype), None
    both = latent.float(), k_pe.float()
    scale = torch.stack([p.abs().amax(-1) / top for p in both], -1).clamp_min(1e-20)
    if fixed is not None and dtype == torch.float8_e4m3fn:
        scale = scale.new_tensor(fixed) + 0 * scale  # NaN where a number is not finite
    values = torch.cat([p / scale[..., i : i + 1] for i, p in enumerate(both)], -1)
    return (values.round() if dtype == torch.int8 else values).clamp(-top, top).to(dtype), scale


def read_cache(cache: LatentCache, layer: int, blocks: Tensor, length: int, latent_dim: int) -> Tensor:
    """The first `length` cached rows of a sequence, float32 [S, c + r]."""
    used = blocks[: (length + cache.block_size - 1) // cache.block_size].long()
    rows = cache.data[layer][used].flatten(0, 1)[:length].float()
    if cache.scale is None:
        return rows
    return scaled(rows, cache.scale[layer][used].flatten(0, 1)[:length], latent_dim)


def scaled(rows: Tensor, scale: Tensor, latent_dim: int) -> Tensor:
    """Rows [..., c + r] of an 8-bit cache times the scales [..., 2] of their parts."""
    return torch.cat((rows[..., :latent_dim] * scale[..., :1], rows[..., latent_dim:] * scale[..., 1:]), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of x [..., r] by cos, sin [..., r/2], in float32."""
    x32 = x.float()
    a, b = (x32[..., 0::2], x32[..., 1::2]) if interleaved else x32.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return out.to(x.dtype)
