"""Sums of the largest integers that a format has: those of many rows are those of one row, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("farthing._native")

from farthing.ops.cpu import CpuOps
from farthing.ops.reference import ReferenceOps
from farthing.ops.weights import INTEGERS, Weight
from tests.isas import ISAS
from tests.ops.parts import GROUPS, SCALED, UNITS, distance, weight

pytestmark = pytest.mark.usefixtures("exact_on_amx")

REF = ReferenceOps(torch.float32)
NAMES = ["int8", "int4", "int4_zero", *GROUPS, *UNITS, *(n for n in SCALED if not n.startswith("fp8"))]
K = 256


def extreme(name: str, group: int) -> Weight:
    """A matrix whose rows hold the largest or the smallest integer everywhere, or random ones."""
    w = weight(name, 48, K, group)
    ends = [int(w.data.min()), int(w.data.max())]
    if w.nibbles:
        codes = torch.tensor(INTEGERS[w.format].codes or range(16))
        ends = [0x11 * int(codes.argmin()), 0x11 * int(codes.argmax())]
    w.data[1:17], w.data[17:33] = ends
    return w


@pytest.mark.parametrize("isa", ISAS)
@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(2, 150),
    group=st.sampled_from([32, 64, 128, 256]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_many_rows_are_single_rows(isa: str, name: str, rows: int, group: int, seed: int) -> None:
    torch.manual_seed(seed)
    ops, w = CpuOps(1, isa=isa), extreme(name, group)
    x = torch.randint(0, 2, (rows, 1)) * 2.0 - torch.ones(rows, K)  # rounded to 127 or -127 everywhere
    x[rows // 2 :] = torch.randn(rows - rows // 2, K)
    handle = ops.pack_linear("w", lambda: [w])
    together = ops.linear(x, handle)
    for i in {0, rows // 3, rows // 2, rows - 1}:
        assert torch.equal(together[i], ops.linear(x[i : i + 1], handle)[0])
    exact = REF.linear(x, w.dequantize())
    assert distance(together[: rows // 2], exact[: rows // 2]) < 1e-6
    assert distance(together, exact) < 1e-4
