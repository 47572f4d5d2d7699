"""Move difficulty between a matrix and what feeds it: y = W x = (W diag(s)) (diag(1/s) x).

1/s is folded into the norm (or the up projection) in front, so nothing is computed at run time.
AWQ (Lin et al. 2023) picks s to protect weights that meet large inputs; SmoothQuant (Xiao et al. 2022)
picks it so that activations are easier to round. Legend: N rows; K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ALPHAS = tuple(i / 10 for i in range(11))
Round = Callable[[Tensor, Tensor], Tensor]  # (w [N, K], energy [K]) -> its rounded value


def awq_scale(
    weights: Sequence[Tensor], grams: Sequence[Tensor], magnitude: Tensor, round_to: Round
) -> tuple[Tensor, float]:
    """s [K] = magnitude^alpha, with the alpha of least output error over the matrices that share the input.

    weights [N_i, K] with their grams [K, K]; magnitude [K] = mean |x|. alpha = 0 leaves everything alone and
    is among the candidates, so the error never grows. Returns (s, alpha).
    """
    best, least = (torch.ones_like(magnitude), 0.0), float("inf")
    for alpha in ALPHAS:
        s = _normalized(magnitude.clamp_min(1e-8).pow(alpha))
        error = 0.0
        for w, gram in zip(weights, grams, strict=True):
            delta = round_to(w * s, gram.diagonal() / s.square()) / s - w
            error += float(((delta @ gram) * delta).sum())
        if error < least:
            best, least = (s, alpha), error
    return best


def smooth_scale(weights: Sequence[Tensor], absmax: Tensor, alpha: float) -> Tensor:
    """SmoothQuant equation 4, as the factor on the weights: s_k = max|x_k|^alpha / max|W_k|^(1 - alpha)."""
    column = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    s = absmax.clamp_min(1e-5).pow(alpha) / column.clamp_min(1e-5).pow(1 - alpha)
    return s.clamp(1e-4, 1e4)


def _normalized(s: Tensor) -> Tensor:
    """Geometric middle at 1, so that neither side leaves its range; at most 10^4 either way."""
    return (s / (s.max() * s.min()).sqrt()).clamp(1e-4, 1e4)
