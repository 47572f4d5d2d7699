"""Four ways to choose the clipping threshold of a symmetric int8 range.

KL follows the entropy calibration of Migacz ("8-bit inference with TensorRT", 2017) without its usual bugs:
counts are 64-bit, the range grows at a constant bin width, every candidate is tried, an outlier cannot push
the threshold up to absmax / 16, and smoothing acts on normalized counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from farthing.compress.calibrate.histogram import BINS, Histogram

Observer = Literal["kl", "mse", "percentile", "minmax"]
LEVELS = 128  # of |x| in symmetric int8
EPS = 1e-4  # smallest probability after smoothing


def kl_threshold(histogram: Histogram, levels: int = LEVELS) -> float:
    """The threshold whose quantized distribution has the least KL divergence from the clipped one."""
    if not len(histogram.counts):
        return 0.0
    top = search_range(histogram)
    candidates = torch.arange(levels, BINS + 1)
    best = int(candidates[divergences(histogram.rebin(top), candidates, levels).argmin()])
    return top * best / BINS


def search_range(histogram: Histogram) -> float:
    """absmax, or 4 times the 99.99th percentile if an outlier dominates.

    The smallest candidate is 1/16 of the searched range. Without this cut, an outlier beyond 16 times the
    bulk would determine the threshold.
    """
    bulk = histogram.quantile(0.9999)
    return min(histogram.absmax, 4 * bulk) if bulk < histogram.absmax / 16 else histogram.absmax


def divergence(counts: Tensor, i: int, levels: int) -> float:
    """KL(P || Q) of candidate i: P = counts[:i] with the tail added to its last bin; Q = counts[:i] without
    the tail, merged into `levels` and spread evenly over the non-empty bins."""
    kept = counts[:i]
    p = kept.clone()
    p[-1] += counts[i:].sum()
    level = torch.arange(i) * levels // i
    nonzero = (kept > 0).double()
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, kept)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, nonzero)
    q = (mass / bins.clamp_min(1))[level] * nonzero
    if not float(q.sum()):
        return float("inf")
    p, q = smooth(p / p.sum()), smooth(q / q.sum())
    return float((p * (p / q).log()).sum())


def divergences(counts: Tensor, candidates: Tensor, levels: int = LEVELS) -> Tensor:
    """`divergence` of every candidate at once, float64 [n].

    Q is constant within a level, so sums over bins come from cumulative sums: with P = h / total, the
    candidate's KL is sum p log p - sum over levels (mass of p) log q. Only the last bin, which has the tail,
    and the smoothing mass need special handling.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    mass = torch.cat((zero, counts.cumsum(0)))  # mass[i] = sum of counts[:i]
    filled = torch.cat((zero, (counts > 0).double().cumsum(0)))
    entropy = torch.cat((zero, torch.xlogy(counts, counts).cumsum(0)))
    i = candidates
    edges = (torch.arange(levels + 1) * i.unsqueeze(1) + levels - 1) // levels  # [n, levels + 1]
    level_mass, level_bins = mass[edges].diff(), filled[edges].diff()
    total, inside = mass[-1], mass[i]
    last, tail = counts[i - 1], mass[-1] - mass[i]
    floor = EPS / i.double()
    orphan = (last == 0) & (tail > 0)  # the tail's bin is empty in Q
    keep_p = 1 - floor * (i - filled[i] - orphan.double())
    keep_q = 1 - floor * (i - filled[i])
    log_q = (level_mass / level_bins.clamp_min(1) / inside.unsqueeze(1) * keep_q.unsqueeze(1)).log()
    cross = torch.where(level_mass > 0, level_mass * log_q, 0).sum(1)  # sum of h log q over filled bins
    h_log_h = entropy[i] - torch.xlogy(last, last) + torch.xlogy(last + tail, last + tail)
    log_q_last = torch.where(
        orphan, floor.log(), log_q.gather(1, ((i - 1) * levels // i).unsqueeze(1)).squeeze(1)
    )
    cross = cross + torch.where(tail > 0, tail * log_q_last, 0)
    mean_log_p = h_log_h / total + (keep_p.log() - total.log())
    result = keep_p * (mean_log_p - cross / total)
    return torch.where(inside > 0, result, torch.inf)


def smooth(p: Tensor) -> Tensor:
    """Give every empty bin EPS / bins, taken proportionally from the others; p keeps its sum of 1."""
    empty = p == 0
    floor = EPS / len(p)
    taken = floor * int(empty.sum())
    return torch.where(empty, torch.full_like(p, floor), p * (1 - taken))


def mse_threshold(histogram: Histogram, levels: int = LEVELS, candidates: int = 100) -> float:
    """The threshold with the least mean squared error of rounding and clipping, from the bin centres."""
    if not len(histogram.counts):
        return 0.0
    top = search_range(histogram)
    counts = histogram.rebin(top, 2 * BINS)
    centre = (torch.arange(len(counts), dtype=torch.float64) + 0.5) * top / len(counts)
    centre[-1] = max(histogram.absmax if top < histogram.absmax else 0.0, float(centre[-1]))
    thresholds = torch.linspace(top / candidates, top, candidates, dtype=torch.float64)
    scale = (thresholds / (levels - 1)).unsqueeze(1)
    value = (centre / scale).round_().clamp_(max=levels - 1).mul_(scale)
    return float(thresholds[int(((value - centre).square_() @ counts).argmin())])


def percentile_threshold(histogram: Histogram, share: float = 0.9999) -> float:
    """The `share` quantile of the values."""
    return histogram.quantile(share)


def minmax_threshold(histogram: Histogram) -> float:
    """The largest value seen."""
    return histogram.absmax


OBSERVERS: dict[Observer, Callable[[Histogram], float]] = {
    "kl": kl_threshold,
    "mse": mse_threshold,
    "percentile": percentile_threshold,
    "minmax": minmax_threshold,
}
