"""What loops take from the processor: results do not depend on it; lines beyond weights may be prefetched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing import _native
from farthing.ops.cpu import CpuOps
from tests.ops.parts import BOUNDS, weight
from tests.ops.test_cpu import ISAS, threads_of

Distances = tuple[int, int, int, int, int]


@pytest.fixture
def distances() -> Iterator[Distances]:
    before, one = _native.prefetch_distances(), _native.one_product_a_cycle()
    yield before
    _native.set_prefetch_distances(*before)
    _native.set_one_product_a_cycle(one)


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
