"""Statistics against plain sums, and the fallback for rare experts."""

from __future__ import annotations

import pytest
import torch

from farthing.compress import native
from farthing.compress.calibrate import InputStats, Recorder, Wanted, with_fallbacks
from farthing.compress.layer import Matrix


def record(batches: dict[str, list[torch.Tensor]]) -> Recorder:
    ops = Recorder(Wanted(gram=True, rows=16))
    for name, parts in batches.items():
        for x in parts:
            ops.before(Matrix(name, torch.zeros(0), "dense"), x)
    return ops


def test_statistics_equal_plain_sums_for_any_batches() -> None:
    x = torch.randn(90, 12, generator=torch.Generator().manual_seed(0))
    st = record({"m": [x[:7], x[7:50], x[50:]]}).inputs["m"]
    assert st.tokens == 90 and st.gram is not None
    torch.testing.assert_close(st.gram, x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(st.mean_energy(), x.square().mean(0))
    torch.testing.assert_close(st.magnitude, x.abs().sum(0))
    assert torch.equal(st.absmax, x.abs().amax(0))
    assert len(st.rows) == 16
    assert all(bool((x == row).all(1).any()) for row in st.rows)  # a sample of rows without repeats
    assert len({tuple(row.tolist()) for row in st.rows}) == 16


def test_rare_experts_use_their_peers_sums_and_widest_range() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b, rare = (torch.randn(n, 8, generator=generator) * s for n, s in ((60, 1), (40, 3), (2, 1)))
    inputs = record({"a": [a], "b": [b], "rare": [rare]}).inputs
    names = ["a", "b", "rare", "never"]
    filled, missing = with_fallbacks(inputs, names, least=8)
    assert missing == ["rare", "never"]
    assert filled["a"] is inputs["a"] and filled["b"] is inputs["b"]
    every = torch.cat((a, b, rare))
    for name in missing:
        st: InputStats = filled[name]
        assert st.fallback and st.gram is not None
        torch.testing.assert_close(st.gram, every.T @ every, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(st.mean_energy(), every.square().mean(0))
        assert torch.equal(st.absmax, every.abs().amax(0))
        assert len(st.rows)
    same, none = with_fallbacks(inputs, ["a", "b"], least=8)
    assert not none and same["a"].fallback is None
    assert with_fallbacks({}, ["x"], least=8) == ({}, ["x"])


def test_moments_without_native_code_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "runs", lambda x: False)
    x = torch.randint(-4, 5, (9, 12)).float()
    stats = InputStats(moments=torch.ones(12, 12))
    stats.add_moments(x)
    assert stats.gram is not None and torch.equal(stats.gram, 1 + x.T @ x)
