"""Distances of prefetching: results do not depend on them, and lines beyond the weights may be prefetched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("farthing._native")

from farthing import _native
from farthing.ops.cpu import CpuOps
from tests.ops.parts import weight
from tests.ops.test_cpu import ISAS, threads_of


@pytest.fixture
def distances() -> Iterator[tuple[int, int, int]]:
    before = _native.prefetch_distances()
    yield before
    _native.set_prefetch_distances(*before)


def test_this_processor_has_whole_lines(distances: tuple[int, int, int]) -> None:
    far, nibbles, near = distances
    assert 0 < near < nibbles and all(d > 0 and d % 64 == 0 for d in distances) and far <= nibbles


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", ["int8", "int4", "bf16"])
def test_results_do_not_depend_on_them(isa: str, form: str, distances: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    ops, w = CpuOps(threads_of(isa), isa=isa), weight(form, 80, 256)
    linear = ops.pack_linear("w", lambda: [w])
    for rows in (1, 2, 5):
        x, found = torch.randn(rows, 256), []
        for change in (distances, (0, 0, 0), (1 << 24, 1 << 24, 1 << 20)):
            _native.set_prefetch_distances(*change)
            found.append(ops.linear(x, linear))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
