"""The FP8 product on a GPU's FP8 units (Hopper and newer), through torch's scaled matrix product.

torch expects the scales of 1 x 128 groups column-major and those of 128 x 128 blocks row-major, with rows
padded to a multiple of four.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128


def scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """a [M, K] b^T, b [N, K] FP8 with scales [M | M/128, K/128] and [N | N/128, K/128] -> [M, N] bfloat16."""
    rows, columns, inner = a.shape[0], b.shape[0], a.shape[1]
    if inner % 16 or columns % 16:
        raise ValueError(f"K and N of an FP8 product: got {inner} and {columns}; expected multiples of 16")
    out: Tensor = torch._scaled_mm(
        a.contiguous(),
        b.contiguous().t(),
        scale_a=_layout(a_scale, rows, inner),
        scale_b=_layout(b_scale, columns, inner).t(),
        out_dtype=torch.bfloat16,
    )
    return out


def _layout(scale: Tensor, rows: int, inner: int) -> Tensor:
    """The scale of a [rows, inner] matrix in the memory layout that torch expects."""
    groups = -(-inner // GROUP)
    if scale.shape[1] != groups:
        raise ValueError(f"scale has {scale.shape[1]} groups; expected {groups} of {GROUP} columns")
    if scale.shape[0] in (rows, 1) and not (rows <= GROUP and scale.shape[0] == 1 and rows != 1):
        return scale.expand(rows, groups).t().contiguous().t()
    padded = scale.new_ones(scale.shape[0], -(-groups // 4) * 4)
    padded[:, :groups] = scale
    return padded[:, :groups]
