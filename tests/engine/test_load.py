"""Warnings about uncalibrated rounding while loading."""

from __future__ import annotations

import logging

import pytest

from farthing.config import EngineConfig
from farthing.engine.load import load_engine


def test_int4_warns_about_its_cost_and_names_an_alternative(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "farthing.engine.load"):
        engine = load_engine(EngineConfig(model="mite", quantization="int4", threads=1))
        engine.shutdown()
    (record,) = [r for r in caplog.records if r.name == "farthing.engine.load"]
    assert "perplexity rises by 0.7 % (95 %: 0.5 to 0.8), on a GPU by 1.0 %" in record.getMessage()
    assert "farthing compress" in record.getMessage() and "--recipe int4-gptq" in record.getMessage()
    assert "\n" not in record.getMessage()
