"""Confidence intervals of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval around an estimate."""

    estimate: float
    low: float
    high: float


def ratio_interval(sums: Sequence[float], counts: Sequence[int], confidence: float = 0.95) -> Interval:
    """sum(sums) / sum(counts), where each pair is one cluster (a window of correlated tokens).

    The ratio estimator's linearized variance (Cochran 1977, section 6.4) with Student's t over the clusters.
    With a single cluster the interval is infinite. A non-finite sum makes estimate and bounds infinite, since
    a model that predicts NaN is certainly worse.
    """
    if not sums or len(sums) != len(counts):
        raise ValueError(f"{len(sums)} sums with {len(counts)} counts; expected the same positive number")
    total, clusters = sum(counts), len(sums)
    if not all(map(math.isfinite, sums)):
        return Interval(math.inf, math.inf, math.inf)
    estimate = math.fsum(sums) / total
    if clusters < 2:
        return Interval(estimate, -math.inf, math.inf)
    residual = math.fsum((s - estimate * n) ** 2 for s, n in zip(sums, counts, strict=True))
    error = math.sqrt(residual * clusters / (clusters - 1)) / total
    half = student_t(0.5 + confidence / 2, clusters - 1) * error
    return Interval(estimate, estimate - half, estimate + half)


def student_t(p: float, freedom: int) -> float:
    """The p-quantile of Student's t: exact for 1 and 2 degrees, else the Cornish-Fisher expansion
    (Abramowitz and Stegun 26.7.5), good to 1 % from 3 degrees on at the usual levels."""
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z, v = NormalDist().inv_cdf(p), float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))


def proportion_interval(wins: int, losses: int, total: int, confidence: float = 0.95) -> Interval:
    """Difference of two paired proportions, (wins - losses) / total, by the normal approximation
    of the discordant pairs (McNemar); for top-1 accuracy of B against A on the same images."""
    if total < 1:
        raise ValueError(f"total: got {total}; expected at least one pair")
    estimate = (wins - losses) / total
    spread = math.sqrt(max(wins + losses - (wins - losses) ** 2 / total, 1.0)) / total
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * spread
    return Interval(estimate, estimate - half, estimate + half)
