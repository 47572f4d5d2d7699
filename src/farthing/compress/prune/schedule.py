"""Sparsity schedule during training (Zhu and Gupta 2017, "To prune, or not to prune")."""

from __future__ import annotations


def cubic_sparsity(step: int, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """Sparsity at `step`: f + (i - f) (1 - t)^3, from `initial` at `begin` to `final` at `end`."""
    if end <= begin:
        raise ValueError(f"end: got {end}; expected a step after begin = {begin}")
    t = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final + (initial - final) * (1 - t) ** 3
