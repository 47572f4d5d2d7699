"""What calibrated rounding takes most time for, by the native module on a CPU that it was built for.

Legend: T tokens; B matrices; N rows; K columns; G groups of columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farthing.ops.arrays import address

try:
    from farthing import _native
except ImportError:  # installed without a compiler
    _native: Any = None  # type: ignore[no-redef]

_VECTOR = 16


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def runs(x: Tensor) -> bool:
    """Whether these functions take such a tensor, by its last dimension."""
    return _native is not None and x.device.type == "cpu" and x.shape[-1] % _VECTOR == 0


def short_products() -> bool:
    """Whether products with matrices are those of bfloat16 (`layer.bfloat16_products`)."""
    return fast_bfloat16() and torch.get_float32_matmul_precision() == "medium"


def add_moments(x: Tensor, moments: Tensor) -> None:
    """moments [K, K] += x^T x of x [T, K] float32, in the lower half alone."""
    x = x.contiguous()
    _native.add_moments(address(x), *x.shape, short_products(), address(moments), torch.get_num_threads())


Levels = tuple[float, float, bool]  # the least and greatest integer, and whether values are CODES instead


def search_ranges(
    w: Tensor, scale: Tensor, levels: Levels, energy: Tensor, factors: tuple[float, ...]
) -> Tensor:
    """The multiples of the scales [B, N, G] with the least rounding error of w [B, N, K], weighted by energy
    [B, K]."""
    b, n, k = w.shape
    groups = scale.shape[-1]
    w, scale = w.float().contiguous(), scale.float().contiguous().clone()
    energy = energy.float().expand(b, k).contiguous()
    tried = torch.tensor(factors)
    for i in range(b):
        _native.search_ranges(
            address(w[i]), address(energy[i]), address(scale[i]), n, groups, k // groups,
            address(tried), len(factors), *levels, torch.get_num_threads(),
        )  # fmt: skip
    return scale


def sweep(
    w: Tensor, factors: tuple[Tensor, Tensor, Tensor, Tensor], scale: Tensor, levels: Levels
) -> tuple[Tensor, Tensor]:
    """`quantize.sweep` to a grid without zero points. factors: order, lower, pivots and damping of
    `quantize.Feedback`."""
    b, n, k = w.shape
    order, lower, pivots, damping = (each.contiguous() for each in factors)
    w, scale = w.float().contiguous(), scale.float().contiguous()
    value, squared = torch.empty_like(w), torch.empty(b, n)
    for i in range(b):
        _native.sweep(
            address(w[i]), address(lower[i]), address(pivots[i]), address(order[i]), float(damping[i]),
            address(scale[i]), n, k, scale.shape[-1], *levels, address(value[i]), address(squared[i]),
            torch.get_num_threads(),
        )  # fmt: skip
    return value, squared.sum(1, dtype=torch.float64).float().clamp_min(0)
