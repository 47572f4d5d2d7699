"""Rows of the paged latent cache in torch. Legend: see `farthing.ops.api`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farthing.lazy import torch
from farthing.ops.api import LatentCache
from farthing.ops.arrays import dtype_name

if TYPE_CHECKING:
    from torch import Tensor

CACHE_DTYPES: dict[str, str] = {  # names of dtypes
    "float32": "float32",
    "bfloat16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "int8": "int8",
}
CACHE_MAX = {"float8_e4m3fn": 448.0, "int8": 127.0}


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a cache."""
    return getattr(torch, CACHE_DTYPES[dtype])  # type: ignore[no-any-return]


def cache_max(dtype: Any) -> float | None:
    """The largest number of an 8-bit cache, by the dtype of its tensor; None for others."""
    return CACHE_MAX.get(dtype_name(dtype))


def empty_cache(
    shape: tuple[int, int, int], width: int, dtype: torch.dtype, device: torch.device
) -> LatentCache:
    """Rows of zeros: shape (layers, blocks, block size); scales of 1 if the cache is 8-bit."""
    scale = torch.ones(*shape, 2, device=device) if cache_max(dtype) else None
    return LatentCache(torch.zeros(*shape, width, dtype=dtype, device=device), scale)


def write_cache(cache: LatentCache, layer: int, slots: Tensor, latent: Tensor, k_pe: Tensor) -> None:
    """Store latent [T, c] and k_pe [T, r], quantized per token and part if the cache is 8-bit."""
    data = cache.data[layer].flatten(0, 1)
    if cache.scale is None:
        data[slots] = torch.cat((latent, k_pe), -1).to(data.dtype)
        return
    top = CACHE_MAX[dtype_name(data.dtype)]
    scale = torch.stack([p.float().abs().amax(-1) / top for p in (latent, k_pe)], -1).clamp_min(
        1e-20
    )  # [T, 2]
    parts = [p.float() / scale[:, i : i + 1] for i, p in enumerate((latent, k_pe))]
    values = torch.cat(parts, -1)
    data[slots] = (values.round() if data.dtype == torch.int8 else values).clamp(-top, top).to(data.dtype)
    cache.scale[layer].flatten(0, 1)[slots] = scale


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
