"""Move quantization difficulty between a matrix and its input: y = W x = (W diag(s)) (diag(1/s) x).

1/s is folded into the preceding norm (or up projection), so it costs nothing at run time. AWQ (Lin et al.
2023) chooses s to protect weights with large inputs; SmoothQuant (Xiao et al. 2022) chooses it so that
activations are easier to round. Legend: N rows; K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALPHAS = tuple(i / 10 for i in range(11))
Round = Callable[[Tensor, Tensor], Tensor]  # (w [N, K], gram [K, K]) -> its rounded value


@dataclass(frozen=True, slots=True)
class AwqScale:
    """The factor of the weights' columns, and the candidate that it comes from."""

    factor: Tensor  # [K]
    alpha: float
    duo: bool  # also divided by the weights' size
    error: float  # relative to factor 1


def awq_scale(
    weights: Sequence[Tensor], grams: Sequence[Tensor], magnitude: Tensor, round_to: Round
) -> AwqScale:
    """The factor with the least output error over the matrices that share the input.

    weights [N_i, K] with their grams [K, K] = sum of x x^T; magnitude [K] = mean |x|. Candidates:
    magnitude^alpha, and magnitude^alpha / size^(1 - alpha), where size is the mean |w| of a column relative
    to its row's largest. alpha = 0 changes nothing and is a candidate, so the error never grows.
    """
    x = magnitude.clamp_min(1e-8)
    size = torch.cat([w.abs() / w.abs().amax(1, keepdim=True).clamp_min(1e-20) for w in weights]).mean(0)
    trials = {(a, False): x.pow(a) for a in ALPHAS}
    trials |= {(a, True): x.pow(a) / (size.pow(1 - a) + 1e-4) for a in ALPHAS[:-1]}
    errors: dict[tuple[float, bool], float] = {}
    for key, trial in trials.items():
        s = trials[key] = normalized(trial)
        error = 0.0
        for w, gram in zip(weights, grams, strict=True):
            delta = round_to(w * s, gram / s.unsqueeze(1) / s) / s - w
            error += float(((delta @ gram) * delta).sum())
        errors[key] = error
    best = min(errors, key=errors.__getitem__)
    return AwqScale(trials[best], *best, errors[best] / max(errors[0.0, False], 1e-30))


def smooth_scale(weights: Sequence[Tensor], absmax: Tensor, alpha: float) -> Tensor:
    """SmoothQuant equation 4, as the factor on the weights: s_k = max|x_k|^alpha / max|W_k|^(1 - alpha)."""
    column = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    s = absmax.clamp_min(1e-5).pow(alpha) / column.clamp_min(1e-5).pow(1 - alpha)
    return s.clamp(1e-4, 1e4)


def normalized(s: Tensor) -> Tensor:
    """Normalize s to a geometric middle of 1, within 10^-4 to 10^4, so that both sides keep their range."""
    return (s / (s.max() * s.min()).sqrt()).clamp(1e-4, 1e4)
