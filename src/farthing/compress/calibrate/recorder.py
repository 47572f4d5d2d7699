"""Collect statistics of every matrix's input while the model runs.

Legend: t tokens that reach a matrix; K columns of the matrix; D hidden size; E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from farthing.compress.calibrate.histogram import Histogram
from farthing.compress.trace import Matrix, TracedOps

STRIP = 1024  # columns


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """gram [K, K] += x^T x; each strip from its diagonal on, mirrored, takes half of the products."""
    for start in range(0, len(gram), STRIP):
        stop = start + STRIP
        own = x[:, start:stop].t() @ x[:, start:]
        gram[start:stop, start:] += own
        gram[stop:, start:stop] += own[:, STRIP:].t()


@dataclass(slots=True)
class InputStats:
    """Statistics of one matrix's input. Sums are over tokens."""

    tokens: int = 0
    energy: Tensor = field(default_factory=lambda: torch.zeros(0))  # [K] sum of x^2
    magnitude: Tensor = field(default_factory=lambda: torch.zeros(0))  # [K] sum of |x|
    absmax: Tensor = field(default_factory=lambda: torch.zeros(0))  # [K]
    gram: Tensor | None = None  # [K, K] sum of x x^T
    histogram: Histogram | None = None
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # [<= kept, K] a sample of inputs
    fallback: str | None = None  # the source of these statistics, if this input was too rare

    def mean_energy(self) -> Tensor:
        """E[x^2] per column, [K]."""
        return self.energy / max(self.tokens, 1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Statistics to collect."""

    gram: bool = False
    histogram: bool = False
    rows: int = 128


@dataclass(slots=True)
class ExpertStats:
    """Statistics of one MoE layer."""

    tokens: Tensor  # [E] int64
    saliency: Tensor  # [E] sum over routed tokens of gate * ||expert output|| (REAP, Lasby et al. 2025)


class Recorder(TracedOps):
    """TracedOps that record inputs by name (see `trace.input_name`)."""

    def __init__(self, wanted: Wanted, seed: int = 0) -> None:
        super().__init__()
        self.wanted = wanted
        self.inputs: dict[str, InputStats] = {}
        self.experts: dict[str, ExpertStats] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def before(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Record x and return it."""
        stats = self.inputs.setdefault(matrix.name, InputStats())
        x32 = x.float()
        if not stats.tokens:
            stats.energy, stats.magnitude = torch.zeros(x.shape[1]), torch.zeros(x.shape[1])
            stats.absmax = torch.zeros(x.shape[1])
            stats.rows = torch.zeros(0, x.shape[1])
            stats.histogram = Histogram() if self.wanted.histogram else None
            stats.gram = torch.zeros(x.shape[1], x.shape[1]) if self.wanted.gram else None
        absolute = x32.abs()
        if not bool(absolute.max().isfinite()):
            raise ValueError(f"{matrix.name}: the input is NaN or infinite; the model cannot be calibrated")
        stats.energy += x32.square().sum(0)
        stats.magnitude += absolute.sum(0)
        stats.absmax = torch.maximum(stats.absmax, absolute.amax(0))
        if stats.gram is not None:
            _add_gram(stats.gram, x32)
        if stats.histogram is not None:
            stats.histogram.add(x32)
        self._sample(stats, x32)
        stats.tokens += len(x)
        return x

    def _sample(self, stats: InputStats, x: Tensor) -> None:
        """Keep a uniform sample of rows over all batches."""
        kept = self.wanted.rows
        share = min(1.0, kept / (stats.tokens + len(x)))
        new = x[torch.rand(len(x), generator=self._generator) < share] if len(x) > kept else x
        rows = torch.cat((stats.rows, new))
        if len(rows) > kept:
            rows = rows[torch.randperm(len(rows), generator=self._generator)[:kept]]
        stats.rows = rows.clone()

    def after_expert(self, prefix: str, expert: int, gates: Tensor, out: Tensor) -> None:
        """Record REAP's saliency and the token counts."""
        stats = self._expert_stats(prefix, expert + 1)
        stats.tokens[expert] += len(gates)
        stats.saliency[expert] += (gates * out.norm(dim=-1)).sum()

    def _expert_stats(self, prefix: str, count: int) -> ExpertStats:
        stats = self.experts.get(prefix)
        if stats is None:
            stats = self.experts[prefix] = ExpertStats(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        missing = count - len(stats.tokens)
        if missing > 0:
            stats.tokens = torch.nn.functional.pad(stats.tokens, (0, missing))
            stats.saliency = torch.nn.functional.pad(stats.saliency, (0, missing))
        return stats


def with_fallbacks(
    inputs: Mapping[str, InputStats], names: list[str], least: int
) -> tuple[dict[str, InputStats], list[str]]:
    """Statistics for every name in `names` (experts of one layer, one kind of input).

    Inputs with fewer than `least` tokens use their peers' statistics: the mean of all experts for second
    moments, the maximum for ranges. Returns the names that needed it.
    """
    seen = [inputs[n] for n in names if n in inputs and inputs[n].tokens]
    rare = [n for n in names if n not in inputs or inputs[n].tokens < least]
    if not rare or not seen:
        return {n: inputs[n] for n in names if n in inputs}, rare
    pooled = InputStats(
        tokens=sum(s.tokens for s in seen),
        energy=torch.stack([s.energy for s in seen]).sum(0),
        magnitude=torch.stack([s.magnitude for s in seen]).sum(0),
        absmax=torch.stack([s.absmax for s in seen]).amax(0),
        gram=torch.stack([s.gram for s in seen if s.gram is not None]).sum(0)
        if seen[0].gram is not None
        else None,
        histogram=max((s.histogram for s in seen if s.histogram), key=lambda h: h.absmax, default=None),
        rows=torch.cat([s.rows for s in seen])[:: max(1, len(seen))],
        fallback="mean of all experts, range of the widest",
    )
    return {n: pooled if n in rare else inputs[n] for n in names}, rare
