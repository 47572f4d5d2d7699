"""Calibrated input ranges: counted as the model runs, chosen by an observer or by the output error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farthing.checkpoint import key_of
from farthing.compress.calibrate import Recorder, Wanted, round_tensor, round_token
from farthing.compress.layer import Layer, Matrix
from farthing.compress.transform import Stats
from farthing.compress.work import LayerResult, LayerWork
from farthing_lab.compress.settings import Observer, Settings

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


# Four ways to choose the clipping threshold of a symmetric int8 range.
#
# KL follows the entropy calibration of Migacz ("8-bit inference with TensorRT", 2017) without its usual
# bugs: counts are 64-bit, the range grows at a constant bin width, every candidate is tried, an outlier
# cannot push the threshold up to absmax / 16, and smoothing acts on normalized counts.

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
OBSERVER_NAMES = tuple(OBSERVERS)


# Choose the range of a matrix's input: the candidate with the least output error wins.

TINY = 1e-12
# (from, to, points) of successively finer grids of multiples.
SPANS = ((0.5, 2.0, 25), (0.95, 1.053, 21), (0.99, 1.01, 21), (0.9985, 1.0015, 31))


@dataclass(frozen=True, slots=True)
class Choice:
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
) -> Choice:
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
    return Choice(winner, scales.get(winner), errors)


def refine(start: float, error: Callable[[float], float]) -> tuple[float, float]:
    """The multiple of `start` with the least error, and that error.

    The error is smooth in the scale except for ripples of a few per mille. Refining a grid three times around
    its best point finds the valley and one of its deepest ripples.
    """
    known = {start: error(start)}
    for low, high, points in SPANS:
        centre = min(known, key=known.__getitem__)
        for i in range(points):
            scale = centre * low * (high / low) ** (i / (points - 1))
            known.setdefault(scale, error(scale))
    best = min(known, key=known.__getitem__)
    return best, known[best]


class StudyRecorder(Recorder):
    """A recorder that also counts magnitudes of inputs, if ranges are wanted, and the saliency of experts."""

    def __init__(self, wanted: Wanted, ranges: bool) -> None:
        super().__init__(wanted)
        self.histograms: dict[str, Histogram] = {}
        self.saliency: dict[str, Tensor] = {}  # [E], sums of gate * ||output|| (REAP, Lasby et al. 2025)
        self._ranges = ranges

    def before(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Record x and return it."""
        if self._ranges:
            self.histograms.setdefault(matrix.name, Histogram()).add(x)
        return super().before(matrix, x)

    def after_expert(self, prefix: str, expert: int, gates: Tensor, out: Tensor) -> None:
        """Count the expert's tokens and add up its saliency."""
        super().after_expert(prefix, expert, gates, out)
        sums = self.saliency.get(prefix, torch.zeros(0))
        sums = torch.nn.functional.pad(sums, (0, max(0, expert + 1 - len(sums))))
        sums[expert] += (gates * out.norm(dim=-1)).sum()
        self.saliency[prefix] = sums


JUDGES = 8  # experts whose outputs decide a shared input range


def choose_ranges(work: LayerWork, stats: Stats, recipe: Settings, result: LayerResult) -> None:
    """Choose the activation rounding of every integer module, shared by modules that read one tensor."""
    shared: dict[str, list[str]] = {}
    for module, done in result.modules.items():
        if done.weight.format in ("int8", "int4"):
            shared.setdefault(work.layer.parameters.scaled_with(module), []).append(module)
    for modules in shared.values():
        scale: float | None = None
        if (sample := _sample(work.layer, modules, stats, work.recorder)) is not None:
            assert work.originals is not None
            observers = OBSERVER_NAMES if recipe.observer == "auto" else (recipe.observer,)
            pairs = [(work.originals[m], result.modules[m].weight.dequantize()) for m in sample.modules]
            choice = choose(sample.histogram, sample.rows, pairs, observers, recipe.activations == "best")
            scale = choice.scale
            for m in modules:
                result.modules[m].report |= {"observer": choice.winner, "observer_errors": choice.errors}
        for m in modules:
            done = result.modules[m]
            done.key = key_of(done.weight, "token" if scale is None else "tensor")
            done.input_scale = scale


@dataclass(frozen=True, slots=True)
class _Sample:
    """Statistics of one input, and the matrices used to choose its rounding."""

    histogram: Histogram
    rows: Tensor  # [t, K]
    modules: list[str]


def _sample(layer: Layer, modules: Sequence[str], stats: Stats, recorder: Recorder | None) -> _Sample | None:
    """The input that `modules` read, or None if calibration did not reach it.

    Routed experts read parts of one tensor: their counts are added up, and the busiest few decide the
    rounding.
    """
    histograms = recorder.histograms if isinstance(recorder, StudyRecorder) else {}
    names = dict.fromkeys(map(layer.reads, modules))
    seen = {n: stats[n] for n in names if n in histograms and n in stats and len(stats[n].rows)}
    if not seen:
        return None
    seen = {name: st for name, st in seen.items() if st.fallback is None} or seen
    busiest = sorted(seen, key=lambda name: -seen[name].tokens)[:JUDGES]
    histogram = Histogram()
    for name in seen:
        histogram.merge(histograms[name])
    rows = torch.cat([seen[name].rows for name in busiest])
    return _Sample(histogram, rows, [m for m in modules if layer.reads(m) in busiest])
