"""Masks of matrices (True = keep), and the schedule by which training reaches a sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

# Masks of matrices: True = keep. Legend: N rows; K columns; B matrices.

Pattern = Literal["unstructured", "2:4", "16x64", "16x16", "16x4", "4x1"]
Score = Literal["magnitude", "wanda", "energy", "obs"]  # "obs": see `prune.py`
BLOCKS: dict[str, tuple[int, int]] = {
    "16x64": (16, 64),  # a cell of the CPU kernels (native/linear/cells.h)
    "16x16": (16, 16),
    "16x4": (16, 4),
    "4x1": (4, 1),
    "unstructured": (1, 1),
}


def scores(w: Tensor, energy: Tensor | None, kind: Score) -> Tensor:
    """Importance of each weight of w [N, K], as [N, K].

    magnitude: |w|; wanda: |w| * ||x_k|| (Sun et al. 2023); energy: w^2 E[x_k^2], wanda's square. Summed over
    a block, it is the output energy that the block loses if inputs are uncorrelated.
    """
    if kind == "magnitude":
        return w.abs()
    if energy is None:
        raise ValueError(f"score {kind!r} needs calibration data; expected energy per column, or 'magnitude'")
    return w.abs() * energy.sqrt() if kind == "wanda" else w.square() * energy


def block_scores(score: Tensor, block: tuple[int, int]) -> Tensor:
    """Sum over blocks, [ceil(N / r), ceil(K / c)]; ragged blocks are scaled to a full block."""
    r, c = block
    n, k = score.shape
    padded = torch.nn.functional.pad(score, (0, -k % c, 0, -n % r))
    sums = padded.view(padded.shape[0] // r, r, padded.shape[1] // c, c).sum((1, 3))
    if n % r == 0 and k % c == 0:
        return sums
    ones = torch.nn.functional.pad(torch.ones_like(score), (0, -k % c, 0, -n % r))
    return sums * (r * c) / ones.view(padded.shape[0] // r, r, padded.shape[1] // c, c).sum((1, 3))


def mask(score: Tensor, sparsity: float, pattern: Pattern = "unstructured", per_row: bool = False) -> Tensor:
    """Keep the best 1 - sparsity of score [N, K] under a pattern.

    unstructured with per_row: the share applies to every row (Wanda's comparison group). 2:4: the two best of
    every four along K, ignoring `sparsity`. Blocks: whole blocks are removed.
    """
    check_sparsity(sparsity)
    n, k = score.shape
    if pattern == "2:4":
        return two_of_four(score)
    if pattern == "unstructured" and per_row:
        drop = round(sparsity * k)
        keep = torch.ones_like(score, dtype=torch.bool)
        return keep.scatter_(1, score.argsort(1)[:, :drop], False)
    r, c = BLOCKS[pattern]
    blocks = block_scores(score, (r, c))
    keep_block = _best(blocks.flatten(), sparsity).view(blocks.shape)
    return keep_block.repeat_interleave(r, 0)[:n].repeat_interleave(c, 1)[:, :k]


def two_of_four(score: Tensor) -> Tensor:
    """The two best of every four consecutive columns."""
    n, k = score.shape
    if k % 4:
        raise ValueError(f"2:4 sparsity needs a multiple of 4 columns, found {k}")
    best = score.view(n, k // 4, 4).topk(2, dim=-1).indices
    return torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(2, best, True).view(n, k)


def global_budgets(all_scores: Mapping[str, Tensor], sparsity: float, most: float = 0.9) -> dict[str, float]:
    """The share that each matrix loses when one threshold cuts all of them (blocks or weights).

    Scores must be comparable across matrices; if they are not, divide each by its mean first. No matrix loses
    more than `most`; the excess is not taken from others.
    """
    check_sparsity(sparsity)
    flat = torch.cat([s.flatten() for s in all_scores.values()])
    drop = round(sparsity * flat.numel())
    if not drop:
        return dict.fromkeys(all_scores, 0.0)
    threshold = flat.kthvalue(drop).values
    return {name: min(float((s <= threshold).double().mean()), most) for name, s in all_scores.items()}


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raise ValueError, naming the field, unless 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"{name}: got {sparsity}; expected a share in [0, 1)")


def _best(values: Tensor, sparsity: float) -> Tensor:
    drop = round(sparsity * values.numel())
    keep = torch.ones_like(values, dtype=torch.bool)
    keep[values.argsort()[:drop]] = False
    return keep


def cubic_sparsity(step: int, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """Sparsity at `step`: f + (i - f) (1 - t)^3, from `initial` at `begin` to `final` at `end`.

    Sparsity schedule during training (Zhu and Gupta 2017, "To prune, or not to prune").
    """
    if end <= begin:
        raise ValueError(f"end: got {end}; expected a step after begin = {begin}")
    t = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final + (initial - final) * (1 - t) ** 3
