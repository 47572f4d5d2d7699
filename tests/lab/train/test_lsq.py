"""Fake quantization: grids, gradients, learned ranges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing_lab.train import lsq
from farthing_lab.train.lsq import (
    ActivationQuantizer,
    Precision,
    QuantizedProduct,
    WeightQuantizer,
    fake_quantize,
    round_groups,
)


@given(st.integers(0, 10_000), st.sampled_from([(-8, 7), (-127, 127)]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_values_are_the_nearest_grid_points(seed: int, ends: tuple[int, int], shifted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 12, generator=generator)
    scale = torch.rand(5, 1, generator=generator) * 0.1 + 0.01
    offset = torch.full((1, 1), 0.37) if shifted else None
    y = fake_quantize(x, scale, *ends, offset)
    q = (y - (offset if offset is not None else 0)) / scale
    torch.testing.assert_close(q, q.round(), atol=1e-3, rtol=0)
    assert bool((q.round() >= ends[0]).all() and (q.round() <= ends[1]).all())
    inside = (q.round() > ends[0]) & (q.round() < ends[1])
    assert bool(((y - x).abs() <= scale / 2 + 1e-5)[inside].all())


def test_gradients_of_input_scale_and_offset() -> None:
    """Straight-through within the range, zero beyond; for the range LSQ equation 3, with its factor."""
    x = torch.tensor([[0.26, -0.9, 5.0, -5.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    offset = torch.tensor([[0.0]], requires_grad=True)
    fake_quantize(x, scale, -4, 3, offset).sum().backward()
    assert x.grad is not None and scale.grad is not None and offset.grad is not None
    assert x.grad.tolist() == [[1, 1, 0, 0]]
    factor = (4 * 3) ** -0.5
    expected = ((1 - 0.52) + (-2 + 1.8) + 3 - 4) * factor
    assert float(scale.grad) == pytest.approx(expected, abs=1e-6)
    assert float(offset.grad) == pytest.approx(2 * factor)  # only clipped values move with the offset


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rounding_is_equal(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        kept = []
        for shape, scales in (((3, 5, 7), (1, 1, 1)), ((6, 4, 3, 3), (6, 1, 1, 1)), ((33, 64), (1, 1))):
            x = torch.randn(shape).to(dtype).requires_grad_()
            scale = (torch.rand(scales) + 0.2).requires_grad_()
            offset = torch.full(scales, 0.1, requires_grad=True) if shape[0] != 6 else None
            y = fake_quantize(x, scale, -4, 3, offset, dtype)
            (y * torch.randn(shape).to(dtype)).sum().backward()
            kept += [
                t for t in (y, x.grad, scale.grad, None if offset is None else offset.grad) if t is not None
            ]
        return kept

    plain = run()
    monkeypatch.setattr(lsq, "_rounding", lsq._rounding)
    lsq.compile_rounding()
    for a, b in zip(plain, run(), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_weights_start_at_the_shrink_with_the_least_error() -> None:
    torch.manual_seed(0)
    w = torch.randn(2, 6, 128)
    quantizer = WeightQuantizer(w.shape, 64)
    quantizer.start(w, 4)
    with torch.no_grad():
        error = (quantizer(w) - w).square().mean()
        full = w.unflatten(-1, (-1, 64)).abs().amax(-1, keepdim=True) / 7.5
        plain = ((w.unflatten(-1, (-1, 64)) / full).round().clamp(-8, 7) * full).flatten(-2)
    assert error <= (plain - w).square().mean()
    q, scale = quantizer.integers(w)
    assert int(q.min()) >= -8 and int(q.max()) <= 7
    torch.testing.assert_close(
        (q.unflatten(-1, (-1, 64)) * scale[..., None]).flatten(-2), quantizer(w).detach()
    )


def test_group_ranges_are_per_row() -> None:
    quantizer = ActivationQuantizer("group", group=32)
    quantizer.start(4)
    x = torch.randn(7, 64) * torch.logspace(-2, 2, 7)[:, None]
    y = quantizer(x).detach()
    step = x.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1) / 7
    assert bool(((x - y).abs() <= step * 0.501).all())


def test_an_offset_helps_one_sided_inputs() -> None:
    """Inputs like those after SiLU, the motivation of LSQ+."""
    torch.manual_seed(0)
    x = torch.nn.functional.silu(torch.randn(512, 16) * 2)
    errors = []
    for offset in (False, True):
        quantizer = ActivationQuantizer("tensor", offset=offset)
        quantizer.start(4)
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (quantizer(x) - x).square().mean()
            loss.backward()
            optimizer.step()
        errors.append(float((quantizer(x) - x).detach().square().mean()))
    assert errors[1] < 0.6 * errors[0]


def test_clip_is_learned() -> None:
    """One outlier in a group is worth clipping."""
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    quantizer = ActivationQuantizer("group")
    quantizer.start(4)
    before = float((quantizer(x) - x).detach().square().mean())
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert float(quantizer.log_scale.exp()) < 0.95
    assert float((quantizer(x) - x).square().mean()) < before


@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_the_largest_input_of_a_group_learns_from_the_whole_group(clip: float) -> None:
    """Rounding scales with its input, so the gradient along x is that of the output along itself (Euler)."""
    torch.manual_seed(0)
    x, along = torch.randn(16, 128, requires_grad=True), torch.randn(16, 128)
    y = round_groups(x, torch.tensor(clip), 64, 7)
    (grad,) = torch.autograd.grad((y * along).sum(), x)
    torch.testing.assert_close((grad * x).sum(1), (along * y).sum(1), rtol=1e-3, atol=1e-3)


def test_sixteen_bits_do_not_round() -> None:
    w = torch.randn(1, 8, 64)
    product = QuantizedProduct(w)
    product.start(w, Precision(16, 16))
    x = torch.randn(3, 64)
    torch.testing.assert_close(product(x, w, [3]), x @ w[0].T)


@pytest.mark.parametrize("bits", [2, 5, 32])
def test_unknown_bits_are_rejected(bits: int) -> None:
    with pytest.raises(ValueError, match=f"weights: got {bits} bits"):
        Precision(bits, 8)
