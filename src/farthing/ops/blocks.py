"""Block sparsity of the CPU kernels: matrices of integers without their zero blocks of 16 x 16 weights.

A panel of 16 rows is cut into cells of 64 columns (native/cells.h). Cells without weights are not stored; the
others cost time that depends on their number of blocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from farthing.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 16
CELL = 64  # columns
Costs = tuple[float, float, float, float]
NEVER: Costs = (math.inf,) * 4  # also where nothing but zeros would be left out
ALWAYS: Costs = (0.0, 0.0, 0.0, 0.0)
# Time of a cell with 1, 2, 3 and 4 blocks relative to the same columns of a dense panel, the most of several
# numbers of rows, by instruction set (docs/lab/cpu-kernels.md). A matrix is stored block-sparse if this saves
# time. On AMX it was not measured, and dense panels take tiles where cells take AVX-512, so all stay dense.
COSTS: dict[str, dict[str, Costs]] = {
    "amx": {},
    "avx512": {
        "int8": (0.45, 0.65, 0.91, 1.17),
        "int4": (0.59, 0.77, 0.96, 1.12),
        "nl4": (0.54, 0.72, 0.89, 1.08),
    },
    "avx2": {
        "int8": (0.65, 0.69, 0.85, 1.00),
        "int4": (0.30, 0.45, 0.64, 1.00),
        "nl4": (0.36, 0.56, 0.79, 1.14),
    },
    "portable": {
        "int8": (0.34, 0.60, 0.86, 1.01),
        "int4": (0.32, 0.61, 0.86, 1.00),
        "nl4": (0.30, 0.61, 0.93, 1.14),
    },
}


def blocks_per_cell(keep: Tensor, group: int) -> Tensor:
    """Number of blocks with a weight in every cell of `keep` [N, K], as [N / 16, cells].

    group: columns that share a scale, which limits the width of a cell. K is a multiple of 64.
    """
    n, k = keep.shape
    padded = torch.nn.functional.pad(keep, (0, 0, 0, -n % BLOCK))
    blocks = padded.view(-1, BLOCK, k // BLOCK, BLOCK).any(3).any(1)
    return blocks.view(blocks.shape[0], -1, min(group, CELL) // BLOCK).sum(2)


def measured_for(isa: str) -> str:
    """The key of `COSTS` for an instruction set's kernels."""
    return next((s for s in COSTS if isa.startswith(s)), "avx512")


def costs_of(kind: str, isa: str = "avx512") -> Costs:
    """The costs of a stored format (never block-sparse if it has none) with an instruction set's kernels."""
    return COSTS[measured_for(isa)].get(kind, NEVER)


def saves_time(counts: Tensor, kind: str, group: int, isa: str = "avx512") -> bool:
    """Whether the kernels are faster with the block-sparse form; counts and group: see `blocks_per_cell`.

    Costs are those of 64 columns; a cell of a narrower group is a part of one.
    """
    costs = costs_of(kind, isa)
    if costs == NEVER:
        return False
    return float(torch.tensor((0.0, *costs))[counts * (CELL // min(group, CELL))].sum()) < counts.numel()
