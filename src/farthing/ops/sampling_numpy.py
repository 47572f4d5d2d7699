"""`farthing.ops.sampling` over numpy arrays, for models that are served without torch.

Legend: n rows; V vocabulary; K candidates per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from farthing.ops.arrays import largest, logsumexp

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
    top_k, top_p, min_p = (np.asarray(f) for f in (filters.top_k, filters.top_p, filters.min_p))
    total = np.asarray(logsumexp(logits))  # type: ignore[arg-type]
    width = filters.candidates(vocabulary)
    while True:
        values, ids = (np.asarray(a) for a in largest(logits, width))  # type: ignore[arg-type]
        probs = np.exp(values - total)
        by_min_p = probs >= min_p[:, None] * probs[:, :1]
        kept = probs * (by_min_p & (np.arange(width) < top_k[:, None]))
        # Are all kept tokens among the K largest? Otherwise use all of V.
        whole = (
            (top_k <= width)
            | ~by_min_p[:, -1]
            | ((min_p == 0) & (probs.sum(-1, dtype=np.float64) >= top_p) & (top_p < 1))
        )
        if width == vocabulary or bool(whole.all()):
            break
        width = vocabulary
    mass = np.where((top_k >= vocabulary) & (min_p == 0), 1.0, kept.sum(-1, dtype=np.float64))
    before = kept.cumsum(-1, dtype=np.float64) - kept  # float32 would drift by more than a token
    kept = kept * (before < (top_p * mass)[:, None])
    return ids[np.arange(len(ids)), invert(kept, uniform)]  # type: ignore[no-any-return]


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
