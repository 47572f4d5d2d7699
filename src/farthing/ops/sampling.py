"""Sampling by inverse transform, in torch: the definition of `Ops.sample`.

Legend: n rows; V vocabulary; K candidates per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GROUP = 128  # of weights that are summed together
CANDIDATES = 256  # of a filtered row; a row whose kept set may be larger falls back to all of V


@dataclass(frozen=True, slots=True)
class Filters:
    """Which tokens of a row may be drawn: what min_p, top_k and top_p leave, in this order, as in vLLM."""

    top_k: Tensor  # [n] int64; V and more: every token
    top_p: Tensor  # [n] float32, of the mass that top_k and min_p leave
    min_p: Tensor  # [n] float32, of the likeliest token's probability
    most: int = 0  # the largest top_k that is a limit

    def candidates(self, vocabulary: int) -> int:
        """How many of the largest logits are looked at before all of them are."""
        return min(vocabulary, max(CANDIDATES, self.most))


def sample(logits: Tensor, uniform: Tensor, filters: Filters | None = None) -> Tensor:
    """See `Ops.sample`."""
    if filters is None:
        return invert(logits.softmax(-1), uniform)
    vocabulary = logits.shape[1]
    top_k, top_p, min_p = filters.top_k, filters.top_p, filters.min_p
    total = logits.logsumexp(-1, keepdim=True)
    width = filters.candidates(vocabulary)
    while True:
        values, ids = logits.topk(width, dim=-1)
        probs = (values - total).exp()  # [n, K] descending, of the unfiltered distribution
        rank = torch.arange(width, device=logits.device)
        by_min_p = probs >= min_p[:, None] * probs[:, :1]
        kept = probs * (by_min_p & (rank < top_k[:, None]))
        # Is everything that a filter keeps among the K largest? Else look at all of V.
        whole = (top_k <= width) | ~by_min_p[:, -1] | ((min_p == 0) & (probs.sum(-1) >= top_p) & (top_p < 1))
        if width == vocabulary or bool(whole.all()):
            break
        width = vocabulary
    # Without top_k and min_p the mass is all of V, of which `kept` may hold a part only.
    mass = torch.where((top_k >= vocabulary) & (min_p == 0), torch.ones_like(top_p), kept.sum(-1))
    before = kept.cumsum(-1) - kept
    kept = kept * (before < (top_p * mass)[:, None])
    return ids.gather(1, invert(kept, uniform)[:, None])[:, 0]


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """Index where the running sum of weights [n, K] passes u [n] of its total; never one of weight 0.

    Summed in float64, since thousands of float32 terms would drift; by groups first, and then within the
    group that was hit, since a running sum over all of V costs more than the softmax before it.
    """
    if weights.shape[1] <= _GROUP:
        return _invert_narrow(weights, u[:, None] * weights.sum(-1, keepdim=True, dtype=torch.float64))
    ragged = -weights.shape[1] % _GROUP
    groups = (torch.nn.functional.pad(weights, (0, ragged)) if ragged else weights).unflatten(1, (-1, _GROUP))
    mass = groups.sum(-1).cumsum(-1, dtype=torch.float64)
    target = u[:, None] * mass[:, -1:]
    group = torch.searchsorted(mass, target, right=True).clamp_max(mass.shape[1] - 1)
    before = torch.nn.functional.pad(mass, (1, 0)).gather(1, group)
    rows = torch.arange(len(group), device=group.device)
    return group[:, 0] * _GROUP + _invert_narrow(groups[rows, group[:, 0]], target - before)


def _invert_narrow(weights: Tensor, target: Tensor) -> Tensor:
    cdf = weights.cumsum(-1, dtype=torch.float64)
    # Rounding may put the target at the very end: then the last weight that is not zero is meant.
    last = (cdf < cdf[:, -1:]).sum(-1)
    return torch.minimum(torch.searchsorted(cdf, target, right=True)[:, 0], last)
