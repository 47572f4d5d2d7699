"""Counts of |x|, exact over any number of batches."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 2048
MAX_BINS = 32 * BINS
BULK = 0.999  # share of the first batch that determines the bin width


class Histogram:
    """|x| in bins of one constant width, int64, growing with the range.

    The bin width comes from the bulk of the first batch, not its maximum, so that one massive outlier cannot
    make the bins useless. Values beyond MAX_BINS count in the last bin; absmax stays exact.
    """

    def __init__(self) -> None:
        self.width = 0.0
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.absmax = 0.0
        self.zeros = 0  # exact zeros, counted separately: every range represents them exactly

    def add(self, x: Tensor) -> None:
        """Count a tensor of any shape. Raises ValueError on NaN or infinity."""
        values = x.detach().float().abs().flatten()
        if not values.numel():
            return
        top = float(values.max())
        if not torch.isfinite(values.max()):
            raise ValueError("an activation is NaN or infinite; the model cannot be calibrated on this input")
        nonzero = values[values > 0]
        self.zeros += values.numel() - nonzero.numel()
        if not nonzero.numel():
            return
        self.absmax = max(self.absmax, top)
        if not self.width:
            sample = nonzero[:: max(1, nonzero.numel() // 100_000)]
            rank = max(1, int(BULK * sample.numel()))
            # The smallest normal number: a subnormal width would divide to infinity.
            self.width = max(float(sample.kthvalue(rank).values) / BINS, torch.finfo(torch.float32).tiny)
        index = (nonzero.double() / self.width).long().clamp_(max=MAX_BINS - 1)
        new = torch.bincount(index, minlength=len(self.counts))
        if len(new) > len(self.counts):
            self.counts = torch.nn.functional.pad(self.counts, (0, len(new) - len(self.counts)))
        self.counts += new

    def merge(self, other: Histogram) -> None:
        """Add the counts of `other`, placing bins of another width by their centre."""
        self.zeros += other.zeros
        self.absmax = max(self.absmax, other.absmax)
        if not len(other.counts):
            return
        self.width = self.width or other.width
        middle = (torch.arange(len(other.counts)) + 0.5) * other.width
        index = (middle.double() / self.width).long().clamp_(max=MAX_BINS - 1)
        length = max(len(self.counts), int(index.max()) + 1)
        self.counts = torch.nn.functional.pad(self.counts, (0, length - len(self.counts)))
        self.counts.index_add_(0, index, other.counts)

    @property
    def total(self) -> int:
        """Number of values, including zeros."""
        return int(self.counts.sum()) + self.zeros

    def quantile(self, share: float) -> float:
        """The smallest bin edge with at least `share` of all values below it, at most absmax."""
        if not len(self.counts):
            return 0.0
        need = share * self.total - self.zeros
        index = int(torch.searchsorted(self.counts.cumsum(0).double(), max(need, 0.0)))
        return min((index + 1) * self.width, self.absmax)

    def rebin(self, top: float, bins: int = BINS) -> Tensor:
        """Counts over [0, top] in `bins` equal bins, float64; values beyond `top` count in the last one.

        A bin that straddles an edge is split in proportion.
        """
        total = torch.cat((torch.zeros(1, dtype=torch.float64), self.counts.double().cumsum(0)))
        wanted = torch.linspace(0, top, bins + 1, dtype=torch.float64)
        position = (wanted / self.width).clamp(max=len(self.counts))
        low = position.floor().long().clamp(max=len(self.counts) - 1)
        below = total[low] + (position - low) * (total[low + 1] - total[low])
        out = below.diff()
        out[-1] += total[-1] - below[-1]
        return out
