"""Ranges of activations: recorded while the model runs, chosen by an observer, simulated anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from farthing.checkpoint import compressed_tensors as ct
from farthing.checkpoint.reader import Checkpoint
from farthing.compress.layer import Matrix, TracedOps

Rounding = Callable[[Tensor], Tensor]
FP8_MAX = 448.0


def round_token(x: Tensor) -> Tensor:
    """Quantize to symmetric int8 with one scale per row, and dequantize."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round().clamp_(-127, 127).mul_(scale)


def round_tensor(x: Tensor, scale: Tensor) -> Tensor:
    """Quantize to symmetric int8 with a given scale, clipping, and dequantize."""
    return (x / scale).round().clamp_(-128, 127).mul_(scale)


def round_fp8_group(x: Tensor, group: int = 128) -> Tensor:
    """Round to e4m3 with one scale per row and `group` columns (DeepSeek-V3 section 3.3)."""
    k = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -k % group)).unflatten(-1, (-1, group))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / FP8_MAX
    rounded: Tensor = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)[..., :k]


@dataclass(frozen=True, slots=True)
class Activations:
    """Activation rounding of each module's input.

    A backend with 8-bit kernels rounds activations itself. This reproduces the loss on any machine.
    """

    checkpoint: Checkpoint
    groups: ct.Groups | None
    kinds: tuple[str | None, ...]  # of each config group: token | tensor | fp8 | None
    fp8_everywhere: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Activations:
        """Read quantization_config."""
        raw: dict[str, Any] = checkpoint.config.get("quantization_config") or {}
        if raw.get("quant_method") != ct.METHOD:
            return cls(checkpoint, None, (), raw.get("quant_method") == "fp8")
        kinds: list[str | None] = []
        for group in raw["config_groups"].values():
            inputs = group.get("input_activations")
            kinds.append(None if not inputs else "fp8" if inputs["type"] == "float" else inputs["strategy"])
        return cls(checkpoint, ct.Groups.from_json(raw), tuple(kinds), False)

    def rounding(self, module: str) -> Rounding | None:
        """The rounding of a quantized module's input, None to keep it."""
        if self.fp8_everywhere:
            return round_fp8_group
        index = self.groups.index(module) if self.groups else None
        kind = None if index is None else self.kinds[index]
        if kind == "fp8":
            return round_fp8_group
        if kind == "token":
            return round_token
        if kind == "group":
            weight = self.checkpoint.weight(module)
            inputs, group = weight.inputs, weight.group_size
            return None if inputs is None else partial(inputs, group=group)
        if kind == "tensor":
            inputs = self.checkpoint.weight(module).inputs
            return None if inputs is None else partial(inputs, group=0)  # one scale, whatever the groups
        return None


class SimulatedOps(TracedOps):
    """float32 on the CPU, with rounded inputs of quantized matrices."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.name = "reference float32, simulated activations"
        self._activations = Activations.of(Checkpoint.open(path))
        self._rounding: dict[str, Rounding | None] = {}

    def before(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Round the input as the checkpoint's scheme for this matrix says."""
        if matrix.format == "dense":
            return x
        if matrix.name not in self._rounding:
            self._rounding[matrix.name] = self._activations.rounding(matrix.name)
        rounding = self._rounding[matrix.name]
        return x if rounding is None else rounding(x)


# Counts of |x|, exact over any number of batches.

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


Observer = Literal["kl", "mse", "percentile", "minmax"]
LEVELS = 128  # of |x| in symmetric int8
EPS = 1e-4  # smallest probability after smoothing


def kl_threshold(histogram: Histogram, levels: int = LEVELS) -> float:
    """The threshold whose quantized distribution has the least KL divergence from the clipped one.

    KL follows the entropy calibration of Migacz ("8-bit inference with TensorRT", 2017) without its usual
    bugs: counts are 64-bit, the range grows at a constant bin width, every candidate is tried, an outlier
    cannot push the threshold up to absmax / 16, and smoothing acts on normalized counts.
    """
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
    """TracedOps that record inputs by name (see `trace.input_name`).

    Legend: t tokens that reach a matrix; K columns of the matrix; D hidden size; E experts.
    """

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


# Choose the range of a matrix's input: the candidate with the least output error wins.

TINY = 1e-12
# (from, to, points) of successively finer grids of multiples.
SPANS = ((0.5, 2.0, 25), (0.95, 1.053, 21), (0.99, 1.01, 21), (0.9985, 1.0015, 31))


@dataclass(frozen=True, slots=True)
class ChosenRange:
    """The winner, its scale (None: dynamic per token), and every candidate's relative output error."""

    winner: str  # kl | mse | percentile | minmax | measured (between them) | token
    scale: float | None
    errors: dict[str, float]


def choose(
    histogram: Histogram,
    rows: Tensor,
    weights: Sequence[tuple[Tensor, Tensor]],
    observers: Sequence[Observer],
    dynamic: bool,
) -> ChosenRange:
    """Choose the input range of matrices that read the same input, from a sample of its rows [t, K].

    weights: (original, rounded) [N_i, K] of each matrix. The error is ||x^ W^^T - x W^T||^2 / ||x W^T||^2
    over the sample, with both sides rounded. With `dynamic`, one scale per token is also a candidate.
    """
    original = torch.cat([w for w, _ in weights])
    rounded = torch.cat([r for _, r in weights])
    exact = rows @ original.t()
    norm = float(exact.square().sum()) or 1.0

    def error(x: Tensor) -> float:
        return float((x @ rounded.t() - exact).square().sum()) / norm

    scales: dict[str, float] = {o: max(OBSERVERS[o](histogram) / 127, TINY) for o in observers}
    errors: dict[str, float] = {o: error(round_tensor(rows, torch.tensor(s))) for o, s in scales.items()}
    if dynamic:
        errors["token"] = error(round_token(rows))
    best = min(errors, key=errors.__getitem__)
    if len(observers) > 1 and best in scales:  # search further around the best of them
        scales["measured"], errors["measured"] = refine(
            scales[best], lambda scale: error(round_tensor(rows, torch.tensor(scale)))
        )
    winner = min(errors, key=errors.__getitem__)
    return ChosenRange(winner, scales.get(winner), errors)


def refine(start: float, error: Callable[[float], float]) -> tuple[float, float]:
    """The multiple of `start` with the least error, and that error.

    The error is smooth in the scale except for ripples of a few per mille. Refining a grid three times around
    its best point finds the valley and one of its deepest ripples.
    """
    errors = {start: error(start)}
    for low, high, points in SPANS:
        centre = min(errors, key=errors.__getitem__)
        for i in range(points):
            scale = centre * low * (high / low) ** (i / (points - 1))
            errors.setdefault(scale, error(scale))
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]
