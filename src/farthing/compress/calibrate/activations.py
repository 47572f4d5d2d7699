"""Choose the range of a matrix's input: the candidate with the least output error wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farthing.compress.calibrate.histogram import Histogram
from farthing.compress.calibrate.observers import OBSERVERS, Observer
from farthing.compress.simulate import round_tensor, round_token

TINY = 1e-12
# (from, to, points) of successively finer grids of multiples.
SPANS = ((0.5, 2.0, 25), (0.95, 1.053, 21), (0.99, 1.01, 21), (0.9985, 1.0015, 31))


@dataclass(frozen=True, slots=True)
class Choice:
    """The winner, its scale (None: dynamic per token), and every candidate's relative output error."""

    winner: str  # kl | mse | percentile | minmax | measured (between them) | token
    scale: float | None
    errors: dict[str, float]


def choose(
    histogram: Histogram,
    rows: Tensor,
    weights: Sequence[tuple[Tensor, Tensor]],
    observers: Sequence[Observer],
    dynamic: bool,
) -> Choice:
    """Choose the input range of matrices that read the same input, from a sample of its rows [t, K].

    weights: (original, rounded) [N_i, K] of each matrix. The error is ||x^ W^^T - x W^T||^2 / ||x W^T||^2
    over the sample, with both sides rounded. With `dynamic`, one scale per token is also a candidate.
    """
    original = torch.cat([w for w, _ in weights])
    rounded = torch.cat([r for _, r in weights])
    exact = rows @ original.t()
    norm = float(exact.square().sum()) or 1.0

    def error(x: Tensor) -> float:
        return float((x @ rounded.t() - exact).square().sum()) / norm

    scales: dict[str, float] = {o: max(OBSERVERS[o](histogram) / 127, TINY) for o in observers}
    errors: dict[str, float] = {o: error(round_tensor(rows, torch.tensor(s))) for o, s in scales.items()}
    if dynamic:
        errors["token"] = error(round_token(rows))
    best = min(errors, key=errors.__getitem__)
    if len(observers) > 1 and best in scales:  # search further around the best of them
        scales["measured"], errors["measured"] = refine(
            scales[best], lambda scale: error(round_tensor(rows, torch.tensor(scale)))
        )
    winner = min(errors, key=errors.__getitem__)
    return Choice(winner, scales.get(winner), errors)


def refine(start: float, error: Callable[[float], float]) -> tuple[float, float]:
    """The multiple of `start` with the least error, and that error.

    The error is smooth in the scale except for ripples of a few per mille. Refining a grid three times around
    its best point finds the valley and one of its deepest ripples.
    """
    known = {start: error(start)}
    for low, high, points in SPANS:
        centre = min(known, key=known.__getitem__)
        for i in range(points):
            scale = centre * low * (high / low) ** (i / (points - 1))
            known.setdefault(scale, error(scale))
    best = min(known, key=known.__getitem__)
    return best, known[best]
