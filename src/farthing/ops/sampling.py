"""Sampling by inverse transform, in torch: the definition of `Ops.sample`.

Legend: n rows; V vocabulary; K candidates per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from farthing.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_GROUP = 128  # number of weights summed together
CANDIDATES = 256  # per filtered row; a row that may keep more falls back to all of V


@dataclass(frozen=True, slots=True)
class Filters:
    """Filters of a row's tokens: min_p, top_k and top_p, applied in this order, as in vLLM."""

    top_k: Tensor  # [n] int64; V or more: every token
    top_p: Tensor  # [n] float32, relative to the mass kept by top_k and min_p
    min_p: Tensor  # [n] float32, relative to the most likely token's probability

    def at(self, rows: Tensor) -> Filters:
        """The filters of some rows."""
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def sample(logits: Tensor, uniform: Tensor, filters: Filters | None = None) -> Tensor:
    """See `Ops.sample`."""
    if filters is None:
        return invert(logits.softmax(-1), uniform)
    vocabulary = logits.shape[1]
    width = min(vocabulary, CANDIDATES)  # whatever other rows ask for: sums of more weights round differently
    tokens, whole = _sample_among(logits, uniform, filters, width)
    if width < vocabulary and not bool(whole.all()):
        # Sorting all of V takes several times as long as the rest of a step, so only rows that need it do.
        rows = (~whole).nonzero()[:, 0]
        tokens[rows] = _sample_among(logits[rows], uniform[rows], filters.at(rows), vocabulary)[0]
    return tokens


def _sample_among(logits: Tensor, uniform: Tensor, filters: Filters, width: int) -> tuple[Tensor, Tensor]:
    """Sample among the `width` largest logits. Returns also whether these include all that filters keep."""
    vocabulary = logits.shape[1]
    top_k, top_p, min_p = filters.top_k, filters.top_p, filters.min_p
    total = logits.logsumexp(-1, keepdim=True)
    values, ids = logits.topk(width, dim=-1)
    probs = (values - total).exp()  # [n, K] descending, of the unfiltered distribution
    rank = torch.arange(width, device=logits.device)
    by_min_p = probs >= min_p[:, None] * probs[:, :1]
    kept = probs * (by_min_p & (rank < top_k[:, None]))
    # Without top_k and min_p the mass is over all of V, of which `kept` may be only a part.
    open_end = (top_k >= vocabulary) & (min_p == 0)
    whole = (top_k <= width) | ~by_min_p[:, -1] | (open_end & (probs.sum(-1) >= top_p) & (top_p < 1))
    mass = torch.where(open_end, torch.ones_like(top_p), kept.sum(-1))
    before = kept.cumsum(-1) - kept
    kept = kept * (before < (top_p * mass)[:, None])
    return ids.gather(1, invert(kept, uniform)[:, None])[:, 0], whole


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """Index where the running sum of weights [n, K] exceeds u [n] of its total; never at weight 0.

    Sums are float64, because thousands of float32 terms would drift. They run over groups first and then
    within the selected group, because a running sum over all of V costs more than the softmax before it.
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
    # Rounding may move the target past the end; then take the last nonzero weight.
    last = (cdf < cdf[:, -1:]).sum(-1)
    return torch.minimum(torch.searchsorted(cdf, target, right=True)[:, 0], last)
