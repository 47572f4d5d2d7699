"""FP8 weights: E4M3 with one float32 factor per 128 x 128 block (DeepSeek-V3 sec. 3.3.2) or per matrix.

The factor is stored under one of the names in SCALES and multiplies, whatever its name: W = W8 * scale of its
block. One factor for a whole matrix is the same as equal factors for all of its blocks.
Shapes: W [N, K]; scale_inv [ceil(N/block), ceil(K/block)]; the last block of a row or column may be ragged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farthing.checkpoint.error import CheckpointError
from farthing.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
# Suffixes of a module's factor: DeepSeek's and transformers', compressed-tensors', Mistral's.
SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight")
# Calibrated factors of activations, which the kernels do not round to FP8.
ACTIVATION_SCALES = ("*input_scale", "*activation_scale", "*.qscale_act")
# Calibrated ranges of queries, keys and values (kv_cache_scheme); the latent cache has ranges of its own.
CACHE_SCALES = ("*.self_attn.[qkv]_scale", "*.self_attn.[qkv]_zero_point")


def block_scales(name: str, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """A stored factor as [ceil(N/128), ceil(K/128)] float32. Raises CheckpointError for other shapes."""
    blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).expand(blocks).contiguous()
    if tuple(scale.shape) != blocks:
        raise CheckpointError(
            f"{name}: expected one number or shape {list(blocks)} (blocks of {BLOCK}), "
            f"found {list(scale.shape)}"
        )
    return scale.float()


def quantize_blocks(w: Tensor, block: int = BLOCK, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """W [N, K] floating -> (float8_e4m3fn [N, K], float32 scale_inv [ceil(N/block), ceil(K/block)]).

    `ue8m0` rounds each scale up to a power of two, as DeepSeek-V3.1 stores them. A zero block gets scale 1.
    """
    _check_matrix("w", w)
    if not w.is_floating_point():
        raise ValueError(f"w has dtype {w.dtype}; expected a floating-point matrix")
    if not torch.isfinite(w).all():
        raise ValueError("w has inf or nan; expected finite weights")
    tiles = _tiles(w.float(), block)  # [rows, block, cols, block]
    amax = tiles.abs().amax(dim=(1, 3))
    scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    if ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scaled = (tiles / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return _untile(scaled, w.shape).to(torch.float8_e4m3fn), scale


def dequantize_blocks(
    w8: Tensor, scale_inv: Tensor, block: int = BLOCK, dtype: torch.dtype | None = None
) -> Tensor:
    """The inverse: (w8 [N, K] E4M3, scale_inv float32) -> W [N, K] in `dtype` (float32), multiplied in
    float32."""
    dtype = dtype or torch.float32
    _check_matrix("w8", w8)
    expected = (-(-w8.shape[0] // block), -(-w8.shape[1] // block))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scale_inv has shape {tuple(scale_inv.shape)}; expected {expected} for a {tuple(w8.shape)} "
            f"weight in blocks of {block}"
        )
    tiles = _tiles(w8.float(), block) * scale_inv.float()[:, None, :, None]
    return _untile(tiles, w8.shape).to(dtype)


def _check_matrix(name: str, w: Tensor) -> None:
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"{name} has shape {tuple(w.shape)}; expected a non-empty matrix [N, K]")


def _tiles(w: Tensor, block: int) -> Tensor:
    """[N, K] -> [rows, block, cols, block], zero-padded to whole blocks."""
    rows, cols = -(-w.shape[0] // block), -(-w.shape[1] // block)
    padded = torch.nn.functional.pad(w, (0, cols * block - w.shape[1], 0, rows * block - w.shape[0]))
    return padded.view(rows, block, cols, block)


def _untile(tiles: Tensor, shape: torch.Size) -> Tensor:
    rows, block, cols, _ = tiles.shape
    return tiles.reshape(rows * block, cols * block)[: shape[0], : shape[1]].contiguous()
