"""Block sparsity of the CPU kernels: matrices of integers without their zero blocks of 16 x 16 weights.

A panel of 16 rows is cut into cells of 64 columns (native/cells.h). Cells without weights are not stored; the
others cost time that depends on their number of blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farthing.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 16
CELL = 64  # columns
Costs = tuple[float, float, float, float]
# Time of a cell with 1, 2, 3 and 4 blocks relative to the same columns of a dense panel: the most of 1, 2, 4,
# 16, 64 and 512 rows (docs/lab/cpu-kernels.md). A matrix is stored block-sparse if this saves time.
_FOUR_BITS: Costs = (0.38, 0.63, 0.89, 1.06)  # measured with int4; nl4 has the same loops
COSTS: dict[str, Costs] = {"int8": (0.41, 0.65, 0.86, 1.10), "int4": _FOUR_BITS, "nl4": _FOUR_BITS}
NEVER: Costs = (2.0, 2.0, 2.0, 2.0)
ALWAYS: Costs = (0.0, 0.0, 0.0, 0.0)


def blocks_per_cell(keep: Tensor, group: int) -> Tensor:
    """Number of blocks with a weight in every cell of `keep` [N, K], as [N / 16, cells].

    group: columns that share a scale, which limits the width of a cell. K is a multiple of 64.
    """
    n, k = keep.shape
    padded = torch.nn.functional.pad(keep, (0, 0, 0, -n % BLOCK))
    blocks = padded.view(-1, BLOCK, k // BLOCK, BLOCK).any(3).any(1)
    return blocks.view(blocks.shape[0], -1, min(group, CELL) // BLOCK).sum(2)


def saves_time(counts: Tensor, kind: str, group: int) -> bool:
    """Whether the kernels are faster with the block-sparse form; counts and group: see `blocks_per_cell`.

    Costs are those of 64 columns; a cell of a narrower group is a part of one.
    """
    costs = torch.tensor((0.0, *COSTS[kind]))
    return float(costs[counts * (CELL // min(group, CELL))].sum()) < counts.numel()
