"""Which range the input of a matrix is rounded in: the candidate whose output errs least wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farthing.compress.calibrate.histogram import Histogram
from farthing.compress.calibrate.observers import OBSERVERS, Observer
from farthing.compress.simulate import round_tensor, round_token

TINY = 1e-12
REFINE = (0.6, 0.7, 0.8, 0.87, 0.94, 1.0, 1.06, 1.13, 1.25, 1.4, 1.6)


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
    """rows [t, K] a sample of inputs; weights (original, rounded) [N_i, K] of the matrices they meet.

    The error is ||x^ W^^T - x W^T||^2 / ||x W^T||^2 over the sample, rounding of both sides included. With
    `dynamic`, one scale a token is a candidate too.
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
    if (
        len(observers) > 1 and best in scales
    ):  # what is asked for is the least error, so look on around the best of them
        start = scales[best]
        trials = {start * f: error(round_tensor(rows, torch.tensor(start * f))) for f in REFINE}
        scales["measured"] = min(trials, key=trials.__getitem__)
        errors["measured"] = trials[scales["measured"]]
    winner = min(errors, key=errors.__getitem__)
    return Choice(winner, scales.get(winner), errors)
