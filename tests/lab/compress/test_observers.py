"""Thresholds against brute force, and known bugs of entropy calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing_lab.compress.ranges import (
    BINS,
    EPS,
    OBSERVERS,
    Histogram,
    choose,
    divergence,
    divergences,
    kl_threshold,
    mse_threshold,
    percentile_threshold,
    refine,
)


def of(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


def written_out(counts: np.ndarray, i: int, levels: int = 128) -> float:
    """KL of candidate i with loops, from its definition."""
    p = counts[:i].astype(float).copy()
    p[-1] += counts[i:].sum()
    q = np.zeros(i)
    members: dict[int, list[int]] = {}
    for j in range(i):
        members.setdefault(j * levels // i, []).append(j)
    for bins in members.values():
        filled = [j for j in bins if counts[j] > 0]
        for j in filled:
            q[j] = sum(counts[b] for b in bins) / len(filled)
    p, q = p / p.sum(), q / q.sum()
    floor = EPS / i
    p = np.where(p == 0, floor, p * (1 - floor * (p == 0).sum()))
    q = np.where(q == 0, floor, q * (1 - floor * (q == 0).sum()))
    assert math.isclose(p.sum(), 1) and math.isclose(q.sum(), 1)
    return float((p * np.log(p / q)).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 0.9), st.integers(128, 600))
def test_divergence_matches_its_definition(seed: int, empty: float, i: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 1000, 600) * (rng.random(600) > empty)
    counts[rng.integers(0, 128)] += 5
    tensor = torch.from_numpy(counts).double()
    expected = written_out(counts, i)
    assert divergence(tensor, i, 128) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    candidates = torch.tensor([i, 128, 600])
    fast = divergences(tensor, candidates)
    for k, candidate in enumerate(candidates.tolist()):
        assert float(fast[k]) == pytest.approx(written_out(counts, candidate), rel=1e-9, abs=1e-12)


def test_kl_selects_the_best_candidate() -> None:
    histogram = of(torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    top = histogram.absmax
    counts = histogram.rebin(top)
    best = min(range(128, BINS + 1, 13), key=lambda i: divergence(counts, i, 128))
    threshold = kl_threshold(histogram)
    i = round(threshold / top * BINS)
    assert divergence(counts, i, 128) <= divergence(counts, best, 128) + 1e-12


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 400)), min_size=1, max_size=5), st.integers(0, 99)
)
def test_counts_do_not_depend_on_batches(batches: list[tuple[float, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [scale * torch.randn(n, generator=generator) for scale, n in batches]
    histogram = of(*parts)
    values = torch.cat(parts).abs()
    assert histogram.total == len(values) and histogram.counts.dtype == torch.int64
    assert histogram.absmax == float(values.max())
    index = (values[values > 0].double() / histogram.width).long().clamp(max=len(histogram.counts) - 1)
    assert torch.equal(histogram.counts, torch.bincount(index, minlength=len(histogram.counts)))
    whole = histogram.rebin(histogram.absmax)
    assert float(whole.sum()) == pytest.approx(int(histogram.counts.sum()))


def test_range_grows_at_constant_bin_width() -> None:
    histogram = of(torch.rand(1000))
    width, bins = histogram.width, len(histogram.counts)
    histogram.add(10 * torch.rand(1000))
    assert histogram.width == width and len(histogram.counts) > bins


@pytest.mark.parametrize("outlier", [30.0, 1e3, 1e6])
def test_one_outlier_defeats_minmax_but_not_kl(outlier: float) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    spoiled = torch.cat((x, torch.tensor([outlier])))
    assert OBSERVERS["minmax"](of(spoiled)) == outlier
    assert kl_threshold(of(spoiled)) < 6
    assert percentile_threshold(of(spoiled)) < 6
    # also if the outlier comes first, where it could determine the bins
    assert kl_threshold(of(torch.cat((torch.tensor([outlier]), x[:1000])), x)) < 6


def test_mse_is_minimal_over_a_fine_grid() -> None:
    x = torch.distributions.Laplace(0.0, 1.0).sample((50_000,))

    def error(t: float) -> float:
        s = t / 127
        return float(((x / s).round().clamp(-127, 127) * s - x).square().mean())

    top = float(x.abs().max())
    best = min(error(top * i / 400) for i in range(40, 401))
    assert error(mse_threshold(of(x))) <= best * 1.05


def test_int8_counts_do_not_overflow() -> None:
    histogram = of(torch.ones(10))
    histogram.counts[-1] = 2**40
    histogram.add(torch.ones(10))
    assert histogram.total == 2**40 + 10


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_is_rejected(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        of(torch.tensor([1.0, bad]))


def test_no_data_or_only_zeros() -> None:
    for observer in OBSERVERS.values():
        assert observer(Histogram()) == 0
        assert observer(of(torch.zeros(5))) == 0


def test_winner_has_the_least_measured_error() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(64, 32, generator=generator)
    rows[0, 0] = 200.0
    w = torch.randn(16, 32, generator=generator)
    names = ("kl", "mse", "percentile", "minmax")
    choice = choose(of(rows), rows, [(w, w)], names, dynamic=True)
    for name in names:
        scale = max(OBSERVERS[name](of(rows)) / 127, 1e-12)
        rounded = (rows / scale).round().clamp(-128, 127) * scale
        expected = ((rounded - rows) @ w.T).square().sum() / (rows @ w.T).square().sum()
        assert choice.errors[name] == pytest.approx(float(expected), rel=1e-3)
    assert choice.winner == min(choice.errors, key=choice.errors.__getitem__) == "token"
    assert choice.scale is None
    static = choose(of(rows), rows, [(w, w)], names, dynamic=False)
    assert static.errors[static.winner] <= min(choice.errors[n] for n in names)
    forced = choose(of(rows), rows, [(w, w)], ("kl",), dynamic=False)
    assert forced.winner == "kl" and forced.scale is not None


def test_search_finds_the_valley_and_a_deep_ripple() -> None:
    def error(scale: float) -> float:
        return (scale - 1.37) ** 2 + 0.002 * math.sin(400 * scale) + 1

    scale, least = refine(1.0, error)
    dense = min(error(0.5 + i / 10_000) for i in range(15_000))
    assert least == error(scale) and least - dense < 0.003
    assert refine(1.37, lambda s: abs(s - 1.37))[1] == 0


@pytest.mark.parametrize("tail", [0.0, 8.0, 60.0])
def test_never_worse_than_a_common_entropy_calibrator(tail: float) -> None:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(256, 32, generator=generator)
    rows = torch.nn.functional.silu(rows) * torch.randn(256, 32, generator=generator)
    rows[0, 0] += tail
    w = torch.randn(16, 32, generator=generator)
    exact = rows @ w.T
    ours = choose(of(rows), rows, [(w, w)], ("kl", "mse", "percentile", "minmax"), dynamic=False)
    for bins in (128, 2048):
        collector = calibrate.HistogramCollector(
            method="entropy", symmetric=True, num_bins=bins, num_quantized_bins=128, percentile=99.99,
            scenario="same",
        )  # fmt: skip
        collector.collect({"x": [rows.numpy()]})
        scale = max(abs(float(v)) for v in collector.compute_entropy()["x"][:2]) / 127
        theirs = ((rows / scale).round().clamp(-128, 127) * scale - rows) @ w.T
        assert ours.errors[ours.winner] <= float(theirs.square().sum() / exact.square().sum()) * (1 + 1e-6)
