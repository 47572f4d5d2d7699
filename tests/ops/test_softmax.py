"""The softmax kernel of every instruction set compared with float64, and rows that have no softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("farthing._native")

from farthing.ops.cpu import CpuOps
from farthing.ops.cpu.stack import native_rows
from tests.isas import ISAS

INF, NAN = float("inf"), float("nan")
LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    torch.manual_seed(0)
    return CpuOps(1, isa=request.param)


def softmax(ops: CpuOps, x: Tensor) -> Tensor:
    rows, n = x.shape
    out = torch.empty(rows, n)
    ops._native.softmax(native_rows(x), rows, n, native_rows(out))
    return out


def exact(x: Tensor) -> Tensor:
    return x.double().softmax(-1)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 1000, 4096, 4111])
def test_as_precise_as_float32(ops: CpuOps, n: int) -> None:
    for spread in (0.1, 8.0, 60.0):
        x = torch.randn(5, n) * spread
        x[1] += 1e4  # the exponent is that of a difference
        x[2] -= 1e4
        y, wanted = softmax(ops, x).double(), exact(x)
        visible = wanted > 1e-30  # smaller ones may be flushed to zero
        assert ((y - wanted).abs() / wanted)[visible].max() < 1e-5
        assert y[~visible].le(1e-29).all()
        torch.testing.assert_close(y.sum(-1), torch.ones(5, dtype=torch.double), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [3, 16, 100])
@pytest.mark.parametrize(
    ("first", "others"),
    [(LARGEST, -LARGEST), (-LARGEST, -LARGEST), (LARGEST, LARGEST), (0.0, -INF), (-LARGEST, -INF)],
)
def test_extremes(ops: CpuOps, n: int, first: float, others: float) -> None:
    x = torch.full((2, n), others)
    x[0, 0] = x[1, n - 1] = first
    torch.testing.assert_close(softmax(ops, x).double(), exact(x), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("n", [3, 16, 100])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rows_without_a_softmax_are_nan(ops: CpuOps, n: int, value: float) -> None:
    for at in {0, n // 2, n - 1}:
        x = torch.randn(3, n) * 50
        if value == -INF:
            x[1] = value  # a single one is a weight of zero
        else:
            x[1, at] = value
        y = softmax(ops, x)
        assert y[1].isnan().all() and x.softmax(-1)[1].isnan().all()
        torch.testing.assert_close(y[::2].double(), exact(x[::2]), atol=1e-6, rtol=1e-5)


def test_large_results_and_their_neighbours(ops: CpuOps) -> None:
    """Rows of a wider matrix, written past the caches from 16 MiB on, and in place."""
    rows, n, stride = 1025, 4094, 4112
    x = torch.randn(8, n).repeat(129, 1)[:rows]
    buffer = torch.full((rows * stride + 16,), 7.0)
    start = -buffer.data_ptr() % 64 // 4
    out = buffer[start:][: rows * stride].view(rows, stride)
    ops._native.softmax(native_rows(x), rows, n, native_rows(out[:, :n]))
    assert (out[:, n:] == 7).all()
    torch.testing.assert_close(out[:8, :n].double(), exact(x[:8]), atol=1e-7, rtol=1e-5)
    assert torch.equal(out[8:16, :n], out[:8, :n]) and torch.equal(out[1024, :n], out[0, :n])
    few = x[:8].clone()
    ops._native.softmax(native_rows(few), 8, n, native_rows(few))
    assert torch.equal(few, out[:8, :n])
