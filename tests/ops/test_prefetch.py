"""What loops take from the processor: results do not depend on it; lines beyond weights may be prefetched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing import _native
from farthing.ops.cpu import CpuOps
from farthing.ops.weights import Weight
from tests.isas import ISAS, threads_of
from tests.ops.parts import BOUNDS, distance, weight

Distances = tuple[int, int, int, int, int]


@pytest.fixture
def distances() -> Iterator[Distances]:
    before, one, fast = _native.prefetch_distances(), _native.one_product_a_cycle(), _native.fast_pairs()
    yield before
    _native.set_prefetch_distances(*before)
    _native.set_one_product_a_cycle(one)
    _native.set_fast_pairs(fast)


def test_this_processor_has_whole_lines(distances: Distances) -> None:
    far, nibbles, near, rows, byte_rows = distances
    assert 0 < near < nibbles and all(d > 0 and d % 64 == 0 for d in (far, nibbles, near)) and far <= nibbles
    assert 0 < rows <= byte_rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", ["int8", "int4", "bf16"])
def test_results_do_not_depend_on_them(isa: str, form: str, distances: Distances) -> None:
    torch.manual_seed(0)
    ops, w = CpuOps(threads_of(isa), isa=isa), weight(form, 80, 256)
    linear = ops.pack_linear("w", lambda: [w])
    for rows in (1, 2, 5):
        x, found = torch.randn(rows, 256), []
        for change in (distances, (0, 0, 0, 8, 8), (1 << 24, 1 << 24, 1 << 20, 8, 8), (512, 512, 256, 1, 1)):
            _native.set_prefetch_distances(*change)
            found.append(ops.linear(x, linear))
        assert all(torch.equal(found[0], each) for each in found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", BOUNDS)
def test_both_tiles_have_the_same_results(isa: str, form: str, distances: Distances) -> None:
    torch.manual_seed(0)
    ops, w = CpuOps(threads_of(isa), isa=isa), weight(form, 48, 512)
    linear = ops.pack_linear("w", lambda w=w: [w])
    x = torch.randn(23, 512)
    alone = torch.cat([ops.linear(row[None], linear) for row in x])
    for one in (False, True):
        _native.set_one_product_a_cycle(one)
        for rows in (5, 7, 9, 10, 11, 23):
            assert torch.equal(ops.linear(x[:rows], linear), alone[:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("form", "n", "k"), [("fp8", 80, 256), ("fp8", 33, 100), ("fp8_32", 65, 160), ("fp8_rows", 48, 416)]
)
def test_fp8_by_floats_and_by_pairs(
    isa: str, fast: bool, form: str, n: int, k: int, distances: Distances
) -> None:
    """Rows of any magnitude, alone and together."""
    torch.manual_seed(0)
    _native.set_fast_pairs(fast)
    ops, w = CpuOps(threads_of(isa), isa=isa), weight(form, n, k)
    linear = ops.pack_linear("w", lambda: [w])
    x = torch.randn(27, k) * 10.0 ** torch.linspace(-24, 24, 27)[:, None]
    exact = x.double() @ w.dequantize().double().T
    alone = torch.cat([ops.linear(row[None], linear) for row in x])
    assert max(map(distance, alone.double(), exact)) < BOUNDS[form]
    for one in (False, True):
        _native.set_one_product_a_cycle(one)
        for rows in (2, 3, 6, 7, 11, 12, 13, 27):
            assert torch.equal(ops.linear(x[:rows], linear), alone[:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fast", [False, True])
def test_every_fp8_number(isa: str, fast: bool, distances: Distances) -> None:
    _native.set_fast_pairs(fast)
    codes = torch.arange(256, dtype=torch.uint8).repeat(32, 1)
    codes[:, [127, 255]] = 0  # NaN
    w = Weight("fp8", codes.view(torch.float8_e4m3fn), torch.full((1, 2), 0.375))
    linear = CpuOps(threads_of(isa), isa=isa).pack_linear("w", lambda: [w])
    found = CpuOps(threads_of(isa), isa=isa).linear(torch.eye(256), linear)
    assert torch.equal(found, w.dequantize().T)
