"""Matrices of FP8 and FP4 numbers, whose scales several toolkits store in different shapes and encodings.

Legend: N rows, K columns. A factor multiplies, whatever its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as field_of
from math import prod
from typing import TYPE_CHECKING, Any

from farthing.checkpoint.layout import Parts, expect, field
from farthing.checkpoint.shards import CheckpointError
from farthing.lazy import torch
from farthing.ops import FP8_BLOCK, Format, Weight, as_float32, dtype_name, repeated

if TYPE_CHECKING:
    from torch import Tensor


BLOCK = 128
E4M3_MAX = 448.0
_E2M3 = (*range(8), *(8 + m << e for e in range(3) for m in range(8)))
E2M3 = (*_E2M3, *(-q for q in _E2M3))  # eight times the values
# Suffixes of a module's factor: DeepSeek-V3's and transformers', compressed-tensors', Mistral's, V4's.
SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")
# Calibrated factors of activations, which the kernels do not round to FP8.
ACTIVATION_SCALES = ("*input_scale", "*activation_scale", "*.qscale_act")
# Calibrated ranges of queries, keys and values, of which `farthing.model.attention` reads some.
CACHE_SCALES = ("*.self_attn.[qkv]_scale", "*.self_attn.[qkv]_zero_point", "*.self_attn.[kv]_proj.[kv]_scale")


_GROUPS = (32, 64, 128)  # columns that share a scale, as kernels read them


def ue8m0(scale: Tensor) -> Tensor:
    """Powers of two stored as their exponents, biased by 127, as float32."""
    if dtype_name(scale.dtype) == "uint8":
        return torch.exp2(scale.float() - 127)
    return as_float32(scale)


def fp8_scales(
    name: str,
    scale: Tensor,
    shape: tuple[int, int],
    block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK),
    declared: bool = False,
) -> Tensor:
    """The factors of a matrix of FP8 as `Weight` has them, from one number, one per row, or one per block.

    declared: the configuration states the blocks, so that fewer factors are of a damaged file.
    Equal factors are repeated where a block has other sizes than those that kernels read: 128 x 128, or one
    row by 32, 64 or 128 columns. The last block of a row or column may be ragged. Raises CheckpointError.
    """
    (n, k), scale = shape, ue8m0(scale)
    if scale.ndim == 4:  # ModelOpt's
        scale = scale.reshape(prod(scale.shape[:2]), prod(scale.shape[2:]))
    rows, columns = block
    blocks = (-(-n // rows), -(-k // columns))
    if prod(scale.shape) == 1 and (not declared or prod(blocks) == 1):
        return repeated(scale.reshape(1, 1), -(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
    if tuple(scale.shape) in ((n,), (n, 1)) and block[1] % FP8_BLOCK == 0 and not declared:
        return repeated(scale.reshape(n, 1), n, -(-k // FP8_BLOCK))
    if tuple(scale.shape) != blocks:
        others = "" if declared else f"one number, {n} rows or "
        raise CheckpointError(
            f"{name}: expected {others}shape {list(blocks)} (blocks of {rows} x {columns}), "
            f"found {list(scale.shape)}"
        )
    if block == (FP8_BLOCK, FP8_BLOCK):
        return scale
    width = next((g for g in reversed(_GROUPS) if columns % g == 0), 0)
    if not width or (width < FP8_BLOCK and k % width):
        raise CheckpointError(
            f"{name}: got blocks of {columns} of {k} columns; expected whole groups of 32, 64 or 128"
        )
    across = scale[:, torch.arange(0, k, width) // columns]
    return across.repeat_interleave(rows, 0)[:n].contiguous()


def fp8(data: Tensor, parts: Parts, block: tuple[int, int], declared: bool = False) -> Weight:
    """A matrix with its factor, under one of the names in SCALES."""
    suffix = next((s for s in SCALES if parts.has(s)), "weight_scale")
    n, k = data.shape
    return Weight("fp8", data, fp8_scales(suffix, parts.tensor(suffix), (n, k), block, declared))


def fp4(packed: Tensor, scale: Tensor, group: int) -> Weight:
    """E2M1 [N, K/2], two in a byte, the even column low, with factors float32 [N, K/g]. The integers of the
    format `mxfp4` are twice the values."""
    expect("weight_scale", (packed.shape[0], packed.shape[1] * 2 // group), scale)
    return Weight("mxfp4", packed.contiguous().view(torch.uint8), scale / 2)


@dataclass(frozen=True, slots=True)
class Fp4:
    """Scheme of E2M1 beside factors of groups: powers of two, or E4M3 with a second factor for all."""

    group_size: int = 32
    scale: str = "scale"  # suffix of the factors: DeepSeek-V4's
    second: str | None = None
    format: Format = "mxfp4"
    symmetric: bool = True

    def shape(self, parts: Parts) -> tuple[int, int]:
        """That of the matrix, two columns of which are in a byte."""
        n, pairs = parts.shape("weight")
        return n, 2 * pairs

    def read(self, parts: Parts) -> Weight:
        """The matrix with its factors."""
        dtypes = ("float8_e4m3fn",) if self.second else ("float8_e8m0fnu", "uint8")
        scale = ue8m0(parts.tensor(self.scale, *dtypes))
        scale = scale * parts.tensor(self.second).float() if self.second else scale
        return fp4(parts.matrix("weight", "int8", "uint8"), scale, self.group_size)


@dataclass(frozen=True, slots=True)
class Fp8:
    """Layout and scheme of E4M3 matrices beside a factor: of DeepSeek, transformers and Mistral."""

    block: tuple[int, int] = (FP8_BLOCK, FP8_BLOCK)
    experts: Fp4 | None = None  # of routed experts; None: the same
    declared: bool = field_of(default=False, compare=False)  # the configuration states the blocks
    format: Format = "fp8"
    group_size: None = None
    symmetric: bool = True

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Fp8:
        """From `quantization_config`, or params.json's `quantization`. Raises CheckpointError."""
        block = field(raw, "weight_block_size", list, "config.json: quantization_config")
        experts = Fp4() if raw.get("expert_dtype") == "fp4" else None
        if block is None:
            return cls(experts=experts)
        if len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block) or block[1] % _GROUPS[0]:
            raise CheckpointError(
                f"config.json: quantization_config.weight_block_size: got {str(block)[:80]}; expected rows "
                "and columns, these a multiple of 32, or null for one factor per matrix"
            )
        return cls((block[0], block[1]), experts, declared=True)

    @property
    def unread(self) -> Sequence[str]:
        """Calibrated factors of activations."""
        return ACTIVATION_SCALES

    def scheme(self, module: str) -> Fp8 | Fp4:
        """That of every module that has a factor."""
        return self.experts if self.experts and ".experts." in module else self

    def shape(self, parts: Parts) -> tuple[int, int]:
        """That of the stored matrix."""
        n, k = parts.shape("weight")
        return n, k

    def read(self, parts: Parts) -> Weight:
        """The matrix with its factors."""
        data = parts.matrix("weight", "float8_e4m3fn")
        return fp8(data, parts, self.block, self.declared)


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
