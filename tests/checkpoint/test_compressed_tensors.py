"""DeepSeek FP8 blocks: round trip, ragged edges, scales, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farthing.checkpoint.compressed_tensors import stored_scale
from farthing.checkpoint.floats import dequantize_blocks, quantize_blocks


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 300),
    magnitude=st.floats(1e-6, 1e6),
    ue8m0=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip_is_within_e4m3(rows: int, cols: int, magnitude: float, ue8m0: bool, seed: int) -> None:
    """Every weight is restored within half an E4M3 step (2^-4 relative) or half its block's smallest step."""
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * magnitude
    w8, scale = quantize_blocks(w, ue8m0=ue8m0)
    assert w8.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert scale.shape == (-(-rows // 128), -(-cols // 128))
    back = dequantize_blocks(w8, scale)
    per_weight = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    bound = torch.maximum(w.abs() * 2**-4, per_weight * 2**-10)
    assert ((back - w).abs() <= bound * 1.001).all()
    if ue8m0:
        assert torch.equal(scale.log2(), scale.log2().round())


def test_scales_are_per_block() -> None:
    """Four constant blocks: the largest weight of each maps to 448, whatever the other blocks contain."""
    w = torch.ones(130, 200)
    w[:128, 128:] = 10.0
    w[128:, :128] = 100.0
    w[128:, 128:] = 1000.0
    w8, scale = quantize_blocks(w)
    assert (w8.float() == 448).all()
    torch.testing.assert_close(scale * 448, torch.tensor([[1.0, 10.0], [100.0, 1000.0]]))


def test_quantizing_twice_changes_nothing() -> None:
    w = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    once = dequantize_blocks(*quantize_blocks(w, ue8m0=True))
    assert torch.equal(dequantize_blocks(*quantize_blocks(once, ue8m0=True)), once)


def test_zeros_stay_zero() -> None:
    w8, scale = quantize_blocks(torch.zeros(3, 5))
    assert scale.tolist() == [[1.0]]
    assert not dequantize_blocks(w8, scale).any()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="w has shape"):
        quantize_blocks(torch.zeros(3))
    with pytest.raises(ValueError, match="inf or nan"):
        quantize_blocks(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="int64"):
        quantize_blocks(torch.zeros(2, 2, dtype=torch.int64))
    w8, scale = quantize_blocks(torch.ones(130, 4))
    with pytest.raises(ValueError, match=r"expected \(2, 1\)"):
        dequantize_blocks(w8, scale[:1])


@given(st.floats(2.0**-13, 4096.0))
def test_scale_of_fitted_values_is_read_as_it_was_rounded(value: float) -> None:
    scale = torch.tensor([[value]])
    assert torch.equal(stored_scale(scale), scale.bfloat16().float())
