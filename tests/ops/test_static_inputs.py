"""Calibrated input ranges on the CPU kernels, against the definition in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farthing.ops.api import Norm
from farthing.ops.select import select
from farthing.ops.weights import InputRounding, Weight, quantize_int8
from tests.isas import ISAS

pytestmark = pytest.mark.pairs


def exact(x: torch.Tensor, weight: Weight, scale: float) -> torch.Tensor:
    """round(x / scale) in [-128, 127] times the integers of the weight, in float64."""
    q = (x / torch.tensor(scale)).round().clamp(-128, 127).double()
    assert weight.scale is not None
    return (q @ weight.data.double().t()) * (weight.scale.double().t() * scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 3, 17, 64])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (48, 176), (96, 200), (32, 16)])
@pytest.mark.parametrize("scale", [0.002, 0.03, 3.0])
def test_linear_is_exact(isa: str, tokens: int, n: int, k: int, scale: float) -> None:
    """A narrow range clips, a wide one rounds most values to zero; both follow the file."""
    torch.manual_seed(n + k + tokens)
    weight = replace(quantize_int8(torch.randn(n, k)), inputs=InputRounding(8, scale=scale))
    x = torch.randn(tokens, k) * torch.tensor([1.0, 1e-3, 30.0]).repeat(k)[:k]
    ops = select(f"cpu/{isa}")
    y = ops.linear(x, ops.pack_linear("w", lambda: [weight]))
    torch.testing.assert_close(y.double(), exact(x, weight, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_number_that_is_not_finite_is_not_clipped_into_the_range(bad: float) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = bad
    ops = select("cpu")
    y = ops.linear(
        x,
        ops.pack_linear(
            "w", lambda: [replace(quantize_int8(torch.randn(32, 64)), inputs=InputRounding(8, scale=0.03))]
        ),
    )
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_ties_round_to_even_after_a_true_division() -> None:
    """x = (i + 1/2) * scale, where x * (1 / scale) would miss the tie."""
    scale = 0.1
    k = 64
    x = ((torch.arange(k) - 32).float() + 0.5) * torch.tensor(scale)
    weight = Weight(
        "int8", torch.eye(k, dtype=torch.int8), torch.ones(k, 1), inputs=InputRounding(8, scale=scale)
    )
    ops = select("cpu")
    y = ops.linear(x[None], ops.pack_linear("w", lambda: [weight]))[0]
    assert torch.equal((y / scale).round(), (x / torch.tensor(scale)).round())


def test_stacked_matrices_use_the_wider_range_and_mixed_ones_stay_dynamic() -> None:
    torch.manual_seed(0)
    first, second = (quantize_int8(torch.randn(32, 64)) for _ in range(2))
    a, b = InputRounding(8, scale=0.02), InputRounding(8, scale=0.05)
    ops, x = select("cpu"), torch.randn(2, 64)
    both = ops.pack_linear("both", lambda: [replace(first, inputs=a), replace(second, inputs=b)])
    expected = torch.cat([exact(x, w, 0.05) for w in (first, second)], 1)
    torch.testing.assert_close(ops.linear(x, both).double(), expected, rtol=1e-5, atol=1e-5)
    mixed = ops.pack_linear("mixed", lambda: [replace(first, inputs=a), second])
    dynamic = ops.pack_linear("dynamic", lambda: [first, second])
    assert torch.equal(ops.linear(x, mixed), ops.linear(x, dynamic))


@pytest.mark.parametrize("scale", [0.01, 0.05])
def test_the_reference_rounds_the_same(scale: float) -> None:
    torch.manual_seed(0)
    inputs = InputRounding(8, scale=scale)
    shapes = ((48, 64), (48, 64), (64, 48))
    parts = tuple(replace(quantize_int8(torch.randn(*s) / 8), inputs=inputs) for s in shapes)
    x, norm = torch.randn(9, 64), torch.rand(64) + 0.5
    ops, reference = select("cpu"), select("reference")
    stack = list(parts[:2])
    y, z = (o.linear(x, o.pack_linear("w", lambda: stack), Norm(norm, 1e-6)) for o in (ops, reference))
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    y, z = (o.mlp(x, o.pack_mlp("m", lambda: parts), Norm(norm, 1e-6)) for o in (ops, reference))
    assert float((y - z).norm() / (z - x).norm()) < 1e-3


def test_a_packed_file_keeps_the_range(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = replace(quantize_int8(torch.randn(32, 64)), inputs=InputRounding(8, scale=0.04))
    x, ops = torch.randn(2, 64), select("cpu")
    expected = ops.linear(x, ops.pack_linear("w", lambda: [weight]))
    ops.save_packed(str(tmp_path / "w.bin"))  # type: ignore[attr-defined]
    again = select("cpu", packed=str(tmp_path / "w.bin"))

    def refuse() -> list[Weight]:
        raise AssertionError("the file holds it")

    assert torch.equal(again.linear(x, again.pack_linear("w", refuse)), expected)
