"""Freed memory is returned when the process has grown."""

from __future__ import annotations

import ctypes

import pytest

from farthing.server.trim import Trimmer, resident


def test_trims_after_growth_only() -> None:
    sizes = iter([100, 90, 94, 95, 110, 92, 93])
    trims: list[None] = []
    trimmer = Trimmer(lambda: trims.append(None), lambda: next(sizes))
    trimmer.check()  # 100, trimmed to 90
    assert len(trims) == 1
    trimmer.check()  # 94
    assert len(trims) == 1
    trimmer.check()  # 95 is more than 5 %: trimmed to 110, which is in use
    assert len(trims) == 2
    trimmer.check()  # 92
    trimmer.check()  # 93
    assert len(trims) == 2


def test_freed_chunks_between_live_ones_are_returned() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        pytest.skip("this C library cannot trim")
    chunks = [b"x" * (65_536 + place) for place in range(1024)]
    kept = [chunk for place, chunk in enumerate(chunks) if place % 16 == 0]
    full = resident()
    del chunks
    Trimmer(lambda: trim(0)).check()
    assert len(kept) == 64
    assert resident() < full - 30 * 2**20
