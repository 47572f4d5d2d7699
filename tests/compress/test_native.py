"""Calibration's native functions give what the torch code gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farthing.compress import native
from farthing.compress.calibrate import InputStats
from farthing.compress.quantize import (
    Feedback,
    Grid,
    energy_of,
    even_grid,
    fitted_grid,
    int8_grid,
    output_error,
    sweep,
)

pytestmark = pytest.mark.skipif(native._native is None, reason="the native module is not built")


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to compute in torch from then on."""
    return lambda: monkeypatch.setattr(native, "runs", lambda x: False)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 31, 32, 700, 1100])
@pytest.mark.parametrize("k", [16, 48, 112, 208])
def test_moments_of_any_number_of_tokens(tokens: int, k: int) -> None:
    x = random(0, tokens, k).bfloat16().float()  # whose products are exact
    stats = InputStats(moments=torch.zeros(k, k))
    stats.add_moments(x)
    stats.add_moments(x[:7])
    expected = x.T @ x + x[:7].T @ x[:7]
    torch.testing.assert_close(stats.gram, expected, rtol=1e-5, atol=1e-4)
    assert stats.gram is not None and torch.equal(stats.gram, stats.gram.T)
    stats.add_moments(x)  # after the upper half was filled in
    torch.testing.assert_close(stats.gram, expected + x.T @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [0, 8, 15, 16, 17, 208])
def test_only_whole_vectors_of_a_cpu_are_computed_natively(k: int) -> None:
    assert native.runs(torch.empty(3, k)) == (k % 16 == 0)
    assert not native.runs(torch.empty(3, k, device="meta"))


GRIDS: dict[str, Callable[[Tensor, Tensor], Grid]] = {
    "fitted": lambda w, energy: fitted_grid(w, 32, energy),
    "int4": lambda w, energy: even_grid(w, 32, energy),
    "int5": lambda w, energy: even_grid(w, 32, energy, bits=5),
    "int8": lambda w, energy: int8_grid(w, energy),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_ranges_are_those_of_torch(kind: str, in_torch: Callable[[], None]) -> None:
    w, energy = random(0, 2, 70, 96), random(1, 2, 96).square()
    ours = GRIDS[kind](w, energy)
    in_torch()
    assert torch.equal(ours.scale, GRIDS[kind](w, energy).scale)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("rows", [20, 48, 70])
def test_sweep_is_that_of_torch(kind: str, rows: int, in_torch: Callable[[], None]) -> None:
    x = random(0, 400, 208) @ random(1, 208, 208)
    gram = torch.stack([x.T @ x, x[:50].T @ x[:50]])
    w = random(2, 2, rows, 208)
    energy = gram.diagonal(dim1=1, dim2=2)
    grid = int8_grid(w) if kind == "int8" else GRIDS[kind](w[..., :192], energy[:, :192])
    if kind != "int8":
        w, gram = w[..., :192].contiguous(), gram[:, :192, :192].contiguous()
    back = Feedback.of(gram)
    value, squared = sweep(w, back, grid)
    in_torch()
    expected, missed = sweep(w, back, grid)
    # A tie that falls the other way changes all later columns of its row, and the error hardly.
    assert float((value == expected).all(-1).float().mean()) >= 0.95
    torch.testing.assert_close(squared, missed, rtol=1e-3, atol=0.0)
    for each in (value, expected):
        exact = output_error(w, each, gram) * energy_of(w, gram)
        torch.testing.assert_close(squared, exact, rtol=1e-3, atol=0.0)
