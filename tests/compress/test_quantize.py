"""Each quantizer against a direct implementation of its paper."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farthing.compress.calibrate import round_fp8_group, round_tensor, round_token
from farthing.compress.quantize import (
    Feedback,
    even_grid,
    fitted_grid,
    int8_grid,
    output_error,
    quantize_fp8,
    sweep,
)
from farthing.ops.weights import CODES


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int, tokens: int, k: int) -> Tensor:
    """Inputs with a few strong directions, like activations."""
    return random(seed, tokens, k) @ (random(seed + 1, k, k) * torch.linspace(2, 0.05, k)) + random(
        seed + 2, tokens, k
    )


def obq(w: Tensor, h: Tensor, scale: Tensor, order: list[int], low: int, high: int) -> Tensor:
    """Optimal brain quantization in a fixed order; the inverse is updated by elimination."""
    w, inverse = w.double().clone(), torch.linalg.inv(h.double())
    for i in order:
        q = (w[:, i] / scale[:, i]).round().clamp(low, high) * scale[:, i]
        w -= ((w[:, i] - q) / inverse[i, i]).unsqueeze(1) * inverse[i]
        w[:, i] = q
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0
        inverse[i, i] = 1  # not read again; avoids a division by zero
        done = order[: order.index(i) + 1]
        assert all(float(inverse[j, i]) == 0 for j in order if j not in done)
    return w


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_optimal_brain_quantization_in_its_order(act_order: bool) -> None:
    w, x = random(0, 2, 12, 96), torch.stack([correlated(1, 300, 96), correlated(4, 300, 96)])
    gram = x.transpose(1, 2) @ x
    grid = even_grid(w, 32)
    value, squared = sweep(w, Feedback.of(gram, act_order), grid)
    scale, _ = grid.expand(96)
    for b in range(2):
        h = gram[b] + 0.01 * gram[b].diagonal().mean() * torch.eye(96)
        order = gram[b].diagonal().argsort(descending=True).tolist() if act_order else list(range(96))
        expected = obq(w[b], h, scale[b], order, -8, 7)
        different = (value[b].double() - expected).abs() > 1e-4
        assert float(different.float().mean()) < 0.01  # ties may round either way
    nearest = output_error(w, grid.round(w), gram)
    assert bool((output_error(w, value, gram) < 0.7 * nearest).all())
    energy = torch.stack([(each @ rows.T).square().sum() for each, rows in zip(w, x, strict=True)])
    torch.testing.assert_close(squared / energy, output_error(w, value, gram), rtol=1e-3, atol=0)


def test_gptq_onto_fitted_values() -> None:
    w, x = random(0, 2, 12, 96), torch.stack([correlated(1, 300, 96), correlated(4, 300, 96)])
    gram = x.transpose(1, 2) @ x
    grid = fitted_grid(w, 32, gram.diagonal(dim1=1, dim2=2))
    value, _ = sweep(w, Feedback.of(gram), grid)
    for matrix, weight in zip(value, grid.weights(value), strict=True):
        assert weight.format == "nl4" and set(weight.quantized().unique().tolist()) <= set(CODES)
        torch.testing.assert_close(weight.dequantize(), matrix)
    assert bool((output_error(w, value, gram) < 0.7 * output_error(w, grid.round(w), gram)).all())
    even = even_grid(w, 32, gram.diagonal(dim1=1, dim2=2))
    beside = output_error(w, sweep(w, Feedback.of(gram), even)[0], gram)
    assert float(output_error(w, value, gram).sum() / beside.sum()) < 0.95


def test_pruning_sweep_is_least_squares_on_the_kept_columns() -> None:
    """Mask the first columns only: the sweep then has the closed-form solution of the remaining ones."""
    w, x = random(0, 1, 6, 20), correlated(1, 200, 20)
    keep = torch.ones(1, 6, 20, dtype=torch.bool)
    keep[:, :, :5] = False
    gram = (x.T @ x)[None]
    value = sweep(w, Feedback.of(gram, False, 1e-8), keep=keep)[0][0]
    target = x @ w[0].T
    best = torch.linalg.lstsq(x[:, 5:].double(), target.double()).solution.T
    torch.testing.assert_close(value[:, 5:].double(), best, rtol=1e-3, atol=1e-3)
    assert not value[:, :5].any()


def test_rank_deficient_gram_is_damped() -> None:
    x = random(0, 3, 64)
    value, _ = sweep(random(1, 1, 8, 64), Feedback.of((x.T @ x)[None]), even_grid(random(1, 1, 8, 64), 32))
    assert bool(value.isfinite().all())
    empty = Feedback.of(torch.zeros(1, 64, 64))
    assert bool(sweep(random(1, 1, 8, 64), empty, int8_grid(random(1, 1, 8, 64)))[0].isfinite().all())


def test_damping_that_did_not_suffice_is_replaced() -> None:
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # its smaller eigenvalue is -0.05
    found = Feedback.of(gram[None], act_order=False)
    assert float(found.damping) == pytest.approx(0.1)
    factored = found.lower[0].T * found.pivots[0] @ found.lower[0]
    torch.testing.assert_close(factored, gram + 0.1 * torch.eye(2))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([32, 64]), st.booleans(), st.floats(-30, 30))
def test_grids_stay_within_their_bounds(seed: int, group: int, symmetric: bool, magnitude: float) -> None:
    w = random(seed, 2, 5, 128) * 10.0**magnitude
    w[0, 0] = 0
    grid = even_grid(w, group, symmetric=symmetric)
    value = grid.round(w)
    for weight, v in zip(grid.weights(value), value, strict=True):
        torch.testing.assert_close(weight.dequantize(), v, rtol=1e-5, atol=1e-30)
        assert weight.scale is not None and bool((weight.scale > 0).all() and weight.scale.isfinite().all())
    half = grid.expand(128)[0] / 2
    inside = (w.abs() < 6 * grid.expand(128)[0]) if symmetric else torch.zeros_like(w, dtype=torch.bool)
    assert bool(((value - w).abs() <= half * 1.001 + 1e-30)[inside].all())


def test_shrunk_range_has_the_least_weighted_error() -> None:
    w, energy = random(0, 1, 4, 64), random(1, 1, 64).square()
    w[0, 0, 0] = 20

    def error(scale: Tensor) -> Tensor:
        return ((((w / scale).round().clamp(-127, 127) * scale) - w).square() * energy).sum(-1)

    best = error(int8_grid(w, energy).scale)
    for factor in (1.0, 0.93, 0.86, 0.8):
        assert bool((best <= error(int8_grid(w).scale * factor) + 1e-6).all())


def test_range_shrinks_where_the_largest_weight_does_not_matter() -> None:
    w, energy = random(0, 1, 4, 64), torch.ones(1, 64)
    w[0, 0, 0], energy[0, 0] = 4 * w.abs().max(), 0
    full = int8_grid(w).scale
    assert bool((int8_grid(w, energy).scale[0, 0] == full[0, 0] * 0.8).all())
    assert torch.equal(int8_grid(w, torch.zeros(1, 64)).scale, full)  # nothing is known: nothing is clipped


def test_zero_point_is_the_nearest_integer_and_zero_is_on_the_grid() -> None:
    w = torch.linspace(-0.6, 14.4, 32).repeat(3, 1)
    w[1], w[2] = 10 + w[1] / 15, -10 - w[2] / 15  # of one sign: the range is extended to zero
    grid = even_grid(w[None], 32, symmetric=False)
    assert grid.zero is not None and grid.zero.flatten().tolist() == [-7, -8, 7]
    error = (grid.round(w[None]) - w[None]).abs()
    assert bool((error <= grid.scale * 0.5001).all())


def test_clip_may_use_correlations_of_columns() -> None:
    w, x = random(0, 1, 4, 64), correlated(3, 200, 64)
    w[0, 0, 0] = 9

    def error(scale: Tensor) -> Tensor:
        full = scale.repeat_interleave(32, -1)
        delta = ((w / full).round().clamp(-8, 7) * full - w)[0].view(4, 2, 32)
        return torch.stack(
            [(x[:, 32 * g : 32 * g + 32] @ delta[:, g].T).square().sum(0) for g in range(2)], 1
        )

    factors = (7.5 / 7, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6)
    candidates = torch.stack([w.view(1, 4, 2, 32).abs().amax(-1) / 7.5 * factor for factor in factors])
    errors = torch.stack(list(map(error, candidates)))
    # The candidate with the least error, which is then rounded to 16 bits.
    chosen = (candidates.half().float() == even_grid(w, 32, gram=(x.T @ x)[None]).scale)[:, 0]
    assert bool((chosen.sum(0) == 1).all())
    assert bool(((errors * chosen).sum(0) <= errors.amin(0) * (1 + 1e-4)).all())


EXTREMES = st.sampled_from([0.0, 1e-45, -1e-45, 1e-38, 1e-20, 1.0, -1.0, 448.0, 464.0, 1e20, 3.4e38, -3.4e38])


@settings(max_examples=60, deadline=None)
@given(st.lists(EXTREMES, min_size=1, max_size=30), st.integers(1, 3), st.integers(0, 2))
def test_fp8_never_overflows(values: list[float], rows: int, more: int) -> None:
    w = torch.tensor(values).repeat(rows, 1 + 60 * more)
    weight = quantize_fp8(w, "w")
    assert weight.scale is not None and bool((weight.scale > 0).all() and weight.scale.isfinite().all())
    back = weight.data.float()
    assert bool(back.isfinite().all()) and float(back.abs().max()) <= 448
    value = weight.dequantize().double()
    scale = weight.scale.double()
    step = scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
    # e4m3: 3 bits of mantissa, subnormals of 2^-9
    assert bool(((value - w.double()).abs() <= w.double().abs() / 15 + step * 2.0**-9).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fp8_error_for_non_finite_values_names_the_tensor(bad: float) -> None:
    w = torch.ones(3, 3)
    w[1, 1] = bad
    with pytest.raises(ValueError, match=r"model\.a has NaN or infinity"):
        quantize_fp8(w, "model.a")


def test_activation_rounding() -> None:
    x = random(0, 5, 200) * 10
    token = x.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(round_token(x), (x / token).round() * token)
    torch.testing.assert_close(
        round_tensor(x, torch.tensor(0.1)), torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)
    )
    fp8 = round_fp8_group(x)
    for block in (slice(0, 128), slice(128, 200)):
        s = x[:, block].abs().amax(1, keepdim=True) / 448
        expected = (x[:, block] / s).to(torch.float8_e4m3fn).float() * s
        torch.testing.assert_close(fp8[:, block], expected)
    assert not round_fp8_group(torch.zeros(2, 130)).any()
