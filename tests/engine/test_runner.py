"""The length of the context: the model's, or less."""

from __future__ import annotations

import pytest

from farthing.config import EngineConfig
from farthing.engine.runner import _length
from farthing.model.config import ModelConfig
from farthing.planner.estimate import published_config


def test_a_sliding_window_that_limits_the_context_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    raw = published_config("mixtral-8x7b") or {}
    model = ModelConfig.from_json(raw | {"sliding_window": 64})
    assert _length(EngineConfig(), model) == 64
    said = "sliding_window limits the context to 64 of 32,768 tokens, within which attention is the same"
    assert caplog.text.count(said) == 1
    with pytest.raises(ValueError, match=r"max_model_len: got 65; expected at most 64, .* sliding_window$"):
        _length(EngineConfig(max_model_len=65), model)
    caplog.clear()
    assert _length(EngineConfig(max_model_len=64), model) == 64
    for window in (None, 32768):
        assert _length(EngineConfig(), ModelConfig.from_json(raw | {"sliding_window": window})) == 32768
    assert not caplog.records
