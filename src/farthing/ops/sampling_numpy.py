"""`farthing.ops.sampling` over numpy arrays, for models that are served without torch.

Legend: n rows; V vocabulary; K candidates per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from farthing.ops.arrays import largest, logsumexp
from farthing.ops.sampling import CANDIDATES

if TYPE_CHECKING:
    from farthing.ops.sampling import Filters

Floats = NDArray[np.floating[Any]]
_GROUP = 128  # number of weights summed together


def sample(logits: Floats, uniform: Floats, filters: Filters | None = None) -> NDArray[np.int64]:
    """See `Ops.sample`."""
    if filters is None:
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return invert(weights, uniform)
    vocabulary = logits.shape[1]
    width = min(vocabulary, CANDIDATES)
    tokens, whole = _sample_among(logits, uniform, filters, width)
    if width < vocabulary and not whole.all():
        rows: Any = np.flatnonzero(~whole)
        tokens[rows] = _sample_among(logits[rows], uniform[rows], filters.at(rows), vocabulary)[0]
    return tokens


def _sample_among(
    logits: Floats, uniform: Floats, filters: Filters, width: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """See `farthing.ops.sampling._sample_among`."""
    vocabulary = logits.shape[1]
    top_k, top_p, min_p = (np.asarray(f) for f in (filters.top_k, filters.top_p, filters.min_p))
    total = np.asarray(logsumexp(logits))  # type: ignore[arg-type]
    values, ids = (np.asarray(a) for a in largest(logits, width))  # type: ignore[arg-type]
    probs = np.exp(values - total)
    by_min_p = probs >= min_p[:, None] * probs[:, :1]
    kept = probs * (by_min_p & (np.arange(width) < top_k[:, None]))
    open_end = (top_k >= vocabulary) & (min_p == 0)
    enough = open_end & (probs.sum(-1, dtype=np.float64) >= top_p) & (top_p < 1)
    whole = (top_k <= width) | ~by_min_p[:, -1] | enough
    mass = np.where(open_end, 1.0, kept.sum(-1, dtype=np.float64))
    before = kept.cumsum(-1, dtype=np.float64) - kept  # float32 would drift by more than a token
    kept = kept * (before < (top_p * mass)[:, None])
    return ids[np.arange(len(ids)), invert(kept, uniform)], whole


def invert(weights: Floats, u: Floats) -> NDArray[np.int64]:
    """See `farthing.ops.sampling.invert`: sums over groups first, then within the selected group."""
    rows, width = weights.shape
    found = np.empty(rows, np.int64)
    for row in range(rows):
        w, at = weights[row], 0
        if width <= _GROUP:
            target = u[row] * w.sum(dtype=np.float64)
        else:
            mass = np.add.reduceat(w, np.arange(0, width, _GROUP)).cumsum(dtype=np.float64)
            target = u[row] * mass[-1]
            group = min(int(mass.searchsorted(target, "right")), len(mass) - 1)
            target -= mass[group - 1] if group else 0.0
            at = group * _GROUP
            w = w[at : at + _GROUP]
        cdf = w.cumsum(dtype=np.float64)
        # Rounding may move the target past the end; then take the last nonzero weight.
        last = int(cdf.searchsorted(cdf[-1], "left"))
        found[row] = at + min(int(cdf.searchsorted(target, "right")), last)
    return found
