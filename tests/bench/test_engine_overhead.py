"""bench/engine_overhead.py fits the engine."""

from __future__ import annotations

from importlib import import_module

import pytest

from farthing.engine.request import SamplingParams
from tests.bench.test_page import BENCH


@pytest.mark.parametrize("native_calls", [False, True])
def test_steps_without_arithmetic_are_timed(monkeypatch: pytest.MonkeyPatch, native_calls: bool) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    bench = import_module("engine_overhead")
    params = SamplingParams(temperature=0, max_tokens=None)
    model = bench.calls_only() if native_calls else None
    assert bench.microseconds_per_step(2, params, 0, steps=3, model=model) > 0
